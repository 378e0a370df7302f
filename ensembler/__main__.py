"""The command line, run as ``python -m ensembler`` or ``torchrun -m ensembler``."""

from __future__ import annotations

from ensembler.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
