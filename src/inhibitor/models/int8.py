"""The integer parts of a model: attention, linear layers, embeddings; made empty here, filled by ``quantize``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation

from inhibitor.errors import ModelError
from inhibitor.models.attention import NAME, InhibitorAttention, inhibitor_layers
from inhibitor.models.config import InhibitorConfig, Int8Config
from inhibitor.models.families import attention_modules, feed_forward_modules, layer_modules
from inhibitor.ops.int8_linear import codes, int8_linear
from inhibitor.ops.integer import inhibitor_attention_int8
from inhibitor.ops.integer_grid import IntegerGrid, inverse, quantize_query_key, quantize_value
from inhibitor.ops.integer_operator import grid_of, steps_of

INT8 = "int8"
Kind = Literal["attention", "linear", "activation", "embeddings"]

ACTIVATIONS: dict[type[nn.Module], str] = {  # that can follow a product in 8 bits, and their names there
    GELUActivation: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
}


class IntegerInhibitorAttention(InhibitorAttention):
    """Inhibitor attention by the integer operator, trainable: the gradients are those of the float operator.

    The forward pass is ``inhibitor_attention_int8`` whether it trains or not. In the backward pass, query, key and
    value are what their codes stand for, rounding passes gradients straight through, clipping stops them, and the steps
    are learned like weights (LSQ, arXiv 1902.08153), by their logarithm (arXiv 1903.08066), so that they stay above 0.
    A query's gain is of the query as it comes, in float32: it scales what leaves the integers.

    Args:
        config: As for ``InhibitorAttention``.
        heads: Of the layer.
        head_dim: Of query and key.
        bits: Of query, key and value.
    """

    def __init__(self, config: InhibitorConfig, heads: int, head_dim: int, bits: int) -> None:
        super().__init__(config, heads, head_dim)
        self.bits = bits
        self.log2_query_key_step, self.log2_value_step = (nn.Parameter(torch.zeros(heads)) for _ in range(2))

    def steps(self) -> tuple[Tensor, Tensor]:
        """The steps of query and key, and of the value: float32 of shape (heads,) each."""
        return steps_of(self.log2_query_key_step), steps_of(self.log2_value_step)

    def grid(self, scale: float) -> IntegerGrid:
        """The grid that γ, δ, τ and the steps give, for a factor of the distance."""
        with torch.no_grad():
            steps = self.log2_query_key_step, self.log2_value_step
            made = grid_of(*steps, self.gamma, self.delta, self.reach, scale)
        return IntegerGrid(*(made[:-1] if self.reach is None else made))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        """Context of shape (batch, heads, queries, value_dim)."""
        gain = self.gain(query)
        exact = self._exact(query, key, value, gain, attn_mask, is_causal, scale)
        if not torch.is_grad_enabled():
            return exact
        low, high = -(1 << self.bits - 1), (1 << self.bits - 1) - 1
        query_key_step, value_step = self.steps()
        query, key = (_on_grid(x, query_key_step, low, high) for x in (query, key))
        value = _on_grid(value, value_step, -high, high)
        smooth = self.attend(query, key, value, gain, attn_mask, is_causal, scale)
        result: Tensor = _ValueOfOneGradientOfOther.apply(exact, smooth)  # type: ignore[no-untyped-call]
        return result

    def _exact(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gain: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        grid, dtype = self.grid(scale), query.dtype
        if self.bits != 8:
            query, key = (quantize_query_key(x, grid.query_key_step, self.bits) for x in (query, key))
            value = quantize_value(value, grid.value_step, self.bits)
        return inhibitor_attention_int8(
            query.detach(),
            key.detach(),
            value.detach(),
            grid,
            eta=gain.detach(),
            length_exponent=self.length_exponent.detach(),
            center=self.config.center,
            signed=self.config.signed,
            attn_mask=attn_mask,
            is_causal=is_causal,
        ).to(dtype)


class _ValueOfOneGradientOfOther(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, smooth: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def _on_grid(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """What the codes of x stand for; rounding passes gradients to x and to the step, clipping to the step alone."""
    step = step.view(-1, 1, 1)
    return (_straight_through((x.float() * inverse(step)).clamp(low, high)) * step).to(x.dtype)


class Int8Linear(nn.Module):
    """A linear layer that multiplies unsigned inputs of 8 bits and signed weights of 8 bits, by oneDNN.

    The codes of an input are ``clamp(round(x · multiplier) + zero_point, 0, 255)``, with a multiplier for each feature:
    large features then take no resolution from small ones, and no row depends on its neighbours or its padding.

    With an activation, what comes out are codes, those of the next layer's input: its grid then has one multiplier.

    Args:
        in_features: Of the input.
        out_features: Of the output.
        bias: Whether one is added.
        activation: What the output goes through, by its name in ``ACTIVATIONS``.
    """

    multiplier: Tensor
    zero_point: Tensor
    weight_codes: Tensor
    scale: Tensor
    output_multiplier: Tensor | None
    output_zero_point: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("multiplier", torch.ones(in_features))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("weight_codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("output_multiplier", torch.ones(()) if activation else None)
        self.register_buffer("output_zero_point", torch.zeros((), dtype=torch.int32) if activation else None)

    @torch.no_grad()
    def fill(self, linear: nn.Linear, multiplier: Tensor, zero_point: Tensor) -> None:
        """Take over a float layer's weights, for inputs on a grid."""
        weight, scale = folded(linear.weight, multiplier)
        for mine, given in (("multiplier", multiplier), ("zero_point", zero_point), ("scale", scale)):
            getattr(self, mine).copy_(given)
        self.weight_codes.copy_(weight.round())
        if self.bias is not None:
            self.bias.copy_(linear.bias)

    @torch.no_grad()
    def feed(self, reader: "Int8Linear") -> None:
        """Give codes on the grid of the layer that reads them, which has one multiplier for all features."""
        if self.output_multiplier is None or self.output_zero_point is None or bool(reader.multiplier.diff().any()):
            raise ModelError(
                "an int8 linear layer that gives codes",
                expected="an activation here, and one multiplier in the layer that reads them",
                got=f"activation {self.activation}, multipliers from {reader.multiplier.min():g} to "
                f"{reader.multiplier.max():g}",
                remedy="Quantize the float model.",
            )
        self.output_multiplier.copy_(reader.multiplier[0])
        self.output_zero_point.copy_(reader.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """(…, out_features) in x's dtype, or codes in uint8 after an activation.

        Args:
            x: (…, in_features), floating point, or codes in uint8.

        Raises:
            ModelError: Not on a CPU, or a gradient is asked for, of the input or of the bias.
            OperatorError: A number is NaN.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ModelError(
                "an int8 linear layer",
                expected="inference",
                got="an input that takes a gradient",
                remedy="Train for integers with the float model (`integers` in a recipe), and quantize it afterwards.",
            )
        found: Tensor = int8_linear(
            x if x.dtype == torch.uint8 else codes(x, self.multiplier, self.zero_point),
            self.zero_point,
            self.weight_codes,
            self.scale,
            self.bias,
            self.activation or "none",
            self.output_multiplier,
            self.output_zero_point,
        )
        return found.to(x.dtype) if found.is_floating_point() and x.is_floating_point() else found

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes if self.activation is None else f"{sizes}, activation={self.activation}"


class FakeInt8Linear(nn.Linear):
    """The form of ``Int8Linear`` for training: the same codes and weights in float32, rounding straight through.

    Args:
        in_features: Of the input.
        out_features: Of the output.
        bias: Whether one is added.
    """

    multiplier: Tensor
    zero_point: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("multiplier", torch.ones(in_features))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    @torch.no_grad()
    def fill(self, linear: nn.Linear, multiplier: Tensor, zero_point: Tensor) -> None:
        """Take over a float layer's weights, for inputs on a grid."""
        self.load_state_dict({**linear.state_dict(), "multiplier": multiplier, "zero_point": zero_point})

    def forward(self, x: Tensor) -> Tensor:
        """(…, out_features), for x of shape (…, in_features)."""
        codes = _straight_through((x * self.multiplier).clamp(-self.zero_point, 255 - self.zero_point))
        weight, scale = folded(self.weight, self.multiplier)
        return nn.functional.linear(codes, _straight_through(weight) * scale.unsqueeze(1), self.bias)


def folded(weight: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """A weight for inputs times ``multiplier``, in steps of a scale for each output, which brings it to ±127."""
    steps, scale = in_steps(weight / multiplier)
    return steps, scale.squeeze(1)


def _straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


class Int8Embedding(nn.Module):
    """An embedding table in int8 with a scale for each row.

    Args:
        num_embeddings: Rows.
        embedding_dim: Their size.
    """

    weight_codes: Tensor
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("weight_codes", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(num_embeddings, 1))

    @torch.no_grad()
    def fill(self, embedding: nn.Embedding) -> None:
        """Take over a float table's rows."""
        rows, scale = in_steps(embedding.weight)
        self.weight_codes.copy_(rows.round())
        self.scale.copy_(scale)

    def forward(self, indices: Tensor) -> Tensor:
        """(…, embedding_dim) in float32, for integers of shape (…)."""
        return self.weight_codes[indices] * self.scale[indices]

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class FakeInt8Embedding(nn.Embedding):
    """The form of ``Int8Embedding`` for training: the same numbers in float32, rounding straight through."""

    @torch.no_grad()
    def fill(self, embedding: nn.Embedding) -> None:
        """Take over a float table's rows."""
        self.load_state_dict(embedding.state_dict())

    def forward(self, input: Tensor) -> Tensor:
        """(…, embedding_dim), for integers of shape (…)."""
        rows, scale = in_steps(super().forward(input))
        return _straight_through(rows) * scale


def in_steps(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (…, features) in steps of a scale for each, (…, 1), which brings them to ±127."""
    scale = (rows.detach().abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return rows / scale, scale


@dataclass(frozen=True)
class Part:
    """A module that turns into integers.

    Args:
        kind: What of the model it is.
        path: Of the module.
        module: As it is now.
        activation: What a linear layer's output goes through, if that becomes one with the layer.
        reader: The path of the linear layer that reads its codes then.
    """

    kind: Kind
    path: str
    module: Any
    activation: str | None = None
    reader: str | None = None


def parts(model: PreTrainedModel, config: Int8Config) -> Iterator[Part]:
    """Each part that ``config`` turns into integers and is none yet; a layer that gives codes before their reader."""
    names = {module: name for name, module in model.named_modules()}
    for attention in inhibitor_layers(model).values():
        if not isinstance(attention, IntegerInhibitorAttention):
            yield Part("attention", names[attention], attention)
    if config.embeddings != "float":
        rounded = FakeInt8Embedding if config.embeddings == "fake" else ()
        for module in model.base_model.modules():
            if isinstance(module, nn.Embedding) and not isinstance(module, rounded):
                yield Part("embeddings", names[module], module)
    if config.linear != "float":
        done = FakeInt8Linear if config.linear == "fake" else ()
        for layer, feed_forward in zip(layer_modules(model), feed_forward_modules(model), strict=True):
            first, between, second = feed_forward
            activation = ACTIVATIONS.get(type(between))
            for module in layer.modules():
                if isinstance(module, nn.Linear) and not isinstance(module, done):
                    given = (activation, names[second]) if module is first and activation else ()
                    yield Part("linear", names[module], module, *given)
                elif module is between and activation and config.linear == "int8":
                    yield Part("activation", names[module], module)


def empty(part: Part, config: Int8Config) -> nn.Module:
    """The integer part that takes a module's place, of its shape and on its device; attention keeps its parameters."""
    module = part.module
    if part.kind == "activation":  # the linear layer before it has it
        return nn.Identity()
    with torch.device(next(module.parameters()).device):
        match part.kind:
            case "attention":
                made = IntegerInhibitorAttention(module.config, module.heads, module.head_dim, config.attention)
                made.load_state_dict(module.state_dict(), strict=False)
                return made
            case "embeddings":
                if config.embeddings == "fake":
                    return FakeInt8Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
                return Int8Embedding(module.num_embeddings, module.embedding_dim)
        sizes = module.in_features, module.out_features, module.bias is not None
        return FakeInt8Linear(*sizes) if config.linear == "fake" else Int8Linear(*sizes, part.activation)


def attach_int8(model: PreTrainedModel) -> None:
    """Put empty integer parts in the places that ``model.config.int8`` names, if it names any; weights come after.

    Raises:
        ConfigError: What is written there is not an ``Int8Config``.
        ModelError: Another dtype than float32 was asked for: scales must not be rounded.
    """
    values = getattr(model.config, INT8, None)
    if values is None:
        return
    config = Int8Config.parse(values, source=INT8)
    if torch.get_default_dtype() != torch.float32:
        raise ModelError(
            "dtype",
            expected="float32 for what is not int8",
            got=str(torch.get_default_dtype()),
            remedy="Load an int8 model with dtype=torch.float32.",
        )
    for part in list(parts(model, config)):
        model.set_submodule(part.path, empty(part, config))
    freeze(model)


def freeze(model: PreTrainedModel) -> None:
    """Where ``model.config.int8`` has int8 linear layers, which pass no gradient on, train no more than the head."""
    if (getattr(model.config, INT8, None) or {}).get("linear") == INT8:
        model.base_model.requires_grad_(False)


def integer_layers(model: nn.Module) -> dict[int, IntegerInhibitorAttention]:
    """The layers of a model that have integer attention, by index."""
    found = ((index, getattr(module, NAME, None)) for index, module in enumerate(attention_modules(model)))
    return {index: attention for index, attention in found if isinstance(attention, IntegerInhibitorAttention)}
