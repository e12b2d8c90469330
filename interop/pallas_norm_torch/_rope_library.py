"""The operators pallas_norm::rms_norm_rope and rms_norm_rope_backward: what torch.compile, torch.export, functorch and
autograd see of rotated heads."""

# pyright: reportArgumentType=false, reportIncompatibleMethodOverride=false, reportPrivateUsage=false
# pyright: reportReturnType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUntypedFunctionDecorator=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pallas_norm import _validate_rope
from pallas_norm._spec import Spec

from . import _dtensor, _form_calls, _library, _options, _torch_state, _validate, direct, rope_statements, statements
from ._kernels import Rope, RopeBackward
from ._library import OPTIONS, TAGS, library
from .prepared_rope import RopeBackwardCall, RopeCall

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]

OPERANDS = "Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight"
library.define(f"rms_norm_rope({OPERANDS}, {OPTIONS}) -> (Tensor, Tensor)", tags=TAGS)
library.define(
    f"rms_norm_rope_backward({OPERANDS}, Tensor dq_out, Tensor dk_out, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def _is_one(size: Any) -> bool:
    return not _torch_state.is_unbacked(size) and bool(size == 1)


SIZES = _validate_rope.Sizes(_validate.same_sizes, _is_one)


def check(operands: Sequence[Any], spec: Spec) -> None:
    """operands: q, k, cos, sin, q_weight and k_weight."""
    named = dict(zip(("q", "k", "cos", "sin", "q_weight", "k_weight"), operands, strict=True))
    for name, value in named.items():
        if value is not None or not name.endswith("weight"):
            named[name] = _validate.tensor(name, value)
    q, weight = named["q"], named["q_weight"]
    for name, value in named.items():
        if value is not None and value.device != q.device:
            raise ValueError(f"{name} is on {value.device} but q is on {q.device}; move one of them with .to")
    _validate_rope.fit(named, None, _options.dtypes_of(spec, q, None, weight).y, _validate.describe, SIZES)


def _checked(operands: Sequence[Any], options: Sequence[Any]) -> Spec:
    """What a direct call of an operator may have wrong too, its options among it."""
    _library.check_options(operands[4], options)
    spec = _options.of(options)
    check(operands, spec)
    return spec


def constant(differentiated: bool) -> None:  # noqa: FBT001
    """Angles that autograd would differentiate are refused."""
    if differentiated:
        raise NotImplementedError(
            "cos or sin requires grad; needed angles that are constants: detach both, or rotate what rms_norm "
            "returns in steps of your own"
        )


def angles(cos: Tensor, sin: Tensor) -> Pair:
    shape = _validate_rope.without_ones(cos.shape, SIZES)
    return cos.reshape(shape), sin.reshape(shape)


def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: Any, spec: Spec) -> Pair:
    """q and k, by the path of q; in steps, with the bits of the norm's kernel, where this form has none."""
    # The blocks of one launch are counted for both: heads on one side only are for the steps.
    if _library.path(q) is direct and (q.numel() == 0) == (k.numel() == 0):
        weight = weights[0]
        kernel = Rope(q.shape[-1], q.dtype, None if weight is None else weight.dtype, spec)
        found = _form_calls.run(RopeCall, kernel, q.get_device(), (q, k), cos, sin, weights)
        if found is not None:
            return found
    y = [_library.forward(x, None, weight, spec, with_rstd=False)[0] for x, weight in zip((q, k), weights, strict=True)]
    of_q, of_k = (rope_statements.rotated(one, cos, sin) for one in y)
    return of_q, of_k


def in_steps(*arguments: Any) -> Pair:
    """As the operator, in torch's statements, of which every transformation knows the derivatives."""
    q, k, cos, sin, q_weight, k_weight, *options = arguments
    spec, (cos, sin) = _options.of(options), angles(cos, sin)
    y = (statements.forward(x, None, w, spec, with_rstd=False)[0] for x, w in ((q, q_weight), (k, k_weight)))
    of_q, of_k = (rope_statements.rotated(one, cos, sin) for one in y)
    return of_q, of_k


def _operator(*arguments: Any) -> Pair:
    operands = arguments[:6]
    spec = _checked(operands, arguments[6:])
    q, k, cos, sin, *weights = operands
    return forward(q, k, *angles(cos, sin), weights, spec)


library.impl("rms_norm_rope", _operator, "CompositeExplicitAutograd")


def _checked_gradient(*arguments: Any) -> Spec:
    q, k, _, _, q_weight, _, dq_out, dk_out, *options = arguments
    spec = _checked(arguments[:6], options)
    of_y = _options.dtypes_of(spec, q, None, q_weight).y
    _validate.belongs("dq_out", dq_out, q, q.shape, (of_y,), of="q")
    _validate.belongs("dk_out", dk_out, k, k.shape, (of_y,), of="k")
    return spec


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """By one kernel; where there is none the steps one by one: the gradient of the rotation, then that of the norm with
    its kernel. rstd is computed again, since a row is read for the gradient anyhow."""
    q, k, cos, sin, q_weight, k_weight, dq_out, dk_out, *_ = arguments
    spec = _checked_gradient(*arguments)
    cos, sin = angles(cos, sin)
    if _library.path(q) is direct and q.numel() and k.numel():
        kernel = RopeBackward(q.shape[-1], q.dtype, None if q_weight is None else q_weight.dtype, spec)
        operands = (q, k), cos, sin, (q_weight, k_weight), (dq_out, dk_out)
        found = _form_calls.run(RopeBackwardCall, kernel, q.get_device(), *operands)
        if found is not None:
            return tuple(q.new_empty(0) if one is None else one for one in found)
    gradients, dweights = list[Tensor](), list[Tensor]()
    for x, weight, dr in ((q, q_weight, dq_out), (k, k_weight, dk_out)):
        *_, rstd = _library.forward(x, None, weight, spec, with_rstd=True)
        dy = rope_statements.rotated_back(dr, cos, sin)
        with_dweight = weight is not None
        dx, dweight = _library.backward(x.contiguous(), weight, rstd, dy, None, spec, with_dweight=with_dweight)
        gradients.append(dx)
        dweights.append(x.new_empty(0) if dweight is None else dweight)
    return *gradients, *dweights


library.impl("rms_norm_rope_backward", _backward, "CompositeExplicitAutograd")


@_torch_state.register_fake("pallas_norm::rms_norm_rope", library)
def _(*arguments: Any) -> Pair:
    operands = arguments[:6]
    spec = _checked(operands, arguments[6:])
    q, k, weight = operands[0], operands[1], operands[4]
    dtype = _options.dtypes_of(spec, q, None, weight).y
    return torch.empty(q.shape, dtype=dtype, device=q.device), torch.empty(k.shape, dtype=dtype, device=k.device)


@_torch_state.register_fake("pallas_norm::rms_norm_rope_backward", library)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _checked_gradient(*arguments)
    q, k, _, _, q_weight, k_weight = arguments[:6]
    dweights = (q.new_empty(0) if weight is None else torch.empty_like(weight) for weight in (q_weight, k_weight))
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty_like(k, memory_format=CONTIGUOUS),
        *dweights,
    )


CONTIGUOUS = torch.contiguous_format


class NormRope(torch.autograd.Function):
    """q and k; of q, k, cos, sin, q_weight, k_weight and the options."""

    @staticmethod
    def forward(*arguments: Any) -> Pair:
        _dtensor.register()
        with _torch_state.below_autograd():
            return torch.ops.pallas_norm.rms_norm_rope(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
        ctx.options, ctx.of_y = inputs[6:], output[0].dtype
        ctx.set_materialize_grads(False)  # it would make plain tensors of zeros beside DTensors
        of_q, of_k = (ctx.needs_input_grad[x] or ctx.needs_input_grad[weight] for x, weight in ((0, 4), (1, 5)))
        ctx.mark_non_differentiable(*(y for y, of_y in zip(output, (of_q, of_k), strict=True) if not of_y))
        constant(ctx.needs_input_grad[2] or ctx.needs_input_grad[3])
        _torch_state.save(ctx, *inputs[:6])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        q, k, cos, sin, *weights = ctx.saved_tensors
        nothing = (None,) * len(ctx.options)
        if all(one is None for one in gradients):
            return (None,) * 6 + nothing
        dq_out, dk_out = (
            torch.zeros_like(x, dtype=ctx.of_y) if one is None else one
            for one, x in zip(gradients, (q, k), strict=True)
        )
        if torch.is_grad_enabled() or _torch_state.forward_mode():  # to be differentiated again
            found = _differentiable((q, k), cos, sin, weights, (dq_out, dk_out), ctx.options)
        else:
            found = torch.ops.pallas_norm.rms_norm_rope_backward(q, k, cos, sin, *weights, dq_out, dk_out, *ctx.options)
        # A result that was not used has no gradient: zeros times what is in the rows may be NaN.
        (dq, dq_weight), (dk, dk_weight) = (
            (None, None) if dy is None else (dx, None if weight is None else dweight)
            for dy, dx, dweight, weight in zip(gradients, found[:2], found[2:], weights, strict=True)
        )
        return dq, dk, None, None, dq_weight, dk_weight, *nothing

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return _members(NormRope.apply, info.batch_size, in_dims, arguments)


def _differentiable(
    pair: Pair, cos: Tensor, sin: Tensor, weights: Sequence[Any], gradients: Pair, options: Sequence[Any]
) -> tuple[Tensor, ...]:
    """As the operator, in steps of which autograd knows the derivatives."""
    cos, sin = angles(cos, sin)
    found: list[tuple[Any, Any]] = []
    for x, weight, dr in zip(pair, weights, gradients, strict=True):
        _, rstd = _library.Norm.apply(x.detach(), None, None if weight is None else weight.detach(), *options)
        dy = rope_statements.rotated_back(dr, cos, sin)
        arguments = _library.joined(options, weight is not None)
        found.append(_library.Gradient.apply(x, weight, rstd, dy, None, *arguments))
    (dq, dq_weight), (dk, dk_weight) = found
    return dq, dk, dq_weight, dk_weight


def differentiable(*arguments: Any) -> Pair:
    """NormRope.apply. Without gradients, angles that require grad are constants: a Function is told that they require
    it all the same."""
    if not torch.is_grad_enabled():
        q, k, cos, sin, *others = arguments
        arguments = q, k, cos.detach(), sin.detach(), *others
    return NormRope.apply(*arguments)


library.impl("rms_norm_rope", differentiable, "Autograd")


def _members(call: Any, size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    """One more leading axis of q and k, where nothing else has members; else a loop."""
    whole = [
        value if dim is None else value.movedim(dim, 0)
        for value, dim in zip(arguments, (*in_dims, *(None,) * len(arguments))[: len(arguments)], strict=True)
    ]
    batched = [dim is not None for dim in in_dims[: len(arguments)]]
    if all(batched[:2]) and not any(batched[2:6]) and len(whole) == 6 + 3:
        return call(*whole), (0, 0)
    if size == 0:  # of which one is computed for the shapes and dtypes of the results
        one = call(*(v.new_zeros(v.shape[1:]) if own else v for v, own in zip(whole, batched, strict=True)))
        return tuple(value.new_empty(0, *value.shape) for value in one), (0,) * len(one)
    members = [[v[i] if own else v for v, own in zip(whole, batched, strict=True)] for i in range(size)]
    results = tuple(torch.stack(values) for values in zip(*(call(*member) for member in members), strict=True))
    return results, (0,) * len(results)


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _members(torch.ops.pallas_norm.rms_norm_rope, info.batch_size, in_dims, arguments)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _members(torch.ops.pallas_norm.rms_norm_rope_backward, info.batch_size, in_dims, arguments)


torch.library.register_vmap("pallas_norm::rms_norm_rope", _vmap, lib=library)
torch.library.register_vmap("pallas_norm::rms_norm_rope_backward", _vmap_backward, lib=library)
