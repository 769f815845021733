"""What attention a converted model has, and which of its parts are integers; stored in its ``config.json``."""

from typing import Literal

from pydantic import Field

from inhibitor.config import Config


class InhibitorConfig(Config):
    """How ``convert`` replaces softmax attention.

    Args:
        layers: Indices of the layers to convert, counted from 0; None converts all.
        per: Whether each head has γ, η, δ, ρ, τ and u of its own, or a layer's heads share them, as in the authors'
            code.
        gamma: Initial γ, the slope of the score.
        eta: Initial η, the scale of the result.
        delta: Initial δ, the shift of the score.
        length_exponent: Initial ρ. 0 is the paper's sum over keys; 1 is a mean over them, as softmax takes one, and
            starts nearer to the teacher.
        reach: Initial τ: how far a key may be inhibited and still be heard. ρ is then the exponent of the number of
            keys that a query hears; with None, as in the paper, of those that it may see.
        query_gain: Whether each query has a gain of its own, η · exp(query · u), with a learned u that begins at 0.
        center: Whether the row's mean is subtracted from the scores. Without it a student learns more from as much
            text, once δ is calibrated.
        signed: Whether values are inhibited towards zero from both sides.
    """

    layers: tuple[int, ...] | None = None
    per: Literal["head", "layer"] = "head"
    gamma: float = Field(default=1.0, allow_inf_nan=False)
    eta: float = Field(default=1.0, allow_inf_nan=False)
    delta: float = Field(default=0.5, allow_inf_nan=False)
    length_exponent: float = Field(default=1.0, allow_inf_nan=False)
    reach: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    query_gain: bool = True
    center: bool = True
    signed: bool = True


class Int8Config(Config):
    """What ``quantize`` turns into integers; stored in ``config.json`` under ``int8``.

    Args:
        attention: Bits of query, key, value and inhibition in the layers with inhibitor attention. 8 is what the
            kernels are made for; 6 and 4 run on the same kernels, with fewer codes, for research.
        linear: Whether the projections and feed-forward layers multiply in int8: weights with a scale for each output,
            inputs with a fixed step for each feature. The pooler and the head stay as they are. ``"fake"`` is the
            form for training: the same numbers in float32, rounded on the way.
        weights: Bits of those layers' weights. With 7 a sum of two products fits the 16 bits that x86 processors
            without VNNI have for it, where a layer is faster then. It gives the same everywhere.
        embeddings: Whether embedding tables are kept in int8, with a scale for each row; ``"fake"`` as above.
    """

    attention: Literal[8, 6, 4] = 8
    linear: Literal["int8", "fake", "float"] = "int8"
    weights: Literal[8, 7] = 8
    embeddings: Literal["int8", "fake", "float"] = "int8"
