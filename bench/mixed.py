"""python -m bench mixed: calls whose dtypes differ, and additions in place, beside the copy kernel that moves their
bytes; and how many kernels the patched norm of Gemma 2 is."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

from . import results
from .copy_kernel import copy
from .timing import Flush, Timing, measure

SHAPES = ((16384, 4096), (16384, 2048), (65536, 128), (8192, 8192))
BF16, F32 = torch.bfloat16, torch.float32
UNIT = 2  # bytes of an element of what the copy kernel moves


@dataclasses.dataclass(frozen=True)
class Case:
    """Dtypes of the operands, and the options."""

    name: str
    x: torch.dtype
    residual: torch.dtype | None
    weight: torch.dtype
    y: torch.dtype
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    in_place: bool = False

    @property
    def arrays(self) -> tuple[int, int]:
        """Arrays of bfloat16 that are read, and that are written, with as many bytes."""
        s = self.residual
        sizes = [[dtype.itemsize // UNIT for dtype in side if dtype] for side in ((self.x, s), (self.y, s))]
        return sum(sizes[0]), sum(sizes[1])


STREAM = {"out_dtype": BF16, "unit_dtype": BF16}
CASES = (
    Case("all bfloat16", BF16, None, BF16, BF16),
    Case("float32 weight", BF16, None, F32, BF16, {"out_dtype": BF16}),
    Case("float32 weight, rounded", BF16, None, F32, BF16, {"round_weight": True}),
    Case("float32 weight, one rounding", BF16, None, F32, BF16, {"out_dtype": BF16, "cast_before_scale": False}),
    Case("float32 x", F32, None, F32, BF16, {"round_weight": True, **STREAM}),
    Case("add", BF16, BF16, BF16, BF16),
    Case("add in place", BF16, BF16, BF16, BF16, in_place=True),
    Case("add to a float32 stream", BF16, F32, F32, BF16, {"round_weight": True, **STREAM}),
    Case("the same in place", BF16, F32, F32, BF16, {"round_weight": True, **STREAM}, in_place=True),
)


def _call(case: Case, rows: int, n: int) -> Callable[[], Any]:
    from pallas_norm_torch import add_rms_norm, rms_norm

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    x, weight = draw(rows, n, dtype=case.x), draw(n, dtype=case.weight)
    if case.residual is None:
        return functools.partial(rms_norm, x, weight, **case.options)
    residual = draw(rows, n, dtype=case.residual)
    places = {"out": x, "s_out": residual} if case.in_place else {}
    return functools.partial(add_rms_norm, x, residual, weight, **case.options, **places)


def _copy(case: Case, rows: int, n: int) -> Callable[[], Any]:
    read, written = case.arrays
    arrays = [jnp.ones((rows, n), jnp.bfloat16) + i for i in range(read)]
    step = jax.jit(functools.partial(copy, outputs=written))
    return lambda: step(arrays)


def _row(case: Case, rows: int, n: int, own: Timing, limit: Timing) -> dict[str, Any]:
    share = limit.median_us / own.median_us
    return {
        "case": case.name,
        "rows": rows,
        "n": n,
        "of_copy": round(share, 4),
        "copy_us": limit.median_us,
        **own.row(),
    }


def gemma(flush: Flush, repetitions: int) -> list[dict[str, Any]]:
    """Gemma 2's norm with float32 weights: patched, as the patch was (y in float32, then a pass), and as it is."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    from pallas_norm_torch import rms_norm
    from pallas_norm_torch.huggingface import patch

    rows, n = 16384, 2304
    x = torch.randn(rows, n, device="cuda").to(BF16)
    own, patched = (torch.nn.Sequential(Gemma2RMSNorm(n, eps=1e-6)).cuda() for _ in range(2))
    torch.nn.init.normal_(own[0].weight, std=0.1)
    patched.load_state_dict(own.state_dict())
    patch(patched)
    weight = own[0].weight.detach()
    calls: dict[str, Callable[[], Any]] = {
        "patched": lambda: patched(x),
        "as it was patched": lambda: rms_norm(x, weight, 1e-6, cast_before_scale=False, weight_offset=1.0).to(x.dtype),
        "transformers": lambda: own(x),
    }
    with torch.no_grad():
        assert torch.equal(patched(x), calls["as it was patched"]())
        timings = measure(calls, repetitions=repetitions, flush=flush)
    return [{"case": f"Gemma2RMSNorm, {name}", "rows": rows, "n": n, **one.row()} for name, one in timings.items()]


def run(arguments: argparse.Namespace) -> int:
    flush, rows = Flush(), list[dict[str, Any]]()
    with torch.no_grad():
        for shape in SHAPES:
            calls = {case.name: _call(case, *shape) for case in CASES}
            copies = {case.arrays: _copy(case, *shape) for case in CASES}
            named = calls | {f"copy {arrays}": call for arrays, call in copies.items()}
            timings = measure(named, repetitions=arguments.repetitions, flush=flush)
            rows += [_row(case, *shape, timings[case.name], timings[f"copy {case.arrays}"]) for case in CASES]
            del calls, copies, named
            torch.cuda.empty_cache()
    rows += gemma(flush, arguments.repetitions)
    out: Path = arguments.out or results.default_path("mixed")
    path = results.write(out.stem, rows, out.parent, arguments.commit)
    for row in rows:
        share = f"{row['of_copy']:.3f} of the copy kernel" if "of_copy" in row else ""
        time = f"{row['median_us']:8.2f} us {row['kernels']} kernels {share}"
        print(f"{row['rows']:6} x {row['n']:5}  {row['case']:34} {time}")
    print(f"wrote {path}")
    return 0
