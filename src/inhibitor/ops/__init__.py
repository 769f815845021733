"""Floor 1, the operator: the equations, the backends, the registration with PyTorch."""

from inhibitor.ops.attention import inhibitor_attention
from inhibitor.ops.backends import BackendChoice, which_backend
from inhibitor.ops.integer import inhibitor_attention_int8, integer_attention, which_integer_backend
from inhibitor.ops.integer_cache import IntegerCache
from inhibitor.ops.integer_grid import IntegerGrid, quantize_query_key, quantize_value

__all__ = [
    "BackendChoice",
    "IntegerCache",
    "IntegerGrid",
    "inhibitor_attention",
    "inhibitor_attention_int8",
    "integer_attention",
    "quantize_query_key",
    "quantize_value",
    "which_backend",
    "which_integer_backend",
]
