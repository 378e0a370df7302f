"""A bundle's members in ONNX Runtime and NumPy, without torch."""

from __future__ import annotations

__all__: list[str] = []
