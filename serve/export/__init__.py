"""A run to a bundle: members as ONNX, each compared with PyTorch."""

from __future__ import annotations

__all__: list[str] = []
