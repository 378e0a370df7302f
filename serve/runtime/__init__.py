"""A bundle's members in ONNX Runtime and NumPy, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ensembler._lazy import exports

if TYPE_CHECKING:
    from ensembler.serve.runtime.runtime import Runtime

__all__ = ["Runtime"]

__getattr__, __dir__ = exports(__name__, {"Runtime": "ensembler.serve.runtime.runtime:Runtime"})
