"""A run to a bundle: members as ONNX, each compared with PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler._lazy import exports

if TYPE_CHECKING:
    from ensembler.serve.export.bundle import export_run

__all__ = ["export_run"]

__getattr__, __dir__ = exports(__name__, {"export_run": "ensembler.serve.export.bundle:export_run"})
