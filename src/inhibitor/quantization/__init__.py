"""Floor 3, integers: steps found on data, parts put in place, what they cost."""

from inhibitor.quantization.quantize import quantize

__all__ = ["quantize"]
