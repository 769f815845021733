"""What inhibitor attention a converted model has; stored in its ``config.json`` under ``inhibitor``."""

from typing import Literal

from pydantic import Field

from inhibitor.config import Config


class InhibitorConfig(Config):
    """How ``convert`` replaces softmax attention.

    Args:
        layers: Indices of the layers to convert, counted from 0; None converts all.
        per: Whether γ, η, δ and ρ are learned for each head, or shared by a layer's heads as in the authors' code.
        gamma: Initial γ, the slope of the score.
        eta: Initial η, the scale of the result.
        delta: Initial δ, the shift of the centred score.
        length_exponent: Initial ρ. 0 is the paper's sum over keys; 1 is a mean over them, as softmax takes one, and
            starts nearer to the teacher.
        center: Whether the row's mean is subtracted from the scores.
        signed: Whether values are inhibited towards zero from both sides.
    """

    layers: tuple[int, ...] | None = None
    per: Literal["head", "layer"] = "head"
    gamma: float = Field(default=1.0, allow_inf_nan=False)
    eta: float = Field(default=1.0, allow_inf_nan=False)
    delta: float = Field(default=0.5, allow_inf_nan=False)
    length_exponent: float = Field(default=1.0, allow_inf_nan=False)
    center: bool = True
    signed: bool = True
