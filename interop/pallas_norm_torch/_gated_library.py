"""The operators pallas_norm::rms_norm_gated and rms_norm_gated_backward: what torch.compile, torch.export, functorch
and autograd see of gated norms."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportIncompatibleMethodOverride=false
# pyright: reportReturnType=false, reportUntypedFunctionDecorator=false, reportPrivateUsage=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from pallas_norm import _api_gated
from pallas_norm._spec import Spec
from pallas_norm.gated_reference import Form

from . import _dtensor, _form_calls, _library, _options, _torch_state, _validate, _vmap, direct, gated_statements
from ._kernels import Gated, GatedBackward
from ._library import OPTIONS, TAGS, library
from .prepared_gated import GatedBackwardCall, GatedCall

Tensor = torch.Tensor

FORM = "str activation, bool norm_before_gate, int group"  # 0: whole rows
library.define(
    f"rms_norm_gated(Tensor x, Tensor gate, Tensor? weight, {FORM}, {OPTIONS}, ScalarType? out_dtype) "
    "-> (Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    f"rms_norm_gated_backward(Tensor x, Tensor gate, Tensor? weight, Tensor rstd, Tensor dy, {FORM}, {OPTIONS}, "
    "bool with_dweight) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


class Options(NamedTuple):
    """As the operators take them."""

    activation: str
    norm_before_gate: bool
    group: int
    eps: float
    cast_before_scale: bool
    weight_offset: float
    out_dtype: torch.dtype | None = None

    @staticmethod
    def of(spec: Spec, form: Form) -> Options:
        out = None if spec.out_dtype is None else getattr(torch, spec.out_dtype)
        of_form = form.activation, form.norm_before_gate, form.group
        return Options(*of_form, spec.eps, spec.cast_before_scale, spec.weight_offset, out)

    def spec(self) -> Spec:
        return _options.of((*self[3:6], None, False, self.out_dtype))

    def form(self, x: Tensor) -> Form:
        return Form(self.activation, self.norm_before_gate, self.group or x.shape[-1])


def forward(
    x: Tensor, gate: Tensor, weight: Tensor | None, spec: Spec, form: Form, *, with_rstd: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, rstd), by a kernel where one can be launched."""
    if _library.path(x, form.group) is direct:
        dtypes = x.dtype, gate.dtype, None if weight is None else weight.dtype
        kernel = Gated(x.shape[-1], *dtypes, spec, form, with_rstd)
        found = _form_calls.run(GatedCall, kernel, x.get_device(), x, gate, weight)
        if found is not None:
            return found
    y, rstd = gated_statements.forward(x, gate, weight, spec, form)
    return y, rstd if with_rstd else None


def backward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    spec: Spec,
    form: Form,
    *,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dgate, dweight), as forward."""
    with_dweight = with_dweight and weight is not None
    if _library.path(x, form.group) is direct and gate.dtype == x.dtype:
        of_weight = None if weight is None else weight.dtype
        spec_of_kernel = dataclasses.replace(spec, eps=0.0, out_dtype=None)  # rstd has eps in it, and dy its dtype
        kernel = GatedBackward(x.shape[-1], x.dtype, of_weight, dy.dtype, spec_of_kernel, form, with_dweight)
        found = _form_calls.run(GatedBackwardCall, kernel, x.get_device(), x, gate, weight, rstd, dy)
        if found is not None:
            return found
    return gated_statements.backward(x, gate, weight, rstd, dy, spec, form, with_dweight=with_dweight)


# --- the operators ----------------------------------------------------------------------------------------------------


def _checked(x: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> Options:
    """As _library._check. A group that torch.compile keeps open is settled: it is compiled into the kernel."""
    _validate.operands(x, gate, weight, with_residual=True, beside="gate")
    given = Options(*options)
    _api_gated.activation_of(given.activation)
    group = _api_gated.group_of(x.shape[-1], int(given.group)) if given.group else 0
    rounding = None, False, given.out_dtype
    _library.check_options(weight, (given.eps, given.cast_before_scale, given.weight_offset, *rounding))
    return given._replace(group=group)


def _rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    given = _checked(x, gate, weight, *options)
    return forward(x, gate, weight, given.spec(), given.form(x), with_rstd=True)


def _checked_gradient(
    x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, *options: Any
) -> Options:
    given = _checked(x, gate, weight, *options)
    groups = x.shape[-1] // (given.group or x.shape[-1])
    _validate.belongs("rstd", rstd, x, (*x.shape[:-1], groups), (torch.float32,))
    _validate.belongs("dy", dy, x, x.shape, _validate.DTYPES)
    return given


def _rms_norm_gated_backward(
    x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *given, with_dweight = options
    of = _checked_gradient(x, gate, weight, rstd, dy, *given)
    dx, dgate, dweight = backward(x, gate, weight, rstd, dy, of.spec(), of.form(x), with_dweight=with_dweight)
    return dx, dgate, x.new_empty(0) if dweight is None else dweight


library.impl("rms_norm_gated", _rms_norm_gated, "CompositeExplicitAutograd")
library.impl("rms_norm_gated_backward", _rms_norm_gated_backward, "CompositeExplicitAutograd")


@_torch_state.register_fake("pallas_norm::rms_norm_gated", library)
def _(x: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    given = _checked(x, gate, weight, *options)
    y = _options.dtypes_of(given.spec(), x, None, weight).y
    groups = x.shape[-1] // given.group if given.group else 1
    rstd = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=y, device=x.device), rstd


@_torch_state.register_fake("pallas_norm::rms_norm_gated_backward", library)
def _(
    x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _checked_gradient(x, gate, weight, rstd, dy, *options[:-1])
    dweight = x.new_empty(0) if weight is None or not options[-1] else torch.empty_like(weight)
    return *(torch.empty(of.shape, dtype=of.dtype, device=of.device) for of in (x, gate)), dweight


# --- differentiation --------------------------------------------------------------------------------------------------


class Norm(torch.autograd.Function):
    """(y, rstd); of x, gate, weight and Options."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        _dtensor.register()
        with _torch_state.below_autograd():
            return torch.ops.pallas_norm.rms_norm_gated(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, gate, weight, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        _torch_state.save(ctx, x, gate, weight, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, drstd: Tensor | None) -> tuple[Any, ...]:
        del drstd
        nothing = (None,) * len(ctx.options)
        if dy is None:
            return None, None, None, *nothing
        wanted, wants_weight = ctx.needs_input_grad[:2], ctx.needs_input_grad[2]
        *found, dweight = Gradient.apply(*ctx.saved_tensors, dy, *ctx.options[:-1], wants_weight)
        dx, dgate = (value if wants else None for value, wants in zip(found, wanted, strict=True))
        return dx, dgate, dweight if wants_weight else None, *nothing

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _vmap.members(Norm.apply, info.batch_size, in_dims, arguments, weight_at=2, shared_results=())


class Gradient(torch.autograd.Function):
    """(dx, dgate, dweight), differentiable by its formula, in which rstd is computed again."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        _dtensor.register()
        with _torch_state.below_autograd():
            return torch.ops.pallas_norm.rms_norm_gated_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gate, weight, _, dy, *options, ctx.with_dweight = inputs
        ctx.options = options
        ctx.set_materialize_grads(False)  # it would make plain tensors of zeros beside DTensors
        if weight is None or not ctx.with_dweight:
            ctx.mark_non_differentiable(output[2])
        _torch_state.save(ctx, x, gate, weight, dy)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        x, gate, weight, dy = ctx.saved_tensors
        given = Options(*ctx.options)
        spec, form = given.spec(), given.form(x)
        operands = [value for value in (x, gate, weight, dy) if value is not None]
        with_dweight = weight is not None and ctx.with_dweight

        def outputs(*values: Tensor) -> tuple[Tensor, ...]:
            x, gate, *others = values
            weight, dy = (None, *others) if len(others) == 1 else others
            rstd = gated_statements.rstd_of(x, gate, spec, form)
            found = gated_statements.backward(x, gate, weight, rstd, dy, spec, form, with_dweight=with_dweight)
            return tuple(value for value in found if value is not None)

        results, pullback = torch.func.vjp(outputs, *operands)
        pairs = zip(cotangents, results, strict=False)  # dweight is of no elements where it was not asked for
        found = iter(pullback(tuple(torch.zeros_like(of) if one is None else one for one, of in pairs)))
        x, gate, weight, dy = (None if value is None else next(found) for value in (x, gate, weight, dy))
        return x, gate, weight, None, dy, *(None,) * (len(ctx.options) + 1)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _vmap_backward(Gradient.apply, info, in_dims, arguments)


library.impl("rms_norm_gated", Norm.apply, "Autograd")
library.impl("rms_norm_gated_backward", Gradient.apply, "Autograd")


class EagerNorm(torch.autograd.Function):
    """Norm for plain tensors, without the operators' dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor | None, spec: Spec, form: Form) -> Tensor:
        y, rstd = forward(x, gate, weight, spec, form, with_rstd=True)
        ctx.spec, ctx.form = spec, form
        _torch_state.save(ctx, x, gate, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        wants_x, wants_gate, wants_weight, *_ = ctx.needs_input_grad
        # To be differentiated again, or by a tangent, or a batch of gradients: not for a launch of raw memory.
        if torch.is_grad_enabled() or _torch_state.forward_mode() or not _torch_state.is_memory(dy):
            options = Options.of(ctx.spec, ctx.form)[:-1]
            dx, dgate, dweight = Gradient.apply(x, gate, weight, rstd, dy, *options, wants_weight)
        else:
            given = x, gate, weight, rstd, dy, ctx.spec, ctx.form
            dx, dgate, dweight = backward(*given, with_dweight=wants_weight)
        return dx if wants_x else None, dgate if wants_gate else None, dweight if wants_weight else None, None, None


# --- vmap -------------------------------------------------------------------------------------------------------------


def _vmap_backward(call: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    options: Any = {"weight_at": 2, "loop": arguments[-1], "shared_results": (2,)}
    return _vmap.members(call, info.batch_size, in_dims, arguments, **options)


def _vmap_of_forward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    operator = torch.ops.pallas_norm.rms_norm_gated
    return _vmap.members(operator, info.batch_size, in_dims, arguments, weight_at=2, shared_results=())


def _vmap_of_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _vmap_backward(torch.ops.pallas_norm.rms_norm_gated_backward, info, in_dims, arguments)


torch.library.register_vmap("pallas_norm::rms_norm_gated", _vmap_of_forward, lib=library)
torch.library.register_vmap("pallas_norm::rms_norm_gated_backward", _vmap_of_backward, lib=library)
