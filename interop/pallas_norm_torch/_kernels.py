"""Which kernel a call takes: what a program's code depends on, in torch's dtypes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pallas_norm._dtypes import GradientDtypes  # pyright: ignore[reportPrivateUsage]
from pallas_norm._spec import Spec  # pyright: ignore[reportPrivateUsage]
from pallas_norm.plans.hardware import Gpu

from ._validate import dtype_name
from .programs import Program


class Forward(NamedTuple):
    n: int
    x: torch.dtype
    weight: torch.dtype | None
    spec: Spec
    residual: torch.dtype | None
    with_rstd: bool
    strided: bool = False

    def program(self, gpu: Gpu) -> Program:
        dtypes = {"x": self.x, "residual": self.residual, "weight": self.weight}
        outputs = ("y", *(["s"] if self.residual is not None else []), *(["rstd"] if self.with_rstd else []))
        return Program("forward", self.n, _named(dtypes), outputs, self.spec, self.strided, gpu=gpu)


class Quantized(NamedTuple):
    n: int
    x: torch.dtype
    weight: torch.dtype | None
    spec: Spec
    residual: torch.dtype | None
    q: torch.dtype
    group: int  # elements that share a scale that is computed; 0: it is given
    with_y: bool

    def program(self, gpu: Gpu) -> Program:
        scale = None if self.group else torch.float32
        dtypes = {"x": self.x, "residual": self.residual, "weight": self.weight, "scale": scale}
        asked = {"q": True, "scales": self.group, "s": self.residual, "y": self.with_y}
        outputs = tuple(name for name, wanted in asked.items() if wanted)
        form: Any = {"q_dtype": dtype_name(self.q), "group": self.group, "gpu": gpu}
        return Program("quantized", self.n, _named(dtypes), outputs, self.spec, **form)


class Backward(NamedTuple):
    """x is s, in the residual form."""

    n: int
    x: torch.dtype
    weight: torch.dtype | None
    dy: torch.dtype
    spec: Spec
    residual: bool
    with_dweight: bool
    dx: torch.dtype | None = None  # where that is not x's
    dresidual: torch.dtype | None = None  # where that is not dx's

    def program(self, gpu: Gpu) -> Program:
        ds = self.x if self.residual else None
        dtypes = {"x": self.x, "rstd": torch.float32, "dy": self.dy, "weight": self.weight, "ds": ds}
        own = ["dresidual"] if self.dresidual is not None else []
        outputs = ("dx", *own, *(["dweight"] if self.with_dweight else []))
        names = (None if dtype is None else dtype_name(dtype) for dtype in (self.dx, self.dresidual))
        dx_dtypes = GradientDtypes(*names)
        return Program("backward", self.n, _named(dtypes), outputs, self.spec, dx_dtypes=dx_dtypes, gpu=gpu)


class ColumnSum(NamedTuple):
    n: int
    dweight: torch.dtype

    def program(self, gpu: Gpu) -> Program:
        dtypes, dweight = _named({"parts": torch.float32}), dtype_name(self.dweight)
        return Program("column_sum", self.n, dtypes, ("dweight",), Spec(), dweight_dtype=dweight, gpu=gpu)


def _named(dtypes: dict[str, torch.dtype | None]) -> tuple[tuple[str, str], ...]:
    return tuple((name, dtype_name(dtype)) for name, dtype in dtypes.items() if dtype is not None)


AnyKernel = Forward | Quantized | Backward | ColumnSum

_programs: dict[tuple[type, AnyKernel, Gpu], Program] = {}  # tuples of two types may be equal


def program_of(kernel: AnyKernel, gpu: Gpu) -> Program:
    """The one for each, also where threads race for it."""
    key = type(kernel), kernel, gpu
    if (found := _programs.get(key)) is not None:
        return found
    return _programs.setdefault(key, kernel.program(gpu))
