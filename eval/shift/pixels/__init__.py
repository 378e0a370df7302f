"""Corruptions of whole batches of images, a family a file."""

__all__: list[str] = []
