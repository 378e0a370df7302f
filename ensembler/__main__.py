"""``python -m ensembler``, and ``torchrun -m ensembler``: the command line."""

from __future__ import annotations

from ensembler.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
