"""What the torch functions refuse: the whole message, nothing computed, operands and out untouched."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from pallas_norm_torch import (
    RMSNorm,
    _library,
    add_rms_norm,
    call_jax,
    explain,
    rms_norm,
    rms_norm_quantized,
    rmsnorm_hf,
    sglang,
    to_jax,
    to_torch,
)
from tests.interop.cases import bits

X = torch.arange(8 * 64).reshape(8, 64).to(torch.bfloat16)
W = torch.ones(64, dtype=torch.bfloat16)
FLAT = torch.zeros(1024, dtype=torch.bfloat16)
ROWS = torch.zeros(9, 64)


def out(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


class Half(float):
    """Not a float as far as type() goes, and an eps all the same."""


NEEDED_FLOAT = "needed a Python float: pass float(eps)"


def backward(rstd: Any = None, dy: Any = X, ds: Any = None) -> Any:
    rstd = torch.ones(8) if rstd is None else rstd
    return torch.ops.pallas_norm.rms_norm_backward(X, W, rstd, dy, ds, 1e-6, True, 0.0, True)  # noqa: FBT003


def quantized(
    weight: Any = W,
    scale: Any = None,
    dtype: Any = torch.int8,
    group: int = 0,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> Any:
    options = False, eps, True, weight_offset
    return torch.ops.pallas_norm.rms_norm_quantized(X, None, weight, scale, dtype, group, *options)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # x
    "x is a list": (lambda: rms_norm([1.0]), TypeError, "x is a list; needed a torch.Tensor: wrap it with torch.as_tensor (a JAX or NumPy array: use pallas_norm.rms_norm)"),
    "x is None": (lambda: rms_norm(None), TypeError, "x is a NoneType; needed a torch.Tensor: wrap it with torch.as_tensor (a JAX or NumPy array: use pallas_norm.rms_norm)"),
    "x is a NumPy array": (lambda: rms_norm(np.zeros((2, 64), np.float32)), TypeError, "x is a ndarray; needed a torch.Tensor: wrap it with torch.as_tensor (a JAX or NumPy array: use pallas_norm.rms_norm)"),
    "x has no axis": (lambda: rms_norm(torch.tensor(1.0)), ValueError, "x is float32[] on cpu; needed at least one axis: the last one is normalised"),
    "x has rows of nothing": (lambda: rms_norm(torch.zeros(4, 0)), ValueError, "x is float32[4,0] on cpu; needed a last axis of at least one element: it is normalised"),
    "x is float64": (lambda: rms_norm(torch.zeros(4, 64, dtype=torch.float64)), TypeError, "x is float64[4,64] on cpu; needed bfloat16, float16 or float32: cast it with x.to"),
    "x is int32": (lambda: rms_norm(torch.zeros(4, 64, dtype=torch.int32)), TypeError, "x is int32[4,64] on cpu; needed bfloat16, float16 or float32: cast it with x.to"),
    "x is bool": (lambda: rms_norm(torch.zeros(4, 64, dtype=torch.bool)), TypeError, "x is bool[4,64] on cpu; needed bfloat16, float16 or float32: cast it with x.to"),
    "x is complex": (lambda: rms_norm(torch.zeros(4, 64, dtype=torch.complex64)), TypeError, "x is complex64[4,64] on cpu; needed bfloat16, float16 or float32: cast it with x.to"),
    "x is float8": (lambda: rms_norm(torch.zeros(4, 64).to(torch.float8_e4m3fn)), TypeError, "x is float8_e4m3fn[4,64] on cpu; needed bfloat16, float16 or float32: cast it with x.to"),
    "x is sparse": (lambda: rms_norm(torch.eye(64).to_sparse()), TypeError, "x has the layout torch.sparse_coo; needed torch.strided: pass x.to_dense()"),
    "x is quantized": (lambda: rms_norm(torch.quantize_per_tensor(torch.zeros(4, 64), 0.1, 0, torch.qint8)), TypeError, "x is quantized (torch.qint8); needed a plain tensor: pass x.dequantize()"),
    "x is nested": (lambda: rms_norm(torch.nested.nested_tensor([torch.zeros(64)])), TypeError, "x is a nested tensor; needed a plain one: pass x.to_padded_tensor(0.0)"),
    "x is jagged": (lambda: rms_norm(torch.nested.nested_tensor([W, W[:3]], layout=torch.jagged)), TypeError, "x is a nested tensor; needed a plain one: pass x.to_padded_tensor(0.0)"),  # to_dense knows no such layout
    "x is uninitialised, for 8 bits": (lambda: rms_norm_quantized(nn.UninitializedParameter()), TypeError, "x is not initialised yet; needed its elements: run the module it belongs to once before"),  # and requires grad
    "weight is uninitialised, for 8 bits": (lambda: rms_norm_quantized(X, nn.UninitializedParameter()), TypeError, "weight is not initialised yet; needed its elements: run the module it belongs to once before"),
    "x is negated lazily": (lambda: rms_norm(torch._neg_view(X)), TypeError, "x is negated lazily, so its memory holds other values; needed them themselves: pass x.resolve_neg()"),
    "x is a zero tensor": (lambda: rms_norm(torch._efficientzerotensor(4, 64)), TypeError, "x is a zero tensor without memory; needed one with: pass torch.zeros_like(x)"),  # it was read at the address 0
    "x is uninitialised": (lambda: rms_norm(nn.UninitializedParameter()), TypeError, "x is not initialised yet; needed its elements: run the module it belongs to once before"),
    "x is compressed": (lambda: rms_norm(torch.eye(64).to_sparse_csr(), torch.ones(64)), TypeError, "x has the layout torch.sparse_csr; needed torch.strided: pass x.to_dense()"),  # which has no is_contiguous
    # weight
    "weight is a list": (lambda: rms_norm(X, [1.0] * 64), TypeError, "weight is a list; needed a torch.Tensor: wrap it with torch.as_tensor (a JAX or NumPy array: use pallas_norm.rms_norm)"),
    "weight is a number": (lambda: rms_norm(X, 1e-6), TypeError, "weight is a float; needed a torch.Tensor: wrap it with torch.as_tensor (a JAX or NumPy array: use pallas_norm.rms_norm)"),
    "weight of another layer": (lambda: rms_norm(X, W[:32]), ValueError, "weight has shape (32,) but the last axis of x has length 64 (x: bfloat16[8,64] on cpu); pass the weight of this layer, or slice x"),
    "weight of two axes": (lambda: rms_norm(X, X[:1]), ValueError, "weight has shape (1, 64) but the last axis of x has length 64 (x: bfloat16[8,64] on cpu); pass the weight of this layer, or slice x"),
    "weight of no axis": (lambda: rms_norm(X, torch.tensor(1.0)), ValueError, "weight has shape () but the last axis of x has length 64 (x: bfloat16[8,64] on cpu); pass the weight of this layer, or slice x"),
    "weight is float64": (lambda: rms_norm(X, W.double()), TypeError, "weight is float64[64] on cpu; needed bfloat16, float16 or float32: cast it with weight.to"),
    "weight on another device": (lambda: rms_norm(X, W.to("meta")), ValueError, "weight is on meta but x is on cpu; move one of them with .to"),
    # eps and the options
    "eps is negative": (lambda: rms_norm(X, W, -1e-6), ValueError, "eps is -1e-06; needed eps >= 0: it is added to a mean of squares"),
    "eps is NaN": (lambda: rms_norm(X, W, float("nan")), ValueError, "eps is nan; needed a finite float32 number"),
    "eps is infinite": (lambda: rms_norm(X, W, float("inf")), ValueError, "eps is inf; needed a finite float32 number"),
    "eps is too large for float32": (lambda: rms_norm(X, W, 1e39), ValueError, "eps is 1e+39; needed a finite float32 number"),
    "eps is no int64 either": (lambda: rms_norm(X, W, 10**400), ValueError, "eps is inf; needed a finite float32 number"),
    "eps is a string": (lambda: rms_norm(X, W, "1e-6"), TypeError, f"eps is str; {NEEDED_FLOAT}"),
    "eps is None": (lambda: rms_norm(X, W, None), TypeError, f"eps is NoneType; {NEEDED_FLOAT}"),
    "eps is True": (lambda: rms_norm(X, W, True), TypeError, f"eps is bool; {NEEDED_FLOAT}"),  # noqa: FBT003
    "eps is complex": (lambda: rms_norm(X, W, 1j), TypeError, f"eps is complex; {NEEDED_FLOAT}"),
    "eps is a tensor": (lambda: rms_norm(X, W, torch.tensor(1e-6)), TypeError, "eps is a tensor (float32[] on cpu); needed a Python float, because it is compiled into the kernel: pass eps.item()"),
    "cast_before_scale is a number": (lambda: rms_norm(X, W, cast_before_scale=1), TypeError, "cast_before_scale is int; needed True or False"),
    "cast_before_scale is a list": (lambda: rms_norm(X, W, cast_before_scale=[]), TypeError, "cast_before_scale is list; needed True or False"),
    "cast_before_scale is a list, with a residual": (lambda: add_rms_norm(X, X, W, cast_before_scale=[]), TypeError, "cast_before_scale is list; needed True or False"),
    "weight_offset is a list": (lambda: rms_norm(X, W, weight_offset=[]), TypeError, "weight_offset is list; needed a Python float: pass float(weight_offset)"),
    "weight_offset is None": (lambda: rms_norm(X, W, weight_offset=None), TypeError, "weight_offset is NoneType; needed a Python float: pass float(weight_offset)"),
    "weight_offset without a weight": (lambda: rms_norm(X, weight_offset=1.0), ValueError, "weight_offset is 1.0 but weight is None: there is nothing to add it to; pass a weight"),
    "implementation is True": (lambda: rms_norm(X, W, implementation=True), TypeError, "implementation is a bool; needed None or 'jax'"),
    "implementation is another": (lambda: add_rms_norm(X, X, W, implementation="xla"), ValueError, "implementation is 'xla'; needed None, which follows pallas_norm_torch.explain, or 'jax'"),
    "implementation is jax on meta": (lambda: rms_norm(X.to("meta"), implementation="jax"), NotImplementedError, "implementation is 'jax' under torch.compile, torch.func, a mode of torch, or with a subclass of torch.Tensor or on meta (x: bfloat16[8,64] on meta); needed eager code on plain tensors: leave implementation out"),
    "implementation is jax in a vmap": (lambda: torch.func.vmap(lambda x: rms_norm(x, implementation="jax"))(X), NotImplementedError, "implementation is 'jax' under torch.compile, torch.func, a mode of torch, or with a subclass of torch.Tensor or on meta (x: bfloat16[64] on cpu); needed eager code on plain tensors: leave implementation out"),
    # residual
    "residual is None": (lambda: add_rms_norm(X, None), TypeError, "residual is None; needed a tensor: call rms_norm where there is nothing to add"),
    "residual of another shape": (lambda: add_rms_norm(X, X[:4]), ValueError, "residual is bfloat16[4,64] on cpu but x is bfloat16[8,64] on cpu; needed the same shape: expand it first"),
    "residual that would broadcast": (lambda: add_rms_norm(X, W), ValueError, "residual is bfloat16[64] on cpu but x is bfloat16[8,64] on cpu; needed the same shape: expand it first"),
    "residual of another dtype": (lambda: add_rms_norm(X, X.double()), TypeError, "residual is float64[8,64] on cpu; needed bfloat16, float16 or float32: cast it with residual.to"),
    "residual on another device": (lambda: add_rms_norm(X, X.to("meta")), ValueError, "residual is on meta but x is on cpu; move one of them with .to"),
    # out and s_out
    "out of a sum that overlaps x": (lambda: add_rms_norm(FLAT[64:576].view(8, 64), X, W, out=FLAT[:512].view(8, 64)), ValueError, "out overlaps x without being x: rows would be written before they are read; pass out=x to work in place, or memory of its own"),
    "s_out that overlaps the residual": (lambda: add_rms_norm(X, FLAT[64:576].view(8, 64), W, s_out=FLAT[:512].view(8, 64)), ValueError, "s_out overlaps residual without being residual: rows would be written before they are read; pass s_out=residual to work in place, or memory of its own"),
    "out and s_out in one place": (lambda: add_rms_norm(X, X.clone(), W, out=FLAT[:512].view(8, 64), s_out=FLAT[:512].view(8, 64)), ValueError, "out overlaps s_out, and both are written; pass memory of its own for each"),
    "out and s_out are both x": (lambda: add_rms_norm(X, X.clone(), W, out=X, s_out=X), ValueError, "out overlaps s_out, and both are written; pass memory of its own for each"),
    "s_out of the dtype of x, not of s": (lambda: add_rms_norm(X, X.float(), W, s_out=X), TypeError, "s_out is bfloat16[8,64] on cpu; needed float32, which is the dtype of s here: make it with torch.empty_like(x, dtype=torch.float32)"),
    "s_out is a list": (lambda: add_rms_norm(X, X, W, s_out=[1.0]), TypeError, "s_out is a list; needed a torch.Tensor or None"),
    "s_out contains the weight": (lambda: add_rms_norm(X, X, FLAT[:64], s_out=FLAT[:512].view(8, 64)), ValueError, "s_out overlaps weight, which every row reads; pass memory of its own"),
    "s_out while residual requires grad": (lambda: add_rms_norm(X, X.clone().requires_grad_(), W, s_out=out(8, 64)), ValueError, "s_out= was given while an operand requires grad, and autograd cannot record that; needed torch.no_grad(), detached operands, or a call without s_out="),
    # dtypes
    **{
        f"{name} is {shown}": (functools.partial(add_rms_norm, X, X, W, **{name: value}), TypeError, f"{name} is {shown}; needed torch.bfloat16, torch.float16, torch.float32 or None")
        for name in ("out_dtype", "unit_dtype", "s_dtype")
        for value, shown in ((torch.float64, "float64"), ("bfloat16", "a str"), ([], "a list"), (X, "a Tensor"))
    },
    "two units": (lambda: rms_norm(X, W, cast_before_scale=False, unit_dtype=torch.bfloat16), ValueError, "unit_dtype is bfloat16 but cast_before_scale is False, which is unit_dtype float32 by another name; pass one of them"),
    "no weight to round": (lambda: rms_norm(X, round_weight=True), ValueError, "round_weight is True but weight is None: there is nothing to round; pass a weight"),
    "round_weight is a dtype": (lambda: rms_norm(X, W, round_weight=torch.bfloat16), TypeError, "round_weight is dtype; needed True or False"),
    "a module that rounds no weight": (lambda: RMSNorm(64, with_weight=False, round_weight=True), ValueError, "round_weight is True but weight is None: there is nothing to round; pass a weight"),
    "an operator with two units": (lambda: torch.ops.pallas_norm.rms_norm(X, W, 1e-6, cast_before_scale=False, weight_offset=0.0, unit_dtype=torch.float16), ValueError, "unit_dtype is float16 but cast_before_scale is False, which is unit_dtype float32 by another name; pass one of them"),
    # out
    "out is a list": (lambda: rms_norm(X, W, out=[1.0]), TypeError, "out is a list; needed a torch.Tensor or None"),
    "out is sparse": (lambda: rms_norm(X, W, out=torch.zeros(8, 64).to_sparse()), TypeError, "out has the layout torch.sparse_coo; needed torch.strided"),
    "out of another shape": (lambda: rms_norm(X, W, out=out(64, 8)), ValueError, "out is bfloat16[64,8] on cpu but x is bfloat16[8,64] on cpu; needed the shape of x: make it with torch.empty_like(x)"),
    "out of another dtype": (lambda: rms_norm(X, W, out=out(8, 64, dtype=torch.float32)), TypeError, "out is float32[8,64] on cpu; needed bfloat16, which is the dtype of y here: make it with torch.empty_like(x, dtype=torch.bfloat16)"),
    "out of the dtype of x, not of y": (lambda: rms_norm(X, W.float(), out=out(8, 64)), TypeError, "out is bfloat16[8,64] on cpu; needed float32, which is the dtype of y here: make it with torch.empty_like(x, dtype=torch.float32)"),
    "out on another device": (lambda: rms_norm(X, W, out=out(8, 64).to("meta")), ValueError, "out is on meta but x is on cpu; make it with device=x.device"),
    "out is expanded": (lambda: rms_norm(X, W, out=out(64).expand(8, 64)), ValueError, "out is bfloat16[8,64] on cpu with strides (0, 1), so several of its elements are one; needed memory of its own for each: pass a tensor that was not expanded"),
    "out is x shifted by a row": (lambda: rms_norm(FLAT[64:576].view(8, 64), W, out=FLAT[:512].view(8, 64)), ValueError, "out overlaps x without being x: rows would be written before they are read; pass out=x to work in place, or memory of its own"),
    "out is x shifted, through another storage": (lambda: rms_norm(ROWS[1:9], out=torch.from_numpy(ROWS.numpy())[:8]), ValueError, "out overlaps x without being x: rows would be written before they are read; pass out=x to work in place, or memory of its own"),
    "out is a window over itself": (lambda: rms_norm(torch.zeros(8, 64), out=torch.zeros(128).unfold(0, 64, 1)[:8]), ValueError, "out is float32[8,64] on cpu with strides (1, 1), so several of its elements are one; needed memory of its own for each: pass a tensor that was not expanded"),
    "out is x transposed": (lambda: rms_norm(FLAT.view(32, 32), out=FLAT.view(32, 32).T), ValueError, "out overlaps x without being x: rows would be written before they are read; pass out=x to work in place, or memory of its own"),
    "out contains the weight": (lambda: rms_norm(X, FLAT[:64], out=FLAT[:512].view(8, 64)), ValueError, "out overlaps weight, which every row reads; pass memory of its own"),
    "out while x requires grad": (lambda: rms_norm(X.clone().requires_grad_(), W, out=out(8, 64)), ValueError, "out= was given while an operand requires grad, and autograd cannot record that; needed torch.no_grad(), detached operands, or a call without out="),
    "out requires grad": (lambda: rms_norm(X, W, out=nn.Parameter(out(8, 64))), ValueError, "out requires grad, and autograd cannot record what is written to it; pass out.detach()"),
    "out is nested": (lambda: rms_norm(X, W, out=torch.nested.nested_tensor([W])), TypeError, "out is nested; needed plain memory to write to: make it with torch.empty_like(x)"),
    "out is negated lazily": (lambda: rms_norm(X, W, out=torch._neg_view(X)), TypeError, "out is negated lazily; needed plain memory to write to: make it with torch.empty_like(x)"),
    "out is a zero tensor": (lambda: rms_norm(X, W, out=torch._efficientzerotensor(8, 64)), TypeError, "out is a zero tensor without memory; needed plain memory to write to: make it with torch.empty_like(x)"),
    "out is uninitialised": (lambda: rms_norm(X, W, out=nn.UninitializedParameter()), TypeError, "out is not initialised yet; needed memory to write to: make it with torch.empty_like(x)"),
    "out of inference mode": (lambda: rms_norm(X, W, out=torch.inference_mode()(lambda: out(8, 64))()), ValueError, "out was made in torch.inference_mode, and torch allows no writing to it outside; pass out.clone(), or call inside torch.inference_mode"),
    # SGLang's function
    "rmsnorm_hf of three axes": (lambda: rmsnorm_hf(X.view(2, 4, 64), W), ValueError, "input has shape (2, 4, 64); needed (rows, n): pass input.reshape(-1, input.shape[-1])"),
    "rmsnorm_hf of float32": (lambda: rmsnorm_hf(X.float(), W.float()), RuntimeError, "rmsnorm_hf: input must be fp16 or bf16, got torch.float32; for float32 call rms_norm"),
    "rmsnorm_hf of two dtypes": (lambda: rmsnorm_hf(X, W.float()), RuntimeError, "rmsnorm_hf: weight must have the dtype of input, got torch.float32 and torch.bfloat16; for mixed dtypes call rms_norm"),
    "rmsnorm_hf without a weight": (lambda: rmsnorm_hf(X, None), TypeError, "weight is a NoneType; needed a torch.Tensor: wrap it with torch.as_tensor"),
    # the operators
    "operator with a negative eps": (lambda: torch.ops.pallas_norm.rms_norm(X, W, -1.0, True, 0.0), ValueError, "eps is -1.0; needed eps >= 0: it is added to a mean of squares"),  # noqa: FBT003
    "operator with an offset alone": (lambda: torch.ops.pallas_norm.rms_norm(X, None, 1e-6, True, 1.0), ValueError, "weight_offset is 1.0 but weight is None: there is nothing to add it to; pass a weight"),  # noqa: FBT003
    "operator with a short dy": (lambda: torch.ops.pallas_norm.rms_norm_backward(X, W, torch.ones(8), X[:4], None, 1e-6, True, 0.0, True), ValueError, "dy has shape (4, 64); needed (8, 64), which belongs to x"),  # noqa: FBT003
    "operator with rstd of 16 bits": (lambda: backward(rstd=torch.ones(8).bfloat16()), TypeError, "rstd is bfloat16[8] on cpu; needed float32: cast it first"),
    "operator with rstd of one row": (lambda: backward(rstd=torch.ones(1)), ValueError, "rstd has shape (1,); needed (8,), which belongs to x"),
    "operator with a dy elsewhere": (lambda: backward(dy=X.to("meta")), ValueError, "dy is on meta but x is on cpu; move one of them with .to"),
    "operator with a dy of integers": (lambda: backward(dy=X.int()), TypeError, "dy is int32[8,64] on cpu; needed bfloat16, float16, float32: cast it first"),
    "operator with a ds that is wider than x": (lambda: backward(ds=X.float()), TypeError, "ds is float32[8,64] on cpu; needed bfloat16: cast it first"),
    "operator of 8 bits with a negative eps": (lambda: quantized(eps=-5.0), ValueError, "eps is -5.0; needed eps >= 0: it is added to a mean of squares"),
    "operator of 8 bits with an offset alone": (lambda: quantized(weight=None, weight_offset=1.0), ValueError, "weight_offset is 1.0 but weight is None: there is nothing to add it to; pass a weight"),
    "operator of 8 bits with 16": (lambda: quantized(dtype=torch.bfloat16), TypeError, "dtype is bfloat16; needed torch.float8_e4m3fn or torch.int8, the dtype of q"),
    "operator of 8 bits with groups of 3": (lambda: quantized(group=3), ValueError, "group_size is 3; needed 128, or None for one scale for each row"),
    "operator of 8 bits with two scales": (lambda: quantized(scale=torch.ones(2)), ValueError, "scale is float32[2] on cpu; needed one number: pass scale=None to compute one for each row"),
    # the others
    "module with an offset alone": (lambda: RMSNorm(64, with_weight=False, weight_offset=1.0), ValueError, "weight_offset is 1.0 but weight is None: there is nothing to add it to; pass a weight"),
    "module of a text as eps": (lambda: RMSNorm(64, eps="1e-6"), TypeError, "eps is str; needed a Python float: pass float(eps)"),
    "module of a negative eps": (lambda: RMSNorm(64, eps=-1.0), ValueError, "eps is -1.0; needed eps >= 0: it is added to a mean of squares"),
    "module of no size": (lambda: RMSNorm(-1), ValueError, "hidden_size is below 1; needed the length of a row"),
    "module of a huge size": (lambda: RMSNorm(2**70), ValueError, "hidden_size is beyond int64; needed the length of a row"),
    "module of two axes": (lambda: RMSNorm((8, 64)), TypeError, "hidden_size is a tuple; needed an int: the length of the last axis"),
    "module of integers": (lambda: RMSNorm(64, dtype=torch.int32), TypeError, "dtype is int32; needed torch.bfloat16, torch.float16 or torch.float32"),
    "to_jax of four bits": (lambda: to_jax(torch.empty(4, dtype=torch.int4)), TypeError, "tensor is int4[4]; needed a dtype that JAX has too: view it as one, or cast it"),  # they came as int8
    "to_jax of a zero tensor": (lambda: to_jax(torch._efficientzerotensor(4)), TypeError, "tensor is a zero tensor without memory; needed one with: pass torch.zeros_like(tensor)"),
    "fused_add_rmsnorm of a list": (lambda: sglang.fused_add_rmsnorm([1.0], X, W), TypeError, "input is a list; needed a torch.Tensor: wrap it with torch.as_tensor"),  # it was asked for its dtype
    "to_jax of a nested tensor": (lambda: to_jax(torch.nested.nested_tensor([W])), TypeError, "tensor is nested; needed a plain one: pass tensor.to_padded_tensor(0.0)"),
    "to_torch of four bits": (lambda: to_torch(jnp.ones(4, "int4")), TypeError, "array is int4[4]; needed a dtype that torch has too: cast it with astype"),
    "to_torch of a key": (lambda: to_torch(jax.random.key(0)), TypeError, "array is key<fry>[]; needed a dtype that torch has too: cast it with astype"),
    "to_jax of a quantized tensor": (lambda: to_jax(torch.quantize_per_tensor(torch.zeros(4, 64), 0.1, 0, torch.qint8)), TypeError, "tensor is quantized (torch.qint8); needed a plain tensor: pass tensor.dequantize()"),
    "explain of float64": (lambda: explain(64, torch.float64, "cpu"), TypeError, "dtype is float64; needed torch.bfloat16, torch.float16 or torch.float32: cast x with x.to"),
    "explain of a name": (lambda: explain(64, "float32", "cpu"), TypeError, "dtype is a str; needed torch.bfloat16, torch.float16 or torch.float32: cast x with x.to"),
    "explain of an array": (lambda: explain(64, np.zeros(2), "cpu"), TypeError, "dtype is a ndarray; needed torch.bfloat16, torch.float16 or torch.float32: cast x with x.to"),
    "explain of no length": (lambda: explain(0, torch.float32, "cpu"), ValueError, "n is 0; needed the length of a row, at least 1"),
    "explain of a float": (lambda: explain(64.0, torch.float32, "cpu"), TypeError, "n is a float; needed an int: the length of the last axis"),
    "to_jax of a view": (lambda: to_jax(X[:, :32]), ValueError, "tensor is bfloat16[8,32] and has strides (64, 1), which is not contiguous, so JAX would copy it; needed memory that can be shared: pass copy=True, or tensor.clone(memory_format=torch.contiguous_format)"),
    "call_jax of two devices": (lambda: call_jax(lambda x, y: x, X, X.to("meta")), ValueError, "tensor is on the device meta; needed one of cpu, cuda: move it with tensor.to first"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(nested|quantize|Sparse).*:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_this_message(
    call: Callable[[], Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*_: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(_library, "forward", launched)
    monkeypatch.setattr(_library, "backward", launched)
    before = [tensor.clone() for tensor in (X, W, FLAT)]
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert type(caught.value) is error
    for tensor, expected in zip((X, W, FLAT), before, strict=True):
        assert torch.equal(bits(tensor), bits(expected))


def test_there_are_forty_rows_at_least() -> None:
    assert len(REFUSED) >= 40


@pytest.mark.parametrize("wrong", [{"weight": W[:32]}, {"eps": -1.0}, {"weight_offset": None}])
def test_out_is_untouched_by_a_refused_call(wrong: dict[str, Any]) -> None:
    target = out(8, 64)
    with pytest.raises((TypeError, ValueError)):
        rms_norm(X, **({"weight": W} | wrong), out=target)
    assert bool(target.isnan().all())


def test_what_looks_odd_and_is_right() -> None:
    assert rms_norm(X, W, 0).dtype == torch.bfloat16  # eps = 0 is legal, and an int is a number
    assert torch.equal(rms_norm(X, W, Half(1e-6)), rms_norm(X, W))
    assert torch.equal(rms_norm(X, nn.Parameter(W)), rms_norm(X, W))
    columns = torch.zeros(8, 128, dtype=torch.bfloat16)
    columns[:, :64] = X
    assert rms_norm(columns[:, :64], W, out=columns[:, 64:]) is not None  # interleaved, and nothing overlaps
    assert torch.equal(columns[:, 64:], rms_norm(X, W))
    assert torch.equal(columns[:, :64], X)
    leaf = nn.Parameter(X.clone())
    with torch.no_grad():  # as torch's own functions in place
        assert rms_norm(leaf, W, out=leaf) is leaf
    assert torch.equal(leaf.detach(), rms_norm(X, W))
    joined = torch.cat([X.flatten(), W])
    assert torch.equal(rms_norm(joined[:512].view(8, 64), joined[512:]), rms_norm(X, W))


@pytest.mark.gpu
def test_devices_that_do_not_match() -> None:
    message = "weight is on cpu but x is on cuda:0; move one of them with .to"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rms_norm(X.cuda(), W)
    rms_norm(X.cuda(), W.cuda())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):  # a prepared call does not go past it
        rms_norm(X.cuda(), W)
    with pytest.raises(ValueError, match=r"^weight has shape \(32,\) but the last axis of x has length 64"):
        rms_norm(X.cuda(), W.cuda()[:32])
    with pytest.raises(TypeError, match=r"^eps is a tensor"):
        rms_norm(X.cuda(), W.cuda(), torch.tensor(1e-6))
    flat = FLAT.cuda()
    with pytest.raises(ValueError, match=r"^out overlaps x without being x"):
        rms_norm(flat[64:576].view(8, 64), W.cuda(), out=flat[:512].view(8, 64))
