"""What a twin computes with sizes that are not known, on CUDA: where a branch on a shape or on the device shows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from . import _proof, _purity
from ._fake_cuda import fake_input, may_be_cuda
from ._forms import Match, match
from ._terms import Unknown
from ._trace import matched, run, shapes
from ._twin import Twin


class Asked(NamedTuple):
    """What a run with unknown sizes is made for."""

    n: int
    dtype: torch.dtype
    rank: int = 3
    any_columns: bool = False


def _for_any_rows(twin: Twin, asked: Asked, device: str) -> Match:
    """What it computes on a fake device, with as many rows as may be."""
    n, dtype, rank, any_columns = asked
    with fake_input(n, dtype, device, rank, any_columns=any_columns) as (x, branches), torch.no_grad():
        parameters = {
            name: None if one is None else nn.Parameter(torch.empty(one[0], dtype=one[1], device=device))
            for name, one in shapes(twin.module, dtype).items()
        }
        found = set[Match]()
        for training in (False, True):
            recorder, y = run(twin, x, parameters, training=training)
            found.add(match(recorder.terms[id(y)], dtype))
    if asked_of := branches():
        raise Unknown(f"branches on its input's shape: {asked_of[-1]}")
    if len(found) > 1:
        raise Unknown("computes something else in training")
    return found.pop()


def elsewhere(twin: Twin, asked: Asked) -> Match:
    """On CUDA, as far as can be known without one."""
    if may_be_cuda():
        try:
            return _for_any_rows(twin, asked, "cuda")
        except Unknown as error:
            if torch.cuda.is_available() or not isinstance(error.__cause__, RuntimeError):
                raise
    _purity.check_devices(type(twin.module))  # some operators ask a device guard of CUDA, which is not there
    return _for_any_rows(twin, asked, "cpu")


def _ranks(twin: Twin) -> list[int]:
    """Those to look at: without a branch each rank is as any other, and one takes a fifth of the time."""
    return sorted(twin.ranks if _purity.may_branch(type(twin.module)) else {3})


def same_for_any_shape(twin: Twin, n: int, dtype: torch.dtype, proved: Match) -> None:
    """Raises Unknown where another number of rows, another rank or a CUDA device changes it."""
    for rank in _ranks(twin):
        if elsewhere(twin, Asked(n, dtype, rank)) != proved:
            raise Unknown("computes something else on CUDA")
    if not _purity.may_branch(type(twin.module)):
        return
    for x in _proof.with_axes_of_one(torch.ones(16, n, dtype=dtype)):
        for training in (False, True):
            if x.dim() not in twin.ranks or (found := matched(twin, x, training=training)) == proved:
                continue
            if found is not None:
                raise Unknown(f"computes something else for {tuple(x.shape)}")
            twin.ranks.discard(x.dim())  # its own forward raises there, or does more


def same_for_any_columns(twin: Twin, n: int, dtype: torch.dtype, proved: Match) -> bool:
    """Whether rows of any length are treated alike; n is an example of that."""
    return all(elsewhere(twin, Asked(n, dtype, rank, any_columns=True)) == proved for rank in _ranks(twin))
