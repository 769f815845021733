"""Inhibitor attention for pretrained transformers: additions, comparisons and ReLU, kept accurate by distillation."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from inhibitor.errors import InhibitorError
from inhibitor.models import InhibitorConfig, Int8Config
from inhibitor.ops import IntegerGrid, inhibitor_attention, inhibitor_attention_int8, which_backend

if TYPE_CHECKING:
    from inhibitor.models.convert import convert
    from inhibitor.quantization import quantize

__version__ = version("inhibitor-attention")
__all__ = [
    "InhibitorConfig",
    "InhibitorError",
    "Int8Config",
    "IntegerGrid",
    "__version__",
    "convert",
    "inhibitor_attention",
    "inhibitor_attention_int8",
    "quantize",
    "which_backend",
]


def __getattr__(name: str) -> Any:
    if name == "convert":  # loaded on use: it needs transformers' model code
        from inhibitor.models.convert import convert

        return convert
    if name == "quantize":
        from inhibitor.quantization import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
