"""Every kernel by the direct launch: row counts and strides that the launch decides, in place and into `out`.

A part of `every_kernel`, for which torch must be installed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

import pallas_norm_torch
from pallas_norm.kernels import dweight_sum
from pallas_norm.kernels.grid import counts_of
from pallas_norm_torch import _library, direct, prepared_gradient
from tests import oracle
from tests.gpu_proof import kernels, operands
from tests.gpu_proof.kernels import Backward, Forward
from tests.oracle import DTYPES, Array

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RAW = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NAMES = {dtype: name for name, dtype in TORCH.items()}
ROWS = (133, 7, 1)  # of one kernel


def tensor(values: Array) -> torch.Tensor:
    """The bits, on the device by one copy: NumPy's bfloat16 is none that torch knows."""
    name = next(name for name, dtype in DTYPES.items() if dtype == values.dtype)
    raw = torch.from_numpy(np.ascontiguousarray(values).view(RAW[values.dtype.itemsize][0]))
    return raw.view(TORCH[name]).to(DEVICE, copy=True)


def array(values: torch.Tensor) -> Array:
    raw = values.detach().contiguous().view(RAW[values.element_size()][1])
    return raw.cpu().numpy().view(DTYPES[NAMES[values.dtype]])


def require_launch(x: torch.Tensor) -> None:
    if x.is_cuda and (reason := direct.unavailable(x.shape[-1], x.get_device(), x.dtype)) is not None:
        raise AssertionError(f"not launched: {reason}")


def forward(case: Forward) -> None:
    """Of more rows than are few, and of these: a call takes the kernel of its rows."""
    most = max(ROWS[0] if case.plan.block > 1 else ROWS[1], case.most_few + 1)
    given = operands.forward(case, most)
    tensors = {name: tensor(value) for name, value in given.items()}
    x, residual, weight = (tensors.get(name) for name in ("x", "residual", "weight"))
    require_launch(x)
    y, s, rstd = _library.forward(x, residual, weight, operands.SPEC, with_rstd=True)
    found = {"y": array(y), "s": None if s is None else array(s)}
    operands.check_forward(case, given, found, array(rstd), by_torch=not x.is_cuda)
    # On XLA's path a row's last bits may depend on the number of rows.
    for rows in (most, *(count for count in ROWS if count < most and x.is_cuda)):
        if case.residual:
            found = pallas_norm_torch.add_rms_norm(x[:rows], residual[:rows], weight, operands.EPS)
        else:
            found = (pallas_norm_torch.rms_norm(x[:rows], weight, operands.EPS),)
        for result, expected in zip(found, (y, s), strict=False):
            oracle.assert_same(array(result), array(expected)[:rows])


def places(case: Forward) -> None:
    """Into `out`, in place, and rows at strides: some heads of a fused projection, read and written where they lie."""
    tokens = max(4, case.most_few // 3 + 1)
    given = operands.forward(case, 3 * tokens)
    x, weight = tensor(given["x"]), tensor(given["weight"])
    require_launch(x)
    expected = array(pallas_norm_torch.rms_norm(x, weight, operands.EPS))
    other = tensor(np.zeros_like(given["x"]))
    pallas_norm_torch.rms_norm(x, weight, operands.EPS, out=other)
    oracle.assert_same(array(other), expected)
    pallas_norm_torch.rms_norm(x, weight, operands.EPS, out=x)
    oracle.assert_same(array(x), expected)
    fused = np.zeros((tokens, 5, case.n), given["x"].dtype)
    fused[:, 1:4] = given["x"].reshape(tokens, 3, case.n)
    heads, expected = tensor(fused)[:, 1:4], expected.reshape(tokens, 3, case.n)
    oracle.assert_same(array(pallas_norm_torch.rms_norm(heads, weight, operands.EPS)), expected)
    pallas_norm_torch.rms_norm(heads, weight, operands.EPS, out=heads)
    oracle.assert_same(array(heads), expected)


def rows_with_parts(plan: Any) -> int:
    """So many that the direct launch's column sum has a tile of parts to add, or all that there ever are of long rows;
    some of rows left over."""
    parts = min(dweight_sum.TILE, plan.programs)
    left = min(plan.block - 1, parts - 1)
    rows = plan.block * max(1, parts - left) + left
    assert counts_of(plan, rows)[2] >= parts
    return rows


def _unwritten(x: torch.Tensor, count: int, n: int) -> torch.Tensor:
    return torch.full((count, n), math.nan, dtype=torch.float32).to(x.device, copy=True)


@contextlib.contextmanager
def unwritten_parts() -> Iterator[None]:
    """What no program writes of the parts of dweight is NaN, copied from the host.

    The column sum reads a whole tile, also of the 15 or 30 parts of long rows, and leaves out what is no part. Nothing
    has written those in a launch: initcheck told of every element that the sum read there, millions of them, and never
    came to its end.
    """
    with mock.patch.object(prepared_gradient, "unwritten", _unwritten):
        yield


def backward(case: Backward) -> None:
    with_dweight = case.dweight and case.weight
    most = rows_with_parts(case.plan) if with_dweight else 7
    given, dx, terms = operands.backward(case, most)
    tensors = {name: tensor(value) for name, value in given.items()}
    x, weight, rstd, dy, ds = (tensors.get(name) for name in ("x", "weight", "rstd", "dy", "ds"))
    require_launch(x)
    with unwritten_parts():
        found, dweight = _library.backward(x, weight, rstd, dy, ds, operands.SPEC, with_dweight=with_dweight)
    operands.assert_equal(array(found), dx)
    if with_dweight:
        operands.assert_equal(array(dweight), terms.sum(axis=0).astype(given["weight"].dtype))


def every_case() -> list[tuple[str, Callable[[], None]]]:
    ways: list[tuple[str, Callable[[Any], None], list[Any]]] = [
        ("launch", forward, [case for case in kernels.forwards() if not case.few]),
        ("launch at places", places, kernels.at_places()),
        ("launch", backward, kernels.backwards()),
    ]
    return [(f"{way}: {case}", functools.partial(run, case)) for way, run, cases in ways for case in cases]
