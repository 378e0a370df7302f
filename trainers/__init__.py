"""Make runs: every way of turning a dataset and a network into an ensemble, on one training loop."""
__all__: list[str] = []
