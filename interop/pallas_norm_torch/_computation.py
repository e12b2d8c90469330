"""A norm recognised by what it computes: its forward traced into a term, matched with a form, and proved.

Traced on a twin of the module with parameters of its own, for each dtype of x and the weight; as a fake tensor on CUDA
with unknown row counts, where a branch on data, on a shape or on the device shows; and on a CPU with real inputs, where
the result must equal that of our formula bit for bit, given the module's own rstd. Other dtypes stay its own forward's.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import nn

from . import _proof, _purity
from ._fake_cuda import autocast, fake_input, may_be_cuda
from ._forms import Computation, Form, Path, match
from ._launches import DTYPES
from ._terms import Recorder, Term, Unknown
from ._twin import Twin

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SAME_DTYPES = ((BF16, BF16), (F16, F16), (F32, F32))
Dtypes = tuple[torch.dtype, torch.dtype]  # of x and of the weight


def _run(twin: Twin, x: Tensor, parameters: Mapping[str, Tensor | None], *, training: bool) -> tuple[Recorder, Any]:
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
        raise Unknown(f"raises {type(error).__name__} when it is traced: {str(error).splitlines()[0][:80]}") from error
    if not isinstance(y, Tensor):
        raise Unknown(f"returns a {type(y).__name__}, not a tensor")
    if id(y) not in recorder.terms or y is x:
        raise Unknown("returns what it was given")
    if y.shape != x.shape:
        raise Unknown(f"returns {tuple(y.shape)} for {tuple(x.shape)}")
    return recorder, y


def _for_any_rows(twin: Twin, n: int, x_dtype: torch.dtype, device: str) -> Term:
    """The term on a fake device, with as many rows as may be."""
    with fake_input(n, x_dtype, device) as (x, branches), torch.no_grad():
        parameters = {
            name: None if one is None else nn.Parameter(torch.empty(one[0], dtype=one[1], device=device))
            for name, one in _shapes(twin.module, x_dtype).items()
        }
        recorder, y = _run(twin, x, parameters, training=False)
    if found := branches():
        raise Unknown(f"branches on its input's shape: {found[-1]}")
    return recorder.terms[id(y)]


def _elsewhere(twin: Twin, n: int, x_dtype: torch.dtype) -> Term:
    """On CUDA, as far as can be known without one."""
    if may_be_cuda():
        try:
            return _for_any_rows(twin, n, x_dtype, "cuda")
        except Unknown as error:
            if torch.cuda.is_available() or not isinstance(error.__cause__, RuntimeError):
                raise
    _purity.check_devices(type(twin.module))  # some operators ask a device guard of CUDA, which is not there
    return _for_any_rows(twin, n, x_dtype, "cpu")


def _shapes(module: nn.Module, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    found = {**vars(module)["_parameters"], **vars(module)["_buffers"]}
    return {name: None if one is None else (tuple(one.shape), dtype) for name, one in found.items()}


def _columns(module: nn.Module) -> list[int]:
    """What n may be."""
    for parameter in (*vars(module)["_parameters"].values(), *vars(module)["_buffers"].values()):
        if parameter is not None and parameter.dim() == 1 and parameter.numel() > 1:
            return [parameter.numel()]
    numbers = [value for value in vars(module).values() if type(value) is int and value > 1]
    for value in vars(module).values():
        numbers += [value[0]] if isinstance(value, tuple) and len(value) == 1 and type(value[0]) is int else []  # pyright: ignore
    return list(dict.fromkeys([*numbers, 64]))


def _is_rstd(term: Term) -> bool:
    return term.operation == "rsqrt"


def _prove(
    twin: Twin, n: int, dtypes: tuple[torch.dtype, torch.dtype], *, training: bool = False
) -> tuple[Form, float]:
    """The form of these dtypes, with every rounding looked at."""
    x_dtype, weight_dtype = dtypes
    shapes = _shapes(twin.module, weight_dtype)
    if any(one is not None and one[0] != (n,) for one in shapes.values()):
        name, one = next((name, one) for name, one in shapes.items() if one is not None and one[0] != (n,))
        raise Unknown(f"has a {name} of shape {one[0]}, where one dimension of {n} is needed")
    parameters = {
        name: None if one is None else nn.Parameter(_proof.weights(n, weight_dtype) * (1 if name == "weight" else 0.7))
        for name, one in shapes.items()
    }
    found = None
    for x in _proof.rows(n, x_dtype, 1e-6):
        try:
            recorder, y = _run(twin, x, parameters, training=training)
        except Unknown:
            if x.dim() == 3:
                raise
            twin.ranks.discard(x.dim())  # its own forward raises there, or takes none of that rank
            continue
        term = recorder.terms[id(y)]
        if found is None:
            found = match(term, x_dtype)
        elif match(term, x_dtype) != found:
            raise Unknown(f"computes something else for {tuple(x.shape)}")
        form, eps = found.form, found.eps
        rstd = recorder.tensor_of(_is_rstd)
        weight, bias = (None if name is None else parameters[name] for name in (form.weight, form.bias))
        with torch.no_grad():
            expected = _proof.formula(form, x, rstd.reshape(*x.shape[:-1], 1), weight, bias)
            if _proof.rstd_is_wrong(x, rstd.reshape(*x.shape[:-1], 1), eps):
                raise Unknown("has another rstd than 1 / sqrt(mean(x^2) + eps)")
        if y.dtype != expected.dtype or not torch.equal(_bits(y), _bits(expected)):
            raise Unknown(f"differs from {form} in {int((y != expected).sum())} of {y.numel()} elements")
    assert found is not None
    return found.form, found.eps


def _bits(y: Tensor) -> Tensor:
    return y.detach().view(torch.int32 if y.element_size() == 4 else torch.int16)


def _gradients_are_its_own(twin: Twin, n: int, form: Form, eps: float) -> None:
    """In float32: a detached statistic or a Function of its own has the same y and other gradients."""
    shapes = _shapes(twin.module, F32)
    parameters = {name: None if one is None else nn.Parameter(_proof.weights(n, F32)) for name, one in shapes.items()}
    twin.set(parameters, training=True)
    x = next(_proof.rows(n, F32, 1.0)).requires_grad_()
    wanted = [x, *(one for name, one in parameters.items() if one is not None and name in (form.weight, form.bias))]
    dy = torch.linspace(-1, 1, x.numel()).view_as(x)
    weight, bias = (None if name is None else parameters[name] for name in (form.weight, form.bias))
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    expected = torch.autograd.grad(_proof.formula(form, x, rstd, weight, bias), wanted, dy)
    y = twin.forward(x)
    if not y.requires_grad:
        raise Unknown("has no gradients")
    try:
        actual = torch.autograd.grad(y, wanted, dy)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):  # then nobody has trained with it
            return
        raise Unknown(f"has no gradients: {str(error).splitlines()[0][:80]}") from error
    for one, other in zip(actual, expected, strict=True):
        if (one - other).abs().max() > 1e-3 * other.abs().max():
            raise Unknown("has other gradients than its formula")


def _eps_path(twin: Twin, n: int, eps: float) -> Path | float:
    """The attribute that eps is read from at each call: the one whose change changes it."""
    as_float32 = torch.tensor(eps).item()
    for path, value in [*twin.read.items()]:
        if type(value) not in (int, float) or torch.tensor(float(value)).item() != as_float32:
            continue
        twin.changed = {path: float(value) * 2 + 0.125}
        try:
            _, moved = _prove(twin, n, (F32, F32))
        except Unknown:
            moved = eps
        finally:
            twin.changed = {}
        if moved != eps:
            return path
    return eps


def _compute(module: nn.Module, n: int) -> Computation:
    twin = Twin(module)
    forms: dict[tuple[torch.dtype, torch.dtype], Form] = {}
    eps = 0.0
    for dtypes in SAME_DTYPES:
        forms[dtypes], eps = _prove(twin, n, dtypes)
        if _prove(twin, n, dtypes, training=True)[0] != forms[dtypes]:
            raise Unknown("computes something else in training")
        if match(_elsewhere(twin, n, dtypes[0]), dtypes[0]).form != forms[dtypes]:
            raise Unknown("computes something else on CUDA")
    with autocast(on=True):
        try:
            follows_autocast = match(_elsewhere(twin, n, BF16), BF16).form != forms[BF16, BF16]
        except Unknown:
            follows_autocast = True
    _gradients_are_its_own(twin, n, forms[F32, F32], eps)
    path, weight = _eps_path(twin, n, eps), forms[F32, F32].weight
    if weight is not None or forms[F32, F32].bias is not None:
        for dtypes in ((x, w) for x in DTYPES for w in DTYPES if x != w):
            with contextlib.suppress(Unknown):  # then its own forward computes these
                forms[dtypes] = _prove(twin, n, dtypes)[0]
    read = {one: value for one, value in twin.read.items() if one != path}
    ranks = tuple(sorted(twin.ranks))
    return Computation(tuple(forms.items()), weight, path, tuple(read.items()), follows_autocast, ranks)


@contextlib.contextmanager
def _undisturbed() -> Generator[None]:
    """Whatever modes the caller is in."""
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        autocast(on=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of mixed dtypes, which the module may warn of when it is called
        yield


def compute(module: nn.Module) -> Computation | str:
    """What this norm computes, or why that is not known, in words that complete "its forward ..."."""
    try:
        if children := [*vars(module)["_modules"]]:
            raise Unknown(f"may call other modules: it holds {', '.join(children)}")
        _purity.check(type(module))
        signature = [*inspect.signature(type(module).forward).parameters.values()][2:]
        if any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in signature):
            raise Unknown(f"needs more than one input: {signature[0].name}")
        reason: Unknown | None = None
        for n in _columns(module):
            try:
                with _undisturbed():
                    return _compute(module, n)
            except Unknown as error:
                reason = reason or error
        assert reason is not None
        raise reason
    except Unknown as error:
        return str(error)
