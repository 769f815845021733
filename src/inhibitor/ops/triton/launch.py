"""Launching the kernels of a call: their blocks, their scratch memory, the constants they are compiled for."""

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from inhibitor.ops.masks import Options
from inhibitor.ops.triton.configuration import Configuration, Device, choose, device_of


class Call:
    """What the launches of one pass share.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, key heads, keys, head_dim).
        value: (batch, key heads, keys, value_dim).
        options: Of the operator.
        backward: Whether gradients are wanted, whose tiles are others.
        reach: (heads,), if the result has one feature more.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, options: Options, backward: bool, reach: Tensor | None = None
    ) -> None:
        self.batch, self.heads, self.queries, head_dim = query.shape
        self.key_heads, self.length, value_dim = value.shape[1:]
        self.query, self.key = query, key
        mask = options.attn_mask
        if mask is not None:
            mask = mask.expand(self.batch, self.heads, self.queries, self.length).view(torch.uint8)
        self.mask = query if mask is None else mask  # a pointer that nothing follows
        self.widths = {"HEAD_WIDTH": _width(head_dim), "VALUE_WIDTH": _width(value_dim)}
        self.device: Device = device_of(query.device)
        self.configuration: Configuration = choose(self.device, max(self.widths.values()), backward)
        self.constants: dict[str, Any] = self.widths | {
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "ROWS": self.configuration.rows,
            "KEYS": self.configuration.keys,
            "MASKED": mask is not None,
            "CAUSAL": options.is_causal,
            "BY_ROW": options.is_causal or (mask is not None and mask.stride(2) != 0),
            "SIGNED": options.signed,
            "CENTER": options.center,
            "WHOLE": not query.is_floating_point(),
            # Not a constant, but None is one: without a reach no kernel has it.
            "reaches": None if reach is None else reach.to(torch.float32).contiguous(),
        }

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Launches go to the device of the tensors, whichever is current."""
        device = self.query.device
        return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)

    def means(self) -> tuple[Tensor, Tensor]:
        """Each row's mean distance and how many keys it sees, (batch, heads, queries); unset if not centred."""
        dtype = torch.int32 if self.constants["WHOLE"] else torch.float32
        means, counts = (self.query.new_empty(self.query.shape[:3], dtype=dtype) for _ in range(2))
        if self.constants["CENTER"]:
            tensors = (self.query, self.key, self.mask)
            self.launch("forward", "row_means", (*tensors, means, counts), tensors, ())
        return means, counts

    def launch(
        self,
        module: str,
        name: str,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
    ) -> None:
        """Run a kernel: its tensors, then the strides of those that have some, the results' last."""
        kernel = getattr(importlib.import_module(f"inhibitor.ops.triton.{module}_kernels"), name)
        rows, keys = self.configuration.rows, self.configuration.keys
        if name == "by_keys":
            blocks = self.batch * self.key_heads * -(-self.length // keys)
        else:
            blocks = self.batch * self.heads * -(-self.queries // rows)
        programs = min(blocks, self.device.cores * self.configuration.programs)
        size = scratch(name, self.configuration, self.widths["HEAD_WIDTH"], self.widths["VALUE_WIDTH"])
        memory = torch.empty(programs * size, dtype=torch.float32, device=self.query.device)
        numbers = (self.heads, self.heads // self.key_heads, self.queries, self.length, blocks)
        constants = {name: value for name, value in self.constants.items() if name in kernel.arg_names} | {"SIZE": size}
        kernel[(programs,)](
            *pointers,
            memory,
            *(number for tensor in strided for number in tensor.stride()),
            *(number for tensor in targets for number in tensor.stride()),
            *numbers,
            **constants,
            **self.configuration.options,
        )


def scratch(kernel: str, configuration: Configuration, head: int, value: int) -> int:
    """Floats that one program of a kernel needs besides its registers, for tiles of these widths."""
    rows, keys = configuration.rows, configuration.keys
    return {
        "row_means": (rows + keys) * head,
        "forward": (rows + keys) * head + 2 * keys * value + rows * keys,
        "by_rows": 2 * (rows + keys) * head + (rows + 2 * keys) * value + 2 * rows * keys,
        "by_keys": 2 * (rows + keys) * head + (2 * rows + 3 * keys) * value + 2 * rows * keys,
    }[kernel]


def _width(features: int) -> int:
    """The power of two that holds the features; Triton's tiles have no other sizes."""
    return max(16, 1 << (features - 1).bit_length())
