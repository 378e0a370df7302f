"""Compare methods at equal budgets: a grid of methods, budgets and seeds, trained, evaluated and reported."""

from __future__ import annotations

__all__: list[str] = []
