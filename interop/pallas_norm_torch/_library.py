"""The operators pallas_norm::rms_norm, add_rms_norm and rms_norm_backward: what torch.compile, torch.export, functorch
and autograd see."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportIncompatibleMethodOverride=false
# pyright: reportReturnType=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (torch.library's decorators and autograd.Function's contexts have no types)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pallas_norm._spec import Spec
from pallas_norm.plans.fitting import Misfit

from . import _dtensor, _formula, _options, _torch_state, _validate, _vmap, direct, launch, statements

Tensor = torch.Tensor
# The options every operator takes, in this order; a Spec by another name, which schemas can say. Those with defaults
# came later: programs without them compute what they did.
OPTIONS = "float eps, bool cast_before_scale, float weight_offset"
OF_UNIT = "ScalarType? unit_dtype=None, bool round_weight=False"
ROUNDING = f"{OF_UNIT}, ScalarType? out_dtype=None"

library = torch.library.Library("pallas_norm", "DEF")
# The second is torch's default, which inductor leaves out for operators of its list: _torch_state.register_fake.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
library.define(f"rms_norm(Tensor x, Tensor? weight, {OPTIONS}, {ROUNDING}) -> (Tensor, Tensor)", tags=TAGS)
library.define(
    f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight, {OPTIONS}, {ROUNDING}, ScalarType? s_dtype=None) "
    "-> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    "rms_norm_backward(Tensor x, Tensor? weight, Tensor rstd, Tensor dy, Tensor? ds, "
    f"{OPTIONS}, bool with_dweight, {OF_UNIT}) -> (Tensor, Tensor)",  # x is s, and dx its gradient
    tags=TAGS,
)


def operator(name: str) -> Any:
    """The overload of that name."""
    return getattr(torch.ops.pallas_norm, name).default


def path(x: Tensor, n: int | None = None) -> Any:
    """The module whose forward and backward a call takes, of rows of n elements, by default those of x."""
    if x.is_cuda and direct.unavailable(x.shape[-1] if n is None else n, x.device.index, x.dtype) is None:
        return direct
    return statements


def forward(x: Tensor, *operands: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, s, rstd) by the path of x; by the other one where a kernel turns out not to be what the launch expects."""
    if path(x) is direct:
        try:
            return direct.forward(x, *operands, **options)
        except launch.Unavailable as reason:  # raised before anything is written
            direct.refuse(x.shape[-1], x.device.index, str(reason))
    return statements.forward(x, *operands, **options)


def backward(x: Tensor, *operands: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight), as forward."""
    if path(x) is direct:
        try:
            return direct.backward(x, *operands, **options)
        except Misfit:  # of this kernel alone: the forward one goes on
            pass
        except launch.Unavailable as reason:
            direct.refuse(x.shape[-1], x.device.index, str(reason))
    return statements.backward(x, *operands, **options)


def functional(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> Any:
    """Under torch.func.functionalize, which has no rule for autograd.Function: the operator, if there is nothing else
    around it; or torch's statements, of which every transformation knows the derivatives."""
    options = _options.arguments(spec)
    if not _torch_state.alone():
        y, s, rstd = statements.forward(x, residual, weight, spec, with_rstd=True)
        return (y, rstd) if s is None else (y, s, rstd)
    if residual is None:
        return torch.ops.pallas_norm.rms_norm(x, weight, *options)
    return torch.ops.pallas_norm.add_rms_norm(x, residual, weight, *options)


# --- what they compute ------------------------------------------------------------------------------------------------


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, options: Sequence[Any]) -> None:
    """What a direct call of an operator may have wrong too."""
    _validate.operands(x, residual, weight, with_residual=residual is not None)
    check_options(weight, options)


def check_options(weight: Tensor | None, options: Sequence[Any]) -> None:
    """A float that torch.compile keeps open is checked when the program runs."""
    eps, cast_before_scale, weight_offset, *rounding = options
    _validate.rounding(cast_before_scale, (*rounding, *_options.AS_OPERANDS[len(rounding) :]), weight)
    if not isinstance(eps, torch.SymFloat):
        _validate.eps(eps)
    if not isinstance(weight_offset, torch.SymFloat):
        _validate.weight_offset(weight_offset, weight)


def _rms_norm(x: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    _check(x, None, weight, options)
    y, _, rstd = forward(x, None, weight, _options.of(options), with_rstd=True)
    return y, rstd


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, residual, weight, options)
    return forward(x, residual, weight, _options.of(options), with_rstd=True)


def _check_gradient(
    x: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, ds: Tensor | None, options: Sequence[Any]
) -> None:
    _check(x, None, weight, options)
    _validate.belongs("rstd", rstd, x, x.shape[:-1], (torch.float32,))
    _validate.belongs("dy", dy, x, x.shape, _validate.DTYPES)
    if ds is not None:
        _validate.belongs("ds", ds, x, x.shape, (x.dtype,))


def _rms_norm_backward(
    x: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, ds: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    options, with_dweight = split(options)
    _check_gradient(x, weight, rstd, dy, ds, options)
    dx, dweight = backward(x, weight, rstd, dy, ds, _options.of(options), with_dweight=with_dweight)
    return dx, dweight if with_dweight and dweight is not None else x.new_empty(0)


def split(options: Sequence[Any]) -> tuple[tuple[Any, ...], bool]:
    """(the options, with_dweight) of rms_norm_backward, whose later options follow with_dweight."""
    return (*options[:3], *options[4:]), options[3]


def joined(options: Sequence[Any], with_dweight: Any) -> tuple[Any, ...]:
    """The inverse of split; of a forward operator's options, of whose out_dtype and s_dtype the operands tell."""
    return (*options[:3], with_dweight, *_options.shortest(options[3:5]))


IMPLEMENTATIONS = {"rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "rms_norm_backward": _rms_norm_backward}
for name, function in IMPLEMENTATIONS.items():
    library.impl(name, function, "CompositeExplicitAutograd")


# --- what they return, without computing it ---------------------------------------------------------------------------


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _rstd_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


@_torch_state.register_fake("pallas_norm::rms_norm", library)
def _(x: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    _check(x, None, weight, options)
    return _like(x, _options.dtypes_of(_options.of(options), x, None, weight).y), _rstd_like(x)


@_torch_state.register_fake("pallas_norm::add_rms_norm", library)
def _(x: Tensor, residual: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, residual, weight, options)
    to = _options.dtypes_of(_options.of(options), x, residual, weight)
    return _like(x, to.y), _like(x, to.s), _rstd_like(x)


@_torch_state.register_fake("pallas_norm::rms_norm_backward", library)
def _(
    x: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, ds: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    options, with_dweight = split(options)
    _check_gradient(x, weight, rstd, dy, ds, options)
    with_dweight = with_dweight and weight is not None
    return _like(x, x.dtype), torch.empty_like(weight) if with_dweight else x.new_empty(0)


# --- differentiation --------------------------------------------------------------------------------------------------


class Norm(torch.autograd.Function):
    """(y, rstd), with a residual (y, s, rstd); of x, residual, weight and the options."""

    @staticmethod
    def forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, *options: Any) -> Any:
        _dtensor.register()
        with _torch_state.below_autograd():
            if residual is None:
                return torch.ops.pallas_norm.rms_norm(x, weight, *options)
            return torch.ops.pallas_norm.add_rms_norm(x, residual, weight, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, *ctx.options = inputs
        *_, rstd = output
        _torch_state.mark_constants(ctx, None if residual is None else output[1], rstd)
        ctx.passed_on = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        _torch_state.save(ctx, x if residual is None else output[1], weight, rstd)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        ds = others[0] if len(others) == 2 else None
        wants_x, wants_residual, wants_weight, *options = ctx.needs_input_grad
        nothing = (None,) * len(options)
        dx, dweight = ds, None
        if dy is not None:  # else y was not used, and ds passes as it is, whatever is in the rows
            dx, dweight = Gradient.apply(x, weight, rstd, dy, ds, *joined(ctx.options, wants_weight))
        dx, dresidual = passed_on(dx, ctx.passed_on, (wants_x, wants_residual))
        return dx, dresidual, dweight if wants_weight else None, *nothing

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _vmap.members(Norm.apply, info.batch_size, in_dims, arguments, weight_at=2, shared_results=())


def passed_on(
    gradient: Tensor | None, dtypes: Sequence[torch.dtype | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradient of s as those of x and the residual, which may have other dtypes."""
    return tuple(
        gradient.to(dtype) if gradient is not None and dtype is not None and wants else None
        for dtype, wants in zip(dtypes, wanted, strict=True)
    )


class Gradient(torch.autograd.Function):
    """(dx, dweight), differentiable by its formula, in which rstd is computed again from x."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        _dtensor.register()
        with _torch_state.below_autograd():
            return torch.ops.pallas_norm.rms_norm_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, dy, ds, *options = inputs
        ctx.options, ctx.with_dweight = split(options)
        ctx.set_materialize_grads(False)
        if weight is None or not ctx.with_dweight:  # of no elements
            ctx.mark_non_differentiable(output[1])
        _torch_state.save(ctx, x, weight, dy, ds)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None, ddweight: Tensor | None) -> tuple[Any, ...]:
        cotangent = ddweight if ctx.with_dweight else None
        x, weight, dy, ds = _formula.second_order(ctx.saved_tensors, ddx, cotangent, _options.of(ctx.options))
        return x, weight, None, dy, ds, *(None,) * (len(ctx.options) + 1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _vmap.members_of_gradient(Gradient.apply, info.batch_size, in_dims, arguments)


def _rms_norm_autograd(x: Tensor, weight: Tensor | None, *options: Any) -> Any:
    return Norm.apply(x, None, weight, *options)


library.impl("rms_norm", _rms_norm_autograd, "Autograd")
library.impl("add_rms_norm", Norm.apply, "Autograd")
library.impl("rms_norm_backward", Gradient.apply, "Autograd")


# --- vmap -------------------------------------------------------------------------------------------------------------


def _vmap_rms_norm(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    operator = torch.ops.pallas_norm.rms_norm
    return _vmap.members(operator, info.batch_size, in_dims, arguments, weight_at=1, shared_results=())


def _vmap_add_rms_norm(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    operator = torch.ops.pallas_norm.add_rms_norm
    return _vmap.members(operator, info.batch_size, in_dims, arguments, weight_at=2, shared_results=())


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _vmap.members_of_gradient(torch.ops.pallas_norm.rms_norm_backward, info.batch_size, in_dims, arguments)


torch.library.register_vmap("pallas_norm::rms_norm", _vmap_rms_norm, lib=library)
torch.library.register_vmap("pallas_norm::add_rms_norm", _vmap_add_rms_norm, lib=library)
torch.library.register_vmap("pallas_norm::rms_norm_backward", _vmap_backward, lib=library)
