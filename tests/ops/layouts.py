"""The same numbers laid out otherwise in memory, and results compared bit by bit."""

from collections.abc import Callable

import torch

from tests.ops.cases import Arguments, Case, arguments, relative_error


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    """The names whose tensors are not bit-equal."""
    assert found.keys() == expected.keys()
    return {name for name in expected if not torch.equal(found[name], expected[name])}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Bit-equal, name by name."""
    return different(found, expected) == set()


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Heads and lengths swapped in memory, as projections leave them."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def features_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT


def step_two(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*tensor.shape[:2], 2 * tensor.shape[2], 2 * tensor.shape[3]), torch.nan, dtype=tensor.dtype)
    wide[:, :, ::2, 1::2] = tensor
    return wide[:, :, ::2, 1::2]


def offset_by_seven(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.cat([torch.full((7,), torch.nan, dtype=tensor.dtype), tensor.flatten()])
    return flat[7:].view(tensor.shape)


def batch_of_stride_zero(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand(tensor.shape)


def heads_of_stride_zero(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :1].expand(tensor.shape)


def length_of_stride_zero(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :, :1].expand(tensor.shape)


def sliding_windows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows that overlap but for one number: two dimensions of stride 1."""
    _, _, length, features = tensor.shape
    return tensor.flatten(2)[..., : length + features - 1].unfold(2, features, 1)


LAYOUTS = [
    transposed,
    features_first,
    step_two,
    offset_by_seven,
    batch_of_stride_zero,
    heads_of_stride_zero,
    length_of_stride_zero,
    sliding_windows,
]


def beyond_two_to_the_31st(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy of (1, 1, 3, features) whose last row begins ``offset`` elements into its storage.

    It takes 4 GiB or more of address space, of which a few pages are touched.
    """
    vast = torch.empty(offset + tensor.shape[3] + 4, dtype=tensor.dtype)
    far = vast.as_strided(tensor.shape, (0, 0, offset // 2, 1), offset - 2 * (offset // 2))
    return far.copy_(tensor)


def check_strides(case: Case, layout: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, backend: str) -> None:
    """Tensors laid out otherwise give the same bits, and none is written to."""
    given, grad = arguments(case, dtype)
    mask = layout(given.options["attn_mask"]) if layout is not step_two else given.options["attn_mask"]
    options = given.options | {"attn_mask": mask}
    strided = {name: layout(tensor) if tensor.dim() == 4 else tensor for name, tensor in given.tensors.items()}
    assert layout is offset_by_seven or not strided["query"].is_contiguous()
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in strided.items()}
    grad = layout(grad)
    inputs = [*leaves.values(), mask, grad]
    before = [(tensor.detach().clone(), tensor._version) for tensor in inputs]

    output = Arguments(leaves, options)(backend)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)

    for tensor, (values, version) in zip(inputs, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, values)
    dense = Arguments({name: tensor.contiguous() for name, tensor in strided.items()}, options)
    dense.options["attn_mask"] = mask.contiguous()
    expected = dense.with_gradients(grad.contiguous(), backend)
    found = {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}
    # η and ρ scale the sum outside the operator, and PyTorch sums their gradients in the order of memory.
    outside = {"eta", "length_exponent"}
    assert different(found, expected) <= outside
    assert all(relative_error(found[name], expected[name].double()) <= 1e-6 for name in outside)
