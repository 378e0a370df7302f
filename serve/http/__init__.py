"""The service as a plain Starlette application, without BentoML."""

from __future__ import annotations

__all__: list[str] = []
