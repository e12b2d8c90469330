"""A tensor on a CUDA device that need not exist, with row counts that are not known, and autocast there."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


def may_be_cuda() -> bool:
    """Whether a fake tensor on CUDA leaves the GPUs alone: torch makes a context for it where it has made none yet."""
    return torch.cuda.is_initialized() or not torch.cuda.is_available()


EXAMPLES = (5, 7, 11, 13)  # of row counts, no two alike: torch takes equal ones for one


@contextlib.contextmanager
def fake_input(
    n: int, dtype: torch.dtype, device: str, rank: int, *, any_columns: bool
) -> Generator[tuple[torch.Tensor, Callable[[], list[str]]]]:
    """(x, branches): x of shape [any, ..., n], or with any number of columns, and what was asked of those since."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    last = DimDynamic.DYNAMIC if any_columns else DimDynamic.STATIC
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[*[DimDynamic.DYNAMIC] * (rank - 1), last])
    example = mode.from_tensor(torch.empty(*EXAMPLES[: rank - 1], n, dtype=dtype), symbolic_context=dynamic)
    with mode:
        x = torch.empty(example.shape, dtype=dtype, device=device)
        before = len(environment.guards)
        yield x, lambda: [str(one.expr) for one in environment.guards[before:]]


@contextlib.contextmanager
def autocast(*, on: bool) -> Generator[None]:
    """As torch.autocast("cuda", enabled=on), which warns and does nothing where there is no CUDA."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", on)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
        torch.clear_autocast_cache()
