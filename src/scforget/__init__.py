"""scforget: forget cells from trained single-cell models, and prove it."""

__version__ = "0.1.0"
