"""Runs and bundles as folders: whole or absent, hashed, signed, at a path or at a URL."""

__all__: list[str] = []
