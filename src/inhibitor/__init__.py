"""Inhibitor attention for pretrained transformers: additions, comparisons and ReLU, kept accurate by distillation."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from inhibitor.errors import InhibitorError
from inhibitor.models import InhibitorConfig
from inhibitor.ops import inhibitor_attention, which_backend

if TYPE_CHECKING:
    from inhibitor.models.convert import convert

__version__ = version("inhibitor")
__all__ = ["InhibitorConfig", "InhibitorError", "__version__", "convert", "inhibitor_attention", "which_backend"]


def __getattr__(name: str) -> Any:
    if name == "convert":  # loaded on use: it needs transformers' model code
        from inhibitor.models.convert import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
