"""ilr-fast: language models that learn by talking to one another (ILR, arXiv 2509.26306)."""

__version__ = "0.1.0"
