"""Where transformers and the operator meet: the module of learnable parameters, the attention function, the taps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from inhibitor.errors import ModelError
from inhibitor.models.config import InhibitorConfig
from inhibitor.models.families import attention_modules
from inhibitor.ops import inhibitor_attention
from inhibitor.ops.masks import accumulation_dtype
from inhibitor.ops.reference import inhibition

NAME = "inhibitor"
TEACHER = "inhibitor-teacher"  # softmax through SDPA, with taps
PARAMETERS = ("gamma", "eta", "delta", "length_exponent", "reach")  # one number for each head or layer


class InhibitorAttention(nn.Module):
    """The learnable part of inhibitor attention: γ, η, δ, ρ and τ, each (heads,) or (1,), and u, of a head's size."""

    gamma: nn.Parameter
    eta: nn.Parameter
    delta: nn.Parameter
    length_exponent: nn.Parameter
    reach: nn.Parameter | None
    query_gain: nn.Parameter | None

    def __init__(self, config: InhibitorConfig, heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.heads, self.head_dim = config, heads, head_dim
        size = heads if config.per == "head" else 1
        for name in PARAMETERS:
            self.register_parameter(name, None if getattr(config, name) is None else nn.Parameter(torch.empty(size)))
        self.register_parameter("query_gain", nn.Parameter(torch.empty(size, head_dim)) if config.query_gain else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values of the configuration."""
        for name in PARAMETERS:
            if getattr(self, name) is not None:
                nn.init.constant_(getattr(self, name), getattr(self.config, name))
        if self.query_gain is not None:
            nn.init.zeros_(self.query_gain)

    def gain(self, query: Tensor) -> Tensor:
        """η, or of each query its own, η · exp(query · u): (heads,) or (batch, heads, queries), in at least float32."""
        if self.query_gain is None:
            return self.eta
        with torch.autocast(query.device.type, enabled=False):
            wide = query.to(accumulation_dtype(query.dtype))
            return self.eta.unsqueeze(-1) * (wide * self.query_gain.unsqueeze(1)).sum(-1).exp()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        """Context of shape (batch, heads, queries, value_dim)."""
        return self.attend(query, key, value, self.gain(query), attn_mask, is_causal, scale)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gain: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        """The same with a given gain, (heads,) or (batch, heads, queries)."""
        return inhibitor_attention(
            query,
            key,
            value,
            gamma=self.gamma,
            eta=gain,
            delta=self.delta,
            length_exponent=self.length_exponent,
            reach=self.reach,
            center=self.config.center,
            signed=self.config.signed,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )

    def inhibition(self, query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        """Z of shape (batch, heads, queries, keys), +inf where a query may not see a key."""
        gamma, delta = (parameter.expand(query.shape[1]) for parameter in (self.gamma, self.delta))
        return inhibition(query, key, gamma, delta, attn_mask, is_causal, self.config.center, scale)


def inhibitor_layers(model: nn.Module) -> dict[int, InhibitorAttention]:
    """The layers of a model that have inhibitor attention, by index."""
    found = ((index, getattr(module, NAME, None)) for index, module in enumerate(attention_modules(model)))
    return {index: attention for index, attention in found if isinstance(attention, InhibitorAttention)}


@dataclass(frozen=True)
class Tapped:
    """What passed through one attention module; shapes as in ``inhibitor_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    context: Tensor  # (batch, queries, heads, value_dim): the attention's output before its output projection


class _LastLayerReached(Exception):  # noqa: N818 - a signal, not an error
    pass


@contextmanager
def tapping(model: nn.Module, last: int | None = None) -> Iterator[dict[int, Tapped]]:
    """Collect what passes through each attention module of ``model``, by layer, while it runs; gradients flow.

    With ``last`` the run ends inside that layer's attention, and no layer above it is computed. A softmax model must
    have been loaded as a teacher (``attn_implementation=TEACHER``).

    Example:
        >>> with tapping(teacher, last=0) as tapped:  # doctest: +SKIP
        ...     teacher(input_ids)
    """
    modules = attention_modules(model)[: None if last is None else last + 1]
    found: dict[int, Tapped] = {}

    def tap(layer: int, tapped: Tapped) -> None:
        found[layer] = tapped
        if layer == last:
            raise _LastLayerReached

    for layer, module in enumerate(modules):
        module.tap = partial(tap, layer)  # type: ignore[assignment]
    try:
        yield found
    except _LastLayerReached:
        pass
    finally:
        for module in modules:
            del module.tap


def contexts(model: PreTrainedModel, inputs: Mapping[str, Tensor], last: int | None = None) -> dict[int, Tapped]:
    """Run the base model and return what passed through its attention modules, up to layer ``last`` included."""
    with tapping(model, last) as found:
        model.base_model(**inputs)
    return found


def inhibitor_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that converted models call; layers left unconverted go on to SDPA.

    Returns:
        The context (batch, queries, heads, value_dim) and, where ``output_attentions`` asks for it, the inhibition Z
        (batch, heads, queries, keys): 0 lets a value pass whole, +inf is a key out of sight.

    Raises:
        ModelError: A softmax model, or ``output_attentions`` where some layers are not converted.
    """
    attention = getattr(module, NAME, None)
    wanted = kwargs.get("output_attentions", getattr(module.config, "output_attentions", False))
    if not isinstance(attention, InhibitorAttention):
        if wanted:  # SDPA tells no weights, and transformers would close the gap without a word
            raise ModelError(
                "output_attentions",
                expected="a model whose layers are all converted",
                got="one with layers left on softmax",
                remedy="Convert every layer, or ask for output_hidden_states.",
            )
        if not hasattr(module.config, NAME):
            raise ModelError(
                type(module).__name__,
                expected="a converted model",
                got=f"attn_implementation={NAME!r} on a softmax model",
                remedy="Call inhibitor.convert(model) instead.",
            )
        return teacher_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = _is_causal(module, query, attention_mask, is_causal)
    context = attention(query, key, value, attention_mask, causal, scale).transpose(1, 2).contiguous()
    _report(module, query, key, value, attention_mask, causal, scale, context)
    return context, attention.inhibition(query, key, attention_mask, causal, scale) if wanted else None


def teacher_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA with taps: what a teacher's attention calls."""
    context, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )
    causal = _is_causal(module, query, attention_mask, is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    _report(module, query, key, value, attention_mask, causal, scale, context)
    return context, None


def _is_causal(module: nn.Module, query: Tensor, attn_mask: Tensor | None, is_causal: bool | None) -> bool:
    """Transformers' rule: a mask says all, and one query, as in decoding, sees every key."""
    wanted = getattr(module, "is_causal", False) if is_causal is None else is_causal
    return bool(wanted) and attn_mask is None and query.shape[2] > 1


def _report(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    context: Tensor,
) -> None:
    tap = getattr(module, "tap", None)
    if tap is not None:
        tap(Tapped(query, key, value, attn_mask, is_causal, scale, context))


for _name, _forward in ((NAME, inhibitor_forward), (TEACHER, teacher_forward)):
    AttentionInterface.register(_name, _forward)
    AttentionMaskInterface.register(_name, sdpa_mask)
