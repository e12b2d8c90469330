"""Does a provider compute the case at all, and where does it round?

Rounding is judged on the host, on rows spread over the case's own output, so it is the measured program that is judged
(XLA rounds differently in different programs):

    HF      round(x * rstd), then round(weight * that)
    single  round(weight * (x * rstd))
    other   neither

each from float64 statistics. Of dx: with g = dy * weight rounded, as Hugging Face's autograd does, or not. In float32
the two are one, and the last bit of rstd moves every output: `float32`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_norm import reference

from .accuracy import hf_steps, ordered, single_rounding
from .operands import EPS, Operands

JUDGED = 1 << 18  # outputs of 16-bit cases
SHARE = 0.01  # of the outputs that may differ: a wrong rounding changes a quarter, another order of a sum 0.01 %
OUTPUTS = {"forward": ("y",), "add": ("y", "s"), "backward": ("dx", "dweight")}


def outputs_of(operands: Operands, result: Any) -> dict[str, jax.Array]:
    """By name and as JAX arrays, on the same memory; dx and y as (rows, n)."""
    case = operands.case
    values = result if isinstance(result, tuple | list) else (result,)
    found = {}
    for name, value in zip(OUTPUTS[case.operation], values, strict=True):
        if not isinstance(value, jax.Array):
            value = jnp.from_dlpack(value.detach().contiguous())
        found[name] = value if name == "dweight" else value.reshape(case.rows, case.n)
    return found


def poison(operands: Operands, *, torch: bool) -> None:
    """NaN in the memory that the next outputs most likely get: blocks of their sizes, freed at once. An output that a
    kernel forgets to write is then no leftover of an earlier, right one."""
    case = operands.case
    shapes = [(case.n,) if name == "dweight" else (case.rows, case.n) for name in OUTPUTS[case.operation]]
    if torch:
        from torch import full

        tensors = [
            full(shape, float("nan"), dtype=operands.tensors["x"].dtype, device=operands.tensors["x"].device)
            for shape in shapes
        ]
        del tensors
        return
    for array in [jax.block_until_ready(jnp.full(shape, jnp.nan, case.dtype)) for shape in shapes]:
        array.delete()


@functools.partial(jax.jit, static_argnums=(2,))
def _wrong(arrays: dict[str, jax.Array], outputs: dict[str, jax.Array], operation: str) -> jax.Array:
    x, weight = arrays["x"], arrays["weight"]
    if operation == "add":
        x = reference.add(x, arrays["residual"])
    y, rstd = reference.forward(x, weight, eps=EPS)
    expected = {"y": y, "s": x}
    if operation == "backward":
        dx, dweight = reference.backward(x, weight, rstd, arrays["dy"])
        expected = {"dx": dx, "dweight": dweight}
    ulps = 8 * jnp.finfo(x.dtype).eps
    count = jnp.int32(0)
    for name, output in outputs.items():
        right, own = expected[name].astype(jnp.float32), output.astype(jnp.float32)
        # Gradients and sums cancel, so part of the bound is that of a typical element.
        bound = ulps * (jnp.abs(right) + jnp.sqrt(jnp.mean(right * right)))
        count += jnp.sum(~(jnp.abs(own - right) <= bound))  # a NaN is wrong
    return count


def wrong_outputs(operands: Operands, outputs: dict[str, jax.Array]) -> int:
    """How many outputs of the whole case are further than a few units in the last place from the reference, or NaN."""
    return int(_wrong(operands.arrays, outputs, operands.case.operation))


def _sampled_rows(rows: int, n: int) -> np.ndarray:
    """Evenly spread, first and last among them."""
    return np.unique(np.linspace(0, rows - 1, min(rows, max(2, JUDGED // n))).round().astype(np.int64))


def _replays(operands: Operands) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sampled rows, their outputs with HF's rounding, with a single one), of float64 statistics and as `ordered`."""
    case = operands.case
    chosen = _sampled_rows(case.rows, case.n)
    taken = {name: np.asarray(value[chosen]) for name, value in operands.arrays.items() if name != "weight"}
    x, weight = taken["x"], np.asarray(operands.arrays["weight"])
    if case.operation == "add":
        x = (x.astype(np.float32) + taken["residual"].astype(np.float32)).astype(x.dtype)
    rstd = 1 / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1) + np.float64(np.float32(EPS)))
    if case.operation != "backward":
        return chosen, ordered(hf_steps(x, weight, rstd)), ordered(single_rounding(x, weight, rstd))
    unit, g = x.astype(np.float64) * rstd[:, None], taken["dy"].astype(np.float32) * weight.astype(np.float32)

    def dx(g: np.ndarray) -> np.ndarray:
        g = g.astype(np.float64)
        return ordered((rstd[:, None] * (g - unit * np.mean(g * unit, axis=1, keepdims=True))).astype(x.dtype))

    return chosen, dx(g.astype(x.dtype)), dx(g)


def judge(operands: Operands, outputs: dict[str, jax.Array]) -> dict[str, Any]:
    """Shares of sampled outputs that differ from either rounding, and the verdict."""
    case = operands.case
    if case.dtype == "float32":
        return {"rounding": "float32"}
    if operands.replays is None:  # the same for every provider
        operands.replays = _replays(operands)
    chosen, *replays = operands.replays
    own = ordered(np.asarray(outputs["dx" if case.operation == "backward" else "y"][chosen]))
    hf, single = (float(np.mean(own != replay)) for replay in replays)
    return {
        "rounding": verdict(hf, single),
        "judged": int(own.size),
        "differ_from_hf": round(hf, 7),
        "differ_from_single": round(single, 7),
    }


def verdict(differ_from_hf: float, differ_from_single: float) -> str:
    if min(differ_from_hf, differ_from_single) > SHARE:
        return "other"
    return "HF" if differ_from_hf <= differ_from_single else "single"
