"""How far each provider's outputs are from Hugging Face's rounding, in shares of outputs and in units in the last
place.

exact     HF's rounding with exact statistics: rstd from float64, then HF's own steps in float32
HF eager  LlamaRMSNorm as it runs on this machine: its float32 sum differs from the exact one in the last bit
single    the weight multiplied in float32 and one rounding, with exact statistics
replay    HF's steps from the provider's own rstd: 0 for ours, whatever its sums
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import pallas_norm

from . import peers
from .calls import AbsentError, Call, failure
from .operands import Operands
from .suite import ACCURACY, ACCURACY_ELEMENTS, Case

EPS = 1e-6
PEERS: dict[str, Callable[[Operands], Call]] = {
    "Liger": peers.liger,
    "Liger functional": peers.liger_functional,
    "Quack": peers.quack,
    "SGLang": peers.sglang,
    "FlashInfer": peers.flashinfer,
}
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


def hf_steps(x: np.ndarray, weight: np.ndarray, rstd: np.ndarray) -> np.ndarray:
    unit = (x.astype(np.float32) * rstd[:, None].astype(np.float32)).astype(x.dtype)
    return (unit.astype(np.float32) * weight.astype(np.float32)).astype(x.dtype)


def single_rounding(x: np.ndarray, weight: np.ndarray, rstd: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float32) * rstd[:, None].astype(np.float32)
    return (wide * weight.astype(np.float32)).astype(x.dtype)


def ordered(values: np.ndarray) -> np.ndarray:
    """Integers in the order of the floats: neighbours differ by one, -0 and 0 by one as well."""
    bits = values.view({2: np.int16, 4: np.int32}[values.dtype.itemsize]).astype(np.int64)
    smallest = -(1 << (8 * values.dtype.itemsize - 1))
    return np.where(bits < 0, smallest - bits - 1, bits)


def _to_torch(value: np.ndarray) -> Any:
    import torch

    if value.dtype.itemsize == 2:
        dtype = torch.float16 if value.dtype == np.float16 else torch.bfloat16
        return torch.from_numpy(value.view(np.int16)).view(dtype).cuda()
    return torch.from_numpy(value).cuda()


def _to_numpy(tensor: Any, dtype: np.dtype) -> np.ndarray:
    import torch

    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    return tensor.contiguous().view(integer).cpu().numpy().view(dtype)


def providers(x: np.ndarray, weight: np.ndarray) -> dict[str, Callable[[], tuple[np.ndarray, np.ndarray | None]]]:
    """(y, its own rstd or None) by provider."""

    def ours(implementation: str) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        def call() -> tuple[np.ndarray, np.ndarray | None]:
            y, rstd = pallas_norm.rms_norm(
                jnp.asarray(x), jnp.asarray(weight), eps=EPS, implementation=implementation, return_rstd=True
            )
            return np.asarray(y), np.asarray(rstd)

        return call

    def torch_norm(kind: str) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        def call() -> tuple[np.ndarray, np.ndarray | None]:
            import torch
            from transformers.models.llama.modeling_llama import LlamaRMSNorm

            tensor, own = _to_torch(x), _to_torch(weight)
            module = LlamaRMSNorm(x.shape[1], eps=EPS).to(device=tensor.device, dtype=tensor.dtype)
            module.weight.data.copy_(own)
            with torch.no_grad():
                if kind == "HF eager":
                    y = module(tensor)
                elif kind in PEERS:
                    operands = Operands(Case("forward", *x.shape, dtype=str(x.dtype)))
                    operands.tensors = {"x": tensor, "weight": own}
                    y = PEERS[kind](operands).run()
                else:
                    y = torch.nn.functional.rms_norm(tensor, tensor.shape[1:], own, EPS)
            return _to_numpy(y, x.dtype), None

        return call

    return {
        "HF eager": torch_norm("HF eager"),
        "pallas-norm": ours("mosaic_gpu"),
        "XLA": ours("xla"),
        "F.rms_norm": torch_norm("F.rms_norm"),
        **{name: torch_norm(name) for name in PEERS},
    }


def run() -> list[dict[str, Any]]:
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for n in ACCURACY:
            rng = np.random.default_rng(n)
            count = -(-ACCURACY_ELEMENTS // n)
            x = (3 * rng.standard_normal((count, n), dtype=np.float32)).astype(dtype)
            weight = (1 + 0.3 * rng.standard_normal(n)).astype(dtype)
            rstd64 = 1 / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1) + np.float64(np.float32(EPS)))
            exact, single = hf_steps(x, weight, rstd64), single_rounding(x, weight, rstd64)
            eager = None
            for provider, call in providers(x, weight).items():
                try:
                    y, rstd = call()
                except Exception as error:  # a peer that is not there, or does not take these rows
                    if provider not in PEERS:
                        raise
                    reason = str(error) if isinstance(error, AbsentError) else failure(error)
                    rows.append({"dtype": dtype_name, "n": n, "provider": provider, "reason": reason})
                    continue
                eager = y if eager is None else eager
                distance = ordered(y) - ordered(exact)
                row = {
                    "dtype": dtype_name,
                    "n": n,
                    "elements": x.size,
                    "provider": provider,
                    "differ_from_exact": int((distance != 0).sum()),
                    "differ_from_hf_eager": int((ordered(y) != ordered(eager)).sum()),
                    "differ_from_single_rounding": int((ordered(y) != ordered(single)).sum()),
                    "max_ulp_from_exact": int(np.abs(distance).max()),
                    "mean_signed_ulp_from_exact": float(distance.mean()),
                }
                if rstd is not None:
                    row["differ_from_replay"] = int((ordered(y) != ordered(hf_steps(x, weight, rstd))).sum())
                    error = np.abs(rstd.astype(np.float64) - rstd64) / np.spacing(rstd64.astype(np.float32))
                    row["max_rstd_ulp"] = round(float(error.max()), 3)
                rows.append(row)
                shares = {
                    key: row[key]
                    for key in ("differ_from_exact", "differ_from_hf_eager", "differ_from_single_rounding")
                }
                print(f"{dtype_name:8} {n:6} {provider:12}", shares, row.get("differ_from_replay", ""), flush=True)
    return rows
