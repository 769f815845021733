"""Linear layers and embeddings in 8 bits, each with the form that trains for it: the same numbers in float32."""

import torch
from torch import Tensor, nn

from inhibitor.errors import ModelError
from inhibitor.ops.int8_linear import codes, int8_linear


class Int8Linear(nn.Module):
    """A linear layer that multiplies unsigned inputs of 8 bits and signed weights of 8 bits, by oneDNN.

    The codes of an input are ``clamp(round(x · multiplier) + zero_point, 0, 255)``, with a multiplier for each feature:
    large features then take no resolution from small ones, and no row depends on its neighbours or its padding.

    With an activation, what comes out are codes, those of the next layer's input: its grid then has one multiplier.

    Args:
        in_features: Of the input.
        out_features: Of the output.
        bias: Whether one is added.
        activation: What the output goes through, by its name in ``ACTIVATIONS`` of ``inhibitor.models.int8``.
        bits: Of the weights.
    """

    multiplier: Tensor
    zero_point: Tensor
    weight_codes: Tensor
    scale: Tensor
    output_multiplier: Tensor | None
    output_zero_point: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, activation: str | None = None, bits: int = 8
    ) -> None:
        super().__init__()
        self.activation, self.bits = activation, bits
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
        weight, scale = folded(linear.weight, multiplier, self.bits)
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
        bits: Of the weights.
    """

    multiplier: Tensor
    zero_point: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int = 8) -> None:
        super().__init__(in_features, out_features, bias)
        self.bits = bits
        self.register_buffer("multiplier", torch.ones(in_features))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    @torch.no_grad()
    def fill(self, linear: nn.Linear, multiplier: Tensor, zero_point: Tensor) -> None:
        """Take over a float layer's weights, for inputs on a grid."""
        self.load_state_dict({**linear.state_dict(), "multiplier": multiplier, "zero_point": zero_point})

    def forward(self, x: Tensor) -> Tensor:
        """(…, out_features), for x of shape (…, in_features)."""
        codes = straight_through((x * self.multiplier).clamp(-self.zero_point, 255 - self.zero_point))
        weight, scale = folded(self.weight, self.multiplier, self.bits)
        return nn.functional.linear(codes, straight_through(weight) * scale.unsqueeze(1), self.bias)


def folded(weight: Tensor, multiplier: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A weight for inputs times ``multiplier``, in steps of a scale for each output that brings it to so many bits."""
    steps, scale = in_steps(weight / multiplier, bits)
    return steps, scale.squeeze(1)


def straight_through(x: Tensor) -> Tensor:
    """The rounded numbers, and gradients passed as if they were not rounded."""
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
        codes, scale = (nn.functional.embedding(indices, table) for table in (self.weight_codes, self.scale))
        return codes * scale

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
        return straight_through(rows) * scale


def in_steps(rows: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Rows (…, features) in steps of a scale for each, (…, 1), which brings them to ±127, or ±63 with 7 bits."""
    scale = (rows.detach().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    return rows / scale, scale
