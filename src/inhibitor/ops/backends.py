"""Which backend serves a call: chosen in the open, and one that was asked for by name never replaced."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from inhibitor.errors import OperatorError
from inhibitor.ops import cpu, triton

Backend = Literal["auto", "cpu", "triton", "torch", "reference"]
NOT_INSTALLED = "the package was installed without its native kernels"
_NO_TRITON = "Triton is not installed"

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Let ``torch.compile`` run a function while it traces, and keep the result.

    It does what ``torch.compiler.assume_constant_result`` does, without importing the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class BackendChoice:
    """What ``backend="auto"`` uses, and why."""

    name: str
    reason: str


def which_backend(query: Tensor | None = None, value: Tensor | None = None) -> BackendChoice:
    """Say which backend ``auto`` picks for tensors like these (default: float32 on the CPU, head_dim 64), and why.

    Example:
        >>> which_backend(torch.zeros(1, 1, 8, 64, dtype=torch.float64))
        BackendChoice(name='torch', reason='the native kernels do not take torch.float64')
    """
    query = torch.empty(1, 1, 1, 64, device="cpu") if query is None else query
    value = query if value is None else value
    name, missing = _pick(query, value)
    reason = f"native kernels for {cpu.instruction_set()}" if name == "cpu" else "fused kernels for GPUs"
    return BackendChoice(name, missing or reason)


def resolve(backend: Backend, query: Tensor, value: Tensor) -> str:
    """The backend that runs; one that was asked for by name is never replaced."""
    if backend == "torch":
        return backend
    if backend == "auto":
        name, missing = _pick(query, value)
        if missing == NOT_INSTALLED:
            _say_slow()
        return name
    missing = _WHY_NOT[backend](query, value)
    if missing:
        raise unavailable(backend, missing)
    return backend


def _pick(query: Tensor, value: Tensor) -> tuple[str, str]:
    """The backend of ``auto``, and what keeps a faster one from such tensors; empty if nothing does."""
    name = "triton" if query.device.type in triton.DEVICES else "cpu"
    missing = _WHY_NOT[name](query, value)
    return "torch" if missing else name, missing


def _why_not_cpu(query: Tensor, value: Tensor) -> str:
    """What keeps the native kernels from such tensors; empty if nothing does."""
    if query.device.type != "cpu":
        return f"there is no native kernel for {query.device.type}"
    return _why_not(query, value, cpu, "native") or ("" if cpu.INSTALLED else NOT_INSTALLED)


def _why_not_triton(query: Tensor, value: Tensor) -> str:
    """What keeps the Triton kernels from such tensors; empty if nothing does."""
    return why_no_triton(query.device) or _why_not(query, value, triton, "Triton")


def why_no_triton(device: torch.device) -> str:
    """What keeps Triton from a device; empty if nothing does."""
    if not triton.INSTALLED:
        return _NO_TRITON
    if device.type not in triton.DEVICES and not (device.type == "cpu" and _interpreted()):
        return f"there is no Triton kernel for {device.type}"
    return ""


def _why_not(query: Tensor, value: Tensor, backend: Any, name: str) -> str:
    if query.dtype not in backend.DTYPES:
        return f"the {name} kernels do not take {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > backend.LARGEST_DIM:
        return f"the {name} kernels take head_dim and value_dim up to {backend.LARGEST_DIM}"
    return ""


@constant_in_graphs
def _interpreted() -> bool:
    return triton.interpreted()


_WHY_NOT = {"cpu": _why_not_cpu, "triton": _why_not_triton}


def unavailable(backend: str, missing: str) -> OperatorError:
    """The error for a backend that was asked for by name and cannot serve the call."""
    return OperatorError(
        "backend",
        expected=f'tensors and an installation that "{backend}" can serve',
        got=missing,
        remedy={NOT_INSTALLED: cpu.INSTALL, _NO_TRITON: "pip install 'inhibitor-attention[triton]'."}.get(
            missing, 'Pass backend="auto".'
        ),
    )


@constant_in_graphs
def _say_slow() -> None:
    _warn_slow()


@functools.cache
def _warn_slow() -> None:
    warnings.warn(f"inhibitor_attention takes the slow way on the CPU: {NOT_INSTALLED}. {cpu.INSTALL}", stacklevel=5)
