"""Which kernel a call takes: what a program's code depends on, in torch's dtypes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pallas_norm._dtypes import GradientDtypes  # pyright: ignore[reportPrivateUsage]
from pallas_norm._spec import Spec  # pyright: ignore[reportPrivateUsage]
from pallas_norm.gated_reference import Form
from pallas_norm.plans.hardware import Gpu

from ._options import dtypes
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
    few: bool = False  # the schedule for few rows

    def program(self, gpu: Gpu) -> Program:
        dtypes = {"x": self.x, "residual": self.residual, "weight": self.weight}
        outputs = ("y", *(["s"] if self.residual is not None else []), *(["rstd"] if self.with_rstd else []))
        return Program("forward", self.n, _named(dtypes), outputs, self.spec, self.strided, gpu=gpu, few=self.few)


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


class Rope(NamedTuple):
    """Of q and k of one dtype, whose weights have one too."""

    n: int
    q: torch.dtype
    weight: torch.dtype | None
    spec: Spec

    def program(self, gpu: Gpu) -> Program:
        y = dtypes(self.spec, self.q, None, self.weight).y
        given = {"q": self.q, "k": self.q, "cos": y, "sin": y, "q_weight": self.weight, "k_weight": self.weight}
        return Program("rope", self.n, _named(given), ("q_out", "k_out"), self.spec, gpu=gpu)


class RopeBackward(NamedTuple):
    """As Rope."""

    n: int
    q: torch.dtype
    weight: torch.dtype | None
    spec: Spec

    def program(self, gpu: Gpu) -> Program:
        y = dtypes(self.spec, self.q, None, self.weight).y
        given = {"q": self.q, "k": self.q, "cos": y, "sin": y, "dq_out": y, "dk_out": y}
        given |= {"q_weight": self.weight, "k_weight": self.weight}
        dweights = () if self.weight is None else ("q_dweight", "k_dweight")
        return Program("rope_backward", self.n, _named(given), ("dq", "dk", *dweights), self.spec, gpu=gpu)


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


class Gated(NamedTuple):
    """n: of x; a row of the kernel is a group of form.group elements."""

    n: int
    x: torch.dtype
    gate: torch.dtype
    weight: torch.dtype | None
    spec: Spec
    form: Form
    with_rstd: bool
    strided: bool = False

    def program(self, gpu: Gpu) -> Program:
        dtypes = {"x": self.x, "gate": self.gate, "weight": self.weight}
        outputs = ("y", "rstd") if self.with_rstd else ("y",)
        options: Any = {"form": self.form, "groups": self.n // self.form.group, "gpu": gpu, "strided": self.strided}
        return Program("gated", self.form.group, _named(dtypes), outputs, self.spec, **options)


class GatedBackward(NamedTuple):
    """x is also the gate's dtype."""

    n: int
    x: torch.dtype
    weight: torch.dtype | None
    dy: torch.dtype
    spec: Spec
    form: Form
    with_dweight: bool

    def program(self, gpu: Gpu) -> Program:
        dtypes = {"x": self.x, "gate": self.x, "rstd": torch.float32, "dy": self.dy, "weight": self.weight}
        outputs = ("dx", "dgate", "dweight") if self.with_dweight else ("dx", "dgate")
        options: Any = {"form": self.form, "groups": self.n // self.form.group, "gpu": gpu}
        return Program("gated_backward", self.form.group, _named(dtypes), outputs, self.spec, **options)


class ColumnSum(NamedTuple):
    n: int
    dweight: torch.dtype

    def program(self, gpu: Gpu) -> Program:
        dtypes, dweight = _named({"parts": torch.float32}), dtype_name(self.dweight)
        return Program("column_sum", self.n, dtypes, ("dweight",), Spec(), dweight_dtype=dweight, gpu=gpu)


def _named(dtypes: dict[str, torch.dtype | None]) -> tuple[tuple[str, str], ...]:
    return tuple((name, dtype_name(dtype)) for name, dtype in dtypes.items() if dtype is not None)


AnyKernel = Forward | Quantized | Rope | RopeBackward | Gated | GatedBackward | Backward | ColumnSum

_programs: dict[tuple[type, AnyKernel, Gpu], Program] = {}  # tuples of two types may be equal


def program_of(kernel: AnyKernel, gpu: Gpu) -> Program:
    """The one for each, also where threads race for it."""
    key = type(kernel), kernel, gpu
    if (found := _programs.get(key)) is not None:
        return found
    return _programs.setdefault(key, kernel.program(gpu))
