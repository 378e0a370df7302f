"""Datasets: image files and arrays, their labels and splits, and how images are varied and normalised."""

__all__: list[str] = []
