"""Tensors of any layout, dtype and kind, for the fuzz tests to draw from; and what they compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from tests.anything import ANYTHING
from tests.interop.cases import DTYPES

Tensor = torch.Tensor
DOCUMENTED = (TypeError, ValueError, NotImplementedError)
N = 8
SHAPES = ((N,), (3, N), (2, 2, N), (0, N))  # each compiles, so they are few
EVERY_DTYPE = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
WARNINGS = (  # torch's, about kinds of tensors that are here to be refused
    "ignore:.*(nested|quantize|[Ss]parse|ComplexHalf|BComplex32|prototype).*:UserWarning",
    "ignore:.*quantiz.*:DeprecationWarning",
)


def filled(elements: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(elements, generator=generator).to(dtype)


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A view into a storage of its own: sliced, transposed, expanded, overlapping, at any offset."""
    buffer = filled(512, dtype, draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(("plain", "as_strided", "transposed", "expanded")))
    offset = draw(st.sampled_from((0, 0, 1, 7, 64)))
    if kind == "as_strided":
        return buffer.as_strided(shape, [draw(st.sampled_from((0, 1, 2, 5, N, 3 * N))) for _ in shape], offset)
    size = int(np.prod(shape))
    plain = buffer[offset : offset + size]
    if kind == "transposed":
        return plain.view(shape[::-1]).permute(*range(len(shape))[::-1])
    if kind == "expanded":
        return buffer[offset : offset + N].expand(shape)
    return plain.view(shape)


def odd_tensors() -> dict[str, Callable[[], Any]]:
    """Those that have no plain memory, or of which it is not to be taken as it is."""
    x = torch.ones(3, N)
    return {
        "meta": lambda: x.to("meta"),
        "sparse": x.to_sparse,
        "csr": x.to_sparse_csr,
        "bsr": lambda: torch.ones(4, N).to_sparse_bsr((2, 2)),
        "mkldnn": x.to_mkldnn,
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "conjugated": lambda: torch.ones(3, N, dtype=torch.complex64).conj(),
        "negated": lambda: torch.ones(3, N, dtype=torch.complex64).conj().imag,
        "nested": lambda: torch.nested.nested_tensor([x[0]]),
        "jagged": lambda: torch.nested.nested_tensor([x[0], x[0, :3]], layout=torch.jagged),
        "zeros without memory": lambda: torch._efficientzerotensor(3, N),
        "uninitialised": torch.nn.UninitializedParameter,
        "no axis": lambda: torch.tensor(1.0),
        "empty rows": lambda: x[:, :0],
    }


ODD = st.sampled_from(sorted(odd_tensors())).map(lambda name: odd_tensors()[name]())
OF_ANY_DTYPE = st.sampled_from(EVERY_DTYPE).map(lambda dtype: torch.empty(3, N, dtype=dtype))
NO_OPERAND = ODD | ANYTHING | OF_ANY_DTYPE.filter(lambda tensor: tensor.dtype not in DTYPES)


def memory(value: Any) -> Any:
    """All bytes of a tensor's storage, those between its elements too."""
    if type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu":
        if not torch._C._has_storage(value) or value._is_zerotensor():
            return None
        return bytes(value.untyped_storage().tolist())
    return None


def plain(value: Any) -> Any:
    """A contiguous, aligned copy that requires no gradient."""
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Exception | None]:
    """(result, None) or (None, a documented error); any other goes through."""
    try:
        return function(*arguments, **options), None
    except DOCUMENTED as error:
        if type(error) not in DOCUMENTED:
            raise
        return None, error
