"""A norm recognised by what it computes: its forward traced into a term, matched with a form, and proved.

Traced on a twin of the module with parameters of its own, for each dtype of x and the weight; as a fake tensor on CUDA
with unknown row counts in every rank, where a branch on data, on a shape or on the device shows; and on a CPU with real
inputs, where the result must equal that of our formula bit for bit, given the module's own rstd. The form and its eps
must be the same in all of these. Other dtypes, ranks and numbers of columns stay its own forward's.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Generator, Mapping

import torch
from torch import nn

from . import _proof, _purity
from ._fake_cuda import autocast
from ._forms import Computation, Form, Match, Path, match
from ._launches import DTYPES
from ._outside import outside_of
from ._sizes import Asked, elsewhere, same_for_any_columns, same_for_any_shape
from ._terms import Term, Unknown
from ._trace import matched, run, said, shapes
from ._twin import Seen, Twin

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SAME_DTYPES = ((BF16, BF16), (F16, F16), (F32, F32))
Dtypes = tuple[torch.dtype, torch.dtype]  # of x and of the weight


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


def _prove(twin: Twin, n: int, dtypes: Dtypes, *, training: bool = False) -> Match:
    """The form of these dtypes and its eps, with every rounding looked at."""
    x_dtype, weight_dtype = dtypes
    of = shapes(twin.module, weight_dtype)
    if any(one is not None and one[0] != (n,) for one in of.values()):
        name, one = next((name, one) for name, one in of.items() if one is not None and one[0] != (n,))
        raise Unknown(f"has a {name} of shape {one[0]}, where one dimension of {n} is needed")
    parameters = {
        name: None if one is None else Seen.of(_proof.weights(n, weight_dtype) * (1 if name == "weight" else 0.7))
        for name, one in of.items()
    }
    found = None
    for x in _proof.rows(n, x_dtype, 1e-6):
        try:
            recorder, y = run(twin, x.as_subclass(Seen), parameters, training=training)
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
        form, eps = found
        rstd = recorder.tensor_of(_is_rstd)
        weight, bias = (None if name is None else parameters[name] for name in (form.weight, form.bias))
        with torch.no_grad():
            expected = _proof.formula(form, x, rstd.reshape(*x.shape[:-1], 1), weight, bias)
            if _proof.rstd_is_wrong(x, rstd.reshape(*x.shape[:-1], 1), eps):
                raise Unknown("has another rstd than 1 / sqrt(mean(x^2) + eps)")
        if y.dtype != expected.dtype or not torch.equal(_bits(y), _bits(expected)):
            raise Unknown(f"differs from {form} in {int((y != expected).sum())} of {y.numel()} elements")
    assert found is not None
    return found


def _bits(y: Tensor) -> Tensor:
    return y.detach().view(torch.int32 if y.element_size() == 4 else torch.int16)


def _gradients_are_its_own(twin: Twin, n: int, form: Form, eps: float) -> None:
    """In float32: a detached statistic or a Function of its own has the same y and other gradients."""
    parameters = {
        name: None if one is None else nn.Parameter(_proof.weights(n, F32))
        for name, one in shapes(twin.module, F32).items()
    }
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
        raise Unknown(f"has no gradients: {said(error)}") from error
    for one, other in zip(actual, expected, strict=True):
        if (one - other).abs().max() > 1e-3 * other.abs().max():
            raise Unknown("has other gradients than its formula")


def _eps_path(twin: Twin, n: int, proved: Match) -> Path | float:
    """The attribute that eps is read from at each call: wherever that is moved, eps is what it says and nothing else
    changes. Of max(self.eps, 1e-6), say, only the number is known, and that for the attribute as it is."""
    as_float32 = torch.tensor(proved.eps).item()
    for path, value in [*twin.read.items()]:
        if type(value) not in (int, float) or torch.tensor(float(value)).item() != as_float32:
            continue
        places = [0.0, value / 2, float(value) * 2 + 0.125, 1e3]
        try:
            for place in places:
                twin.changed = {path: place}
                if matched(twin, torch.ones(1, 2, n)) != proved._replace(eps=place):
                    break
            else:
                return path
        finally:
            twin.changed = {}
    return proved.eps


def _for_any_columns(twin: Twin, n: int, proved: Mapping[Dtypes, Match]) -> bool:
    """Whether a norm without parameters computes the same in rows of another length, and asks for none."""
    if any(one is not None for one in shapes(twin.module, F32).values()):
        return False
    try:
        for dtypes, one in proved.items():
            if _prove(twin, n + 40, dtypes) != one or not same_for_any_columns(twin, n + 40, dtypes[0], one):
                return False
    except Unknown:
        return False
    return True


def _compute(module: nn.Module, n: int) -> Computation:
    twin = Twin(module, _purity.methods_of(type(module)))
    proved: dict[Dtypes, Match] = {}
    for dtypes in SAME_DTYPES:
        proved[dtypes] = found = _prove(twin, n, dtypes)
        if _prove(twin, n, dtypes, training=True) != found:
            raise Unknown("computes something else in training")
        if found.eps != (first := proved[BF16, BF16].eps):
            name = str(dtypes[0]).removeprefix("torch.")
            raise Unknown(f"has an eps of {found.eps:g} in {name}, where it is {first:g} in bfloat16")
        same_for_any_shape(twin, n, dtypes[0], found)
    found = proved[F32, F32]
    with autocast(on=True):
        try:
            follows_autocast = elsewhere(twin, Asked(n, BF16)) != proved[BF16, BF16]
        except Unknown:
            follows_autocast = True
    _gradients_are_its_own(twin, n, *found)
    path, weight = _eps_path(twin, n, found), found.form.weight
    columns = None if _for_any_columns(twin, n, proved) else n
    if weight is not None or found.form.bias is not None:
        for dtypes in ((x, w) for x in DTYPES for w in DTYPES if x != w):
            with contextlib.suppress(Unknown):  # then its own forward computes these
                one = _prove(twin, n, dtypes)
                if one.eps == found.eps:
                    proved[dtypes] = one
    forms = tuple((dtypes, one.form) for dtypes, one in proved.items())
    read = tuple((one, value) for one, value in twin.read.items() if one != path)
    ranks, outside = tuple(sorted(twin.ranks)), outside_of(type(module))
    return Computation(forms, weight, path, read, follows_autocast, ranks, columns, outside)


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
        for _ in _purity.functions_of(type(module)):  # raises Unknown where one may do more than compute
            pass
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
