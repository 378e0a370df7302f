"""Test sets: generated corruptions, files of published ones, out-of-distribution images."""

__all__: list[str] = []
