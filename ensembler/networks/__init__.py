"""Networks by name, checked and captured; files of weights, and which tensors of them a network takes."""

__all__: list[str] = []
