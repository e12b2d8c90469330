"""Libraries of norms for torch, where they are installed."""

from __future__ import annotations

from typing import Any

from .calls import AbsentError, Call, module, needs_gpu
from .operands import EPS, Operands
from .torch_baselines import Norm, torch_call

COPIES = "copies the slice first"


# In place, a backward pass overwrites dy and cannot be repeated.
LIGER_OPTIONS = {"eps": EPS, "offset": 0.0, "casting_mode": "llama", "in_place": False}


def liger(operands: Operands) -> Call:
    needs_gpu("Liger")
    norm = module("liger_kernel.ops.rms_norm", "Liger").LigerRMSNormFunction.apply
    options, add = tuple(LIGER_OPTIONS.values()), None
    if operands.case.operation == "add":
        fused = module("liger_kernel.ops.fused_add_rms_norm", "Liger").LigerFusedAddRMSNormFunction.apply

        def add(x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
            return fused(x, residual, weight, *options)

    note = COPIES if operands.case.heads else ""
    return torch_call(operands, lambda weight: lambda x: norm(x, weight, *options), add, note)


def liger_functional(operands: Operands) -> Call:
    """Liger's newer entry, which picks an implementation by the GPU; its forward on Hopper may round once."""
    needs_gpu("Liger")
    norm = module("liger_kernel.functional", "Liger").rms_norm
    note = COPIES if operands.case.heads else ""
    options = {"offset": 0.0, "casting_mode": "llama", "in_place": False}
    return torch_call(operands, lambda weight: lambda x: norm(x, weight, EPS, **options), None, note)


def quack(operands: Operands) -> Call:
    needs_gpu("Quack")
    library = module("quack.rmsnorm", "Quack")

    def make(weight: Any) -> Norm:
        if operands.case.operation == "backward":
            return lambda x: library.rmsnorm(x, weight, eps=EPS)
        return lambda x: library.rmsnorm_fwd(x.reshape(-1, x.shape[-1]), weight, eps=EPS)[0]

    def add(x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
        return library.rmsnorm_fwd(x, weight, residual=residual, eps=EPS)[:2]

    return torch_call(operands, make, add, COPIES if operands.case.heads else "")


def _sglang_module() -> Any:
    """Where SGLang keeps its rounding: from 0.5.23, and before."""
    try:
        return module("sglang.kernels.ops.layernorm.rmsnorm_hf", "SGLang")
    except AbsentError as newer:
        try:
            return module("sglang.jit_kernel.rmsnorm_hf", "SGLang")
        except AbsentError:
            raise newer from None


def sglang(operands: Operands) -> Call:
    needs_gpu("SGLang")
    library, case = _sglang_module(), operands.case
    if case.operation == "backward":
        raise AbsentError("SGLang's rmsnorm_hf has no backward pass")
    if case.dtype == "float32":
        raise AbsentError("SGLang's rmsnorm_hf takes 16-bit rows only")
    if not library.is_supported_rmsnorm_hf_hidden_size(case.n):
        raise AbsentError(f"SGLang's rmsnorm_hf does not take rows of {case.n}")
    note, norm = COPIES if case.heads else "", library.rmsnorm_hf
    return torch_call(operands, lambda weight: lambda x: norm(x.reshape(-1, case.n), weight, EPS), None, note)


def flashinfer(operands: Operands) -> Call:
    """Its fused sum works in place, on both operands: it cannot be repeated, so the two steps are measured."""
    needs_gpu("FlashInfer")
    norm, case = module("flashinfer.norm", "FlashInfer").rmsnorm, operands.case
    if case.operation == "backward":
        raise AbsentError("FlashInfer's rmsnorm has no backward pass")
    if case.dtype == "float32":
        raise AbsentError("FlashInfer's rmsnorm takes 16-bit rows only")
    note = COPIES if case.heads else ""
    return torch_call(operands, lambda weight: lambda x: norm(x.reshape(-1, case.n), weight, EPS), None, note)
