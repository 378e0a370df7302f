"""The methods, one a file; each reads like its paper."""

__all__: list[str] = []
