"""The native kernels: C++ for float32, bfloat16 and float16 on the CPU, in PyTorch's own threads.

The library is built without a header of PyTorch's and loaded with ctypes, which releases the interpreter lock during a
call. One build holds kernels for several instruction sets; the best that the processor has is taken at load. The
mathematics is in docs/operator.md, the code in csrc/.
"""

import ctypes
import importlib.util
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from inhibitor.errors import OperatorError, suggestion
from inhibitor.ops.blocked import Options

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LARGEST_DIM = 256  # of head_dim and value_dim
_TORCH_LIBRARIES = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}
_PROBLEM = struct.Struct("=7q q 3q d 5q 5q 5q 5q 3q 5q 5q 5q 5q 5q 3q")  # csrc/problem.h
_NOTHING = (0, 0, 0, 0, 0)
INSTALL = (
    "Install a wheel, or a C++ compiler and then the package again: "
    "pip install --force-reinstall --no-deps --no-cache-dir inhibitor-attention."
)


def _load() -> ctypes.CDLL | None:
    """The library with its kernels chosen, or None where the package was installed without."""
    spec = importlib.util.find_spec("inhibitor.ops._kernels")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    check_layout(library, "inhibitor_problem_bytes", _PROBLEM)
    for function in (library.inhibitor_forward, library.inhibitor_backward):
        function.restype = ctypes.c_int32
        function.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    torch_library = Path(torch.__file__).parent / "lib" / _TORCH_LIBRARIES.get(sys.platform, "libtorch_cpu.so")
    threads = ctypes.CDLL(str(torch_library)).torch_parallel_for  # PyTorch's stable C interface, 2.10 and newer
    library.inhibitor_start(ctypes.cast(threads, ctypes.c_void_p))
    return library


def check_layout(library: ctypes.CDLL, function: str, problem: struct.Struct) -> None:
    """Refuse a library that was built from other sources: it would read the memory that a call names as another's.

    Raises:
        OperatorError: What the function says a problem takes is not what is packed here.
    """
    known = hasattr(library, function)
    size = int(getattr(library, function)()) if known else 0
    if size != problem.size:
        raise OperatorError(
            "native kernels",
            expected=f"a library that takes problems of {problem.size} bytes",
            got=str(size) if known else "one that does not say",
            remedy=INSTALL,
        )


_LIBRARY = _load()
INSTALLED = _LIBRARY is not None


class InstructionSets:
    """The instruction sets of an operator's kernels; the float and the integer operator choose apart.

    Args:
        library: Gives the library, or None where the package was installed without; asked anew in every call.
        prefix: What the names of the operator's functions in it begin with.
    """

    def __init__(self, library: Callable[[], ctypes.CDLL | None], prefix: str) -> None:
        self._library, self._prefix = library, prefix

    def available(self) -> tuple[str, ...]:
        """What this build and this processor can run, best first; empty where there are no kernels.

        Example:
            >>> from inhibitor.ops import cpu, integer_cpu
            >>> set(cpu.instruction_sets()) <= {"avx512", "avx2", "portable"}
            True
            >>> set(integer_cpu.instruction_sets()) <= {"avx512vnni", "avx512", "avx2", "portable"}
            True
        """
        return tuple((self._ask("available") or "").split())

    def current(self) -> str | None:
        """The instruction set in use, None where there are no kernels."""
        return self._ask("choose", None)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run with another instruction set, for tests and benchmarks; of the whole process, not of one thread.

        Raises:
            OperatorError: The build or the processor does not have it.
        """
        known, before = self.available(), self.current()
        if before is None or name not in known:
            raise OperatorError(
                "instruction set",
                expected="one of " + (", ".join(known) or "none: no native kernels are installed"),
                got=repr(name),
                remedy=suggestion(name, known),
            )
        self._ask("choose", name.encode())
        try:
            yield
        finally:
            self._ask("choose", before.encode())

    def _ask(self, function: str, *arguments: bytes | None) -> str | None:
        library = self._library()
        if library is None:
            return None
        ask = getattr(library, f"{self._prefix}_{function}")
        ask.restype = ctypes.c_char_p
        return str(ask(*arguments).decode())


_SETS = InstructionSets(lambda: _LIBRARY, "inhibitor")
instruction_sets, instruction_set, using = _SETS.available, _SETS.current, _SETS.using


def empty_result(
    query: Tensor, value_dim: int, reach: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A result to be written: (batch, heads, queries, value_dim), in memory with the heads of a query side by side.

    With a reach there is one feature more.

    So lies what ``scaled_dot_product_attention`` returns, and what follows in a model can be a view of it.
    """
    batch, heads, queries, _ = query.shape
    features = value_dim + (reach is not None)
    return query.new_empty((batch, queries, heads, features), dtype=dtype).transpose(1, 2)


def empty_gradient(tensor: Tensor) -> Tensor:
    """A gradient to be written, in memory as the tensor itself lies, unless its features would not lie side by side."""
    made = torch.empty_like(tensor)
    return made if made.stride(3) == 1 else tensor.new_empty(tensor.shape)


def forward(
    query: Tensor, key: Tensor, value: Tensor, gamma: Tensor, delta: Tensor, reach: Tensor | None, options: Options
) -> Tensor:
    """Sums of inhibited values in float32, before η and the length exponent: ``blocked.forward``'s arguments."""
    output = empty_result(query, value.shape[3], reach)
    if output.numel() == 0 or key.shape[2] == 0:
        return output.zero_()
    _call("inhibitor_forward", query, key, value, (gamma, delta, reach), options, strided(output))
    return output


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    delta: Tensor,
    reach: Tensor | None,
    options: Options,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, γ, δ and τ: ``blocked.backward``'s arguments."""
    results = tuple(empty_gradient(tensor) for tensor in (query, key, value))
    heads = (query.shape[1], query.shape[1], 0 if reach is None else query.shape[1])
    sums = tuple(torch.empty(size, dtype=torch.float32, device="cpu") for size in heads)
    if 0 in (*query.shape[:3], *key.shape[:3]):
        for tensor in (*results, *sums):
            tensor.zero_()
    else:
        grad = grad.to(torch.float32)
        gradients = (number for tensor in results for number in strided(tensor))
        targets = (*strided(grad), *gradients, *(tensor.data_ptr() for tensor in sums))
        _call("inhibitor_backward", query, key, value, (gamma, delta, reach), options, _NOTHING, targets)
    dtypes = (gamma.dtype, delta.dtype, gamma.dtype if reach is None else reach.dtype)
    return (*results, *(tensor.to(dtype) for tensor, dtype in zip(sums, dtypes, strict=True)))


def strided(tensor: Tensor) -> tuple[int, ...]:
    """A tensor as csrc/problem.h has it: where it lies, and its strides."""
    return (tensor.data_ptr(), *tensor.stride())


def _call(
    function: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: tuple[Tensor | None, ...],
    options: Options,
    output: tuple[int, ...],
    backward: tuple[int, ...] = (0,) * 23,
) -> None:
    batch, heads, queries, head_dim = query.shape
    key_heads, keys, value_dim = value.shape[1:]
    mask = options.attn_mask
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    lines = [None if line is None else line.to(torch.float32).contiguous() for line in parameters]
    problem = _PROBLEM.pack(
        *(batch, heads, key_heads, queries, keys, head_dim, value_dim, DTYPES[query.dtype]),
        *(options.is_causal, options.center, options.signed, options.scale),
        *(*strided(query), *strided(key), *strided(value), *(_NOTHING if mask is None else strided(mask))),
        *(*(0 if line is None else line.data_ptr() for line in lines), *output, *backward),
    )
    failed = getattr(_LIBRARY, function)(problem, torch.get_num_threads())
    if failed:
        raise MemoryError(f"inhibitor_attention: no memory for {queries} queries and {keys} keys in {heads} heads")
