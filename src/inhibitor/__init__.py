"""Inhibitor attention for pretrained transformers: additions, comparisons and ReLU, kept accurate by distillation."""

from importlib.metadata import version

from inhibitor.errors import InhibitorError
from inhibitor.ops import inhibitor_attention, which_backend

__version__ = version("inhibitor")
__all__ = ["InhibitorError", "__version__", "inhibitor_attention", "which_backend"]
