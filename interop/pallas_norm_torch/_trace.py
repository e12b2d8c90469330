"""One call of a twin's forward, recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ._forms import Match, match
from ._terms import Recorder, Unknown
from ._twin import Twin

Tensor = torch.Tensor


def said(error: Exception) -> str:
    """Its kind, and the first line of what it says; a bare assertion says nothing."""
    line = next(iter(str(error).splitlines()), "")[:80]
    return f"{type(error).__name__} ({line})" if line else type(error).__name__


def run(twin: Twin, x: Tensor, parameters: Mapping[str, Tensor | None], *, training: bool) -> tuple[Recorder, Any]:
    """The recorded call, and its result."""
    twin.set(parameters, training=training)
    recorder = Recorder()
    recorder.know(x, "x", "x")
    for name, parameter in parameters.items():
        if parameter is not None:
            recorder.know(parameter, "parameter", name)
    try:
        with recorder:
            y = twin.forward(x)
    except Unknown:
        raise
    except Exception as error:
        raise Unknown(f"raises {said(error)} when it is traced") from error
    if not isinstance(y, Tensor):
        raise Unknown(f"returns a {type(y).__name__}, not a tensor")
    if id(y) not in recorder.terms or y is x:
        raise Unknown("returns what it was given")
    if y.shape != x.shape:
        raise Unknown(f"returns {tuple(y.shape)} for {tuple(x.shape)}")
    return recorder, y


def shapes(module: nn.Module, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    found = {**vars(module)["_parameters"], **vars(module)["_buffers"]}
    return {name: None if one is None else (tuple(one.shape), dtype) for name, one in found.items()}


def matched(twin: Twin, x: Tensor, *, training: bool = False) -> Match | None:
    """What it computes for this x, without a look at the numbers; None where its own forward raises or does more."""
    parameters = {
        name: None if one is None else nn.Parameter(torch.ones(one[0], dtype=one[1]))
        for name, one in shapes(twin.module, x.dtype).items()
    }
    try:
        recorder, y = run(twin, x, parameters, training=training)
        return match(recorder.terms[id(y)], x.dtype)
    except Unknown:
        return None
