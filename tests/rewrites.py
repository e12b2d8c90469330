"""Rewrites of the real kernels' text, and of the specification's, that the suite must kill.

The properties that kill them are in test_rewrites.py, and where a thread has to come late in test_gpu_mutants.py; those
of other forms are beside what kills them, in test_quantized_mutants.py and the like. A bug that was found once is a
rewrite, or a mutant of mutants.py, for ever.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks


class Rewrite(NamedTuple):
    """One replacement in the text of a module of pallas_norm.kernels, or of pallas_norm, and what else has to change
    for the kernel to run."""

    module: str
    old: str
    new: str
    n: int = 1000  # a row length that reaches the line
    rows: int = 21  # five blocks of four rows, and one left over
    dtype: str = "bf16"  # whose squares are exact, and so are sums of a few: f32 where their order is to show
    also: tuple[str, str] = ("", "")


SOURCE: dict[str, Rewrite] = {
    "overlap counted twice": Rewrite("block", "if self.plan.overlap:", "if False:"),
    "overlap mask one off": Rewrite("block", "self._position() >= self", "self._position() > self"),
    "only the last chunk summed": Rewrite("block", "functools.reduce(jnp.add, [*rest, last])", "last"),
    "columns not added as neighbours": Rewrite(
        "_row_sum", "zip(values[::2], values[1::2]", "zip(values[: len(values) // 2], values[len(values) // 2 :]"
    ),
    "blocks added from the last one on": Rewrite(
        "block",
        "functools.reduce(jnp.add, [*rest, last])",
        "functools.reduce(jnp.add, [last, *rest[::-1]])",
        dtype="f32",
    ),
    "an approximate root": Rewrite("ieee", "return as_compiled(", "return jax.lax.rsqrt("),
    "warps added one after the other": Rewrite(
        "cta", "zip(left[::2], left[1::2], strict=True)]", "[left[:2]]] + left[2:]", n=12288, rows=9
    ),
    "no rounding before the weight": Rewrite("forward", "unit = block.narrowed(unit, dtypes.unit).astype(F32)", "unit = unit"),  # noqa: E501
    "mean over what is read": Rewrite("block", "(total, self.plan.n", "(total, self.plan.span * self.plan.chunks"),
    "no eps": Rewrite("forward", "block.end_sum(begun), eps)", "block.end_sum(begun), 0.0)"),
    "left-over rows misplaced": Rewrite(
        "grid", "program - extent.first_left + extent.blocks * plan.block", "program - extent.first_left"
    ),
    "one warpgroup's sum missing": Rewrite(
        "cta", "range(self.plan.warpgroups * parts)", "range(self.plan.warpgroups * parts // 2)", n=12288, rows=3
    ),
    "one warp's sum missing": Rewrite("cta", "for w in range(WARPS)", "for w in (0, 1, 2, 2)", n=12288, rows=3),
    "warpgroups all read the first part": Rewrite(
        "cta", "first = self._worker() * self.plan.parts", "first = 0", n=12288, rows=3
    ),
    "s not rounded before the norm": Rewrite(
        "forward",
        "block.narrowed(a.astype(F32) + b.astype(F32), dtype)",
        "(a.astype(F32) + b.astype(F32))",
        also=("block.store(self.s, s)", "block.store(self.s, [chunk.astype(self.s.dtype) for chunk in s])"),
    ),
    "s truncated": Rewrite(
        "forward",
        "block.narrowed(a.astype(F32) + b.astype(F32), dtype)",
        "jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(a.astype(F32) + b.astype(F32), jnp.int32) & -65536, "
        "F32).astype(dtype)",
    ),
    "backward: dy * weight not rounded": Rewrite("backward", "block.widened(block.narrowed(g, dtype))", "g"),
    "backward: no projection": Rewrite("backward", "g - block.product(unit, mean)", "g"),
    "backward: ds dropped": Rewrite("backward", 'if "ds" in given:', "if False:"),
    "backward: dweight of the last row only": Rewrite("backward", "partials.append(partial[i] + ", "partials.append("),
    "backward: every step the first row": Rewrite(
        "grid", "return self.program + step * self.programs", "return self.program"
    ),
    "backward: rows of a block not added up": Rewrite(
        "warp", "functools.reduce(jnp.add, rows)", "rows[0]", n=128, rows=40
    ),
}  # fmt: skip

# Of the specification, which is also the XLA path.
REFERENCE: dict[str, Rewrite] = {
    "xla: no rounding before the weight": Rewrite(
        "reference", "unit = round_to(wide * rstd, dtypes.unit).astype(F32)", "unit = wide * rstd"
    ),
    "xla: columns not added as neighbours": Rewrite(
        "_row_sum", "zip(values[::2], values[1::2]", "zip(values[: len(values) // 2], values[len(values) // 2 :]"
    ),
    "xla: the last block added to others": Rewrite("_row_sum", "[(order.overlap, 0, 0)]", "[(0, order.overlap, 0)]"),
    "xla: products fused with sums": Rewrite("_row_sum", "jnp.where(jnp.isnan(rounded), -rounded, rounded)", "rounded"),
    "xla: divided by n": Rewrite("_row_sum", "np.float32(1) / np.float32(n)", "np.float32(1 / (n + 2.0**-8))"),
    "xla: a zero that is added": Rewrite("_row_sum", "F32(-0.0)", "F32(0.0)"),
    "xla: blocks added from the last one on": Rewrite(
        "_row_sum", "for block in range(1, whole)", "for block in range(whole - 1, 0, -1)", n=4096
    ),
    "xla: short rows in other columns": Rewrite(
        "plans.forward", "else without_kernel(n)", "else Order(n, without_kernel(n).width // 2)", n=31
    ),
    "xla: an approximate root": Rewrite(
        "_inverse_root",
        "F32(1) / lax.reduce_precision(lax.sqrt(values), exponent_bits=8, mantissa_bits=23)",
        "lax.rsqrt(values)",
    ),
    "xla: roots put right as if all places were as wide": Rewrite(
        "_inverse_root", "jnp.where(s == ONE, 2 * s, 4 * s)", "4 * s"
    ),
    "xla: g not rounded": Rewrite("reference", "g = round_to(g, dtypes.unit).astype(F32)", "pass"),
    "xla: subnormal float16 flushed": Rewrite(
        "reference",
        "    return wide.astype(dtype)",
        "    wide = lax.reduce_precision(wide, 5, 10) if dtype == jnp.float16 else wide\n    return wide.astype(dtype)",
    ),
    "xla: subnormal float16 g flushed": Rewrite(
        "reference",
        "g = round_to(g, dtypes.unit).astype(F32)",
        "g = (lax.reduce_precision(g, 5, 10) if x.dtype == jnp.float16 else round_to(g, x.dtype)).astype(F32)",
    ),
    "xla: mean over n + 1 in long rows": Rewrite(
        "reference",
        "row_mean(product(g, unit), order, axis_name, axis_index_groups)",
        "jnp.sum(g * unit, axis=-1, keepdims=True) / (x.shape[-1] + (x.shape[-1] > 4000))",
        n=4096,
    ),
    "xla: mean of squares over n + 1 in long rows": Rewrite(
        "reference",
        "row_mean(product(wide, wide), order, axis_name, axis_index_groups)",
        "jnp.sum(wide * wide, axis=-1, keepdims=True) / (x.shape[-1] + (x.shape[-1] > 4000))",
        n=4096,
    ),
    "xla: dweight of dy rounded to the dtype of x": Rewrite(
        "reference", "jnp.sum(dy.astype(F32) * unit", "jnp.sum(dy.astype(x.dtype).astype(F32) * unit"
    ),
    "xla: dweight of the unit not rounded": Rewrite(
        "reference",
        "    unit = round_to(unit, dtypes.unit).astype(F32)\n    return jnp.sum",
        "    return jnp.sum",
    ),
    "xla: dx not rounded before ds is added": Rewrite(
        "reference",
        "dx = round_to(product(g - product(unit, mean), rstd[..., None]), x.dtype)",
        "dx = product(g - product(unit, mean), rstd[..., None])",
        also=("return dx if ds is None", "return round_to(dx, x.dtype) if ds is None"),
    ),
}  # fmt: skip


# Of what the doctor compares; the test of test_selfcheck.py that kills it is its value there.
DOCTOR: dict[str, Rewrite] = {
    "bits not compared": Rewrite("_selfcheck", "_golden.digest(found) == bits[name] and not wrong", "not wrong"),
    "bits of the form without a residual": Rewrite("_golden", "if residual else", "if False else"),
    "no platform has specified bits": Rewrite("_doctor", 'device.platform == "cpu" or _is_nvidia(device)', "False"),
}


# Where dtypes are mixed: of mixed_dtypes.TRAINED, whose number `n` is.
MIXED: dict[str, Rewrite] = {
    "weight not rounded": Rewrite("weight", "if dtype != ref.dtype:", "if False:", n=2),
    "s rounded to the dtype of x": Rewrite("forward", "b.astype(F32), dtype) for", "b.astype(F32), a.dtype).astype(dtype) for", n=4),  # noqa: E501
    "unit rounded to the dtype of s": Rewrite("forward", "narrowed(unit, dtypes.unit)", "narrowed(unit, dtypes.s)", n=4),  # noqa: E501
    "y rounded to the dtype of s first": Rewrite("forward", "unit * factor, dtypes.y))", "unit * factor, dtypes.s).astype(dtypes.y))", n=7),  # noqa: E501
    "backward: g rounded to the dtype of s": Rewrite("backward", "factors, scale, dtypes.unit)", "factors, scale, dtypes.s)", n=4),  # noqa: E501
    "backward: dweight of a unit rounded to the dtype of s": Rewrite("backward", "block.rounded(unit, dtypes.unit)", "block.rounded(unit, dtypes.s)", n=5),  # noqa: E501
    "backward: rounded to the dtype of x before ds is added": Rewrite("backward", "mean), scale), dtypes.s)", "mean), scale), refs.dx.dtype).astype(dtypes.s)", n=4),  # noqa: E501
    "backward: dresidual is dx": Rewrite("backward", "dx if dx.dtype == ref.dtype else dx.astype(F32).astype(ref.dtype)", "dx.astype(refs.dx.dtype).astype(ref.dtype)", n=4),  # noqa: E501
    "xla: weight not rounded": Rewrite("reference", "return round_to(wide, dtype).astype(F32)", "return wide", n=2),
    "xla: s rounded to the dtype of x": Rewrite("reference", "residual.astype(F32), dtypes.s)", "residual.astype(F32), x.dtype).astype(dtypes.s)", n=4),  # noqa: E501
    "xla: unit rounded to the dtype of x": Rewrite("reference", "round_to(wide * rstd, dtypes.unit)", "round_to(wide * rstd, x.dtype)", n=4),  # noqa: E501
    "xla: y rounded to the dtype of x first": Rewrite("reference", "return round_to(y, dtypes.y)", "return round_to(round_to(y, x.dtype).astype(F32), dtypes.y)", n=7),  # noqa: E501
    "xla: g rounded to the dtype of x": Rewrite("reference", "g = round_to(g, dtypes.unit)", "g = round_to(g, x.dtype)", n=4),  # noqa: E501
    "xla: dweight of a unit rounded to the dtype of x": Rewrite("reference", "unit = round_to(unit, dtypes.unit)", "unit = round_to(unit, x.dtype)", n=5),  # noqa: E501
    "xla: dresidual is dx": Rewrite("reference", "narrowed(total, dtypes.dresidual)", "narrowed(narrowed(total, dtypes.dx), dtypes.dresidual)", n=4),  # noqa: E501
    "dtypes: unit as x": Rewrite("_dtypes", "unit = s if", "unit = jnp.dtype(x) if", n=9),
    "dtypes: cast_before_scale alone decides": Rewrite("_dtypes", "unit = s if unit_dtype is None else jnp.dtype(unit_dtype)", "unit = s", n=4),  # noqa: E501
    "dtypes: s as x": Rewrite("_dtypes", "jnp.dtype(x if residual is None else residual if s_dtype", "jnp.dtype(x if residual is None else x if s_dtype", n=7),  # noqa: E501
    "dtypes: s_dtype forgotten": Rewrite("_dtypes", "residual if s_dtype is None else s_dtype", "residual", n=8),
    "dtypes: a weight widened": Rewrite("_dtypes", "and unit.itemsize <= factor.itemsize", "", n=0),
}  # fmt: skip


def module_of(rewrite: Rewrite) -> types.ModuleType:
    names = (f"pallas_norm.{folder}{rewrite.module}" for folder in ("kernels.", ""))
    return next(sys.modules[name] for name in names if name in sys.modules)


METHODS = (types.FunctionType, property, functools.cached_property)


def _inherited(original: types.ModuleType, mutant: types.ModuleType) -> list[tuple[type, str, Any]]:
    """Gives the original's classes the mutant's methods, for the classes of other modules that derive from them."""
    undo: list[tuple[type, str, Any]] = []
    for name, new in list(vars(mutant).items()):
        if not isinstance(new, type) or new.__module__ != original.__name__:
            continue
        old = getattr(original, name)
        for attribute, method in list(vars(new).items()):
            if isinstance(method, METHODS) and attribute in vars(old):
                undo.append((old, attribute, vars(old)[attribute]))
                setattr(old, attribute, method)
    return undo


@contextlib.contextmanager
def rewritten(rewrite: Rewrite) -> Iterator[None]:
    """pallas_norm with the rewrite: every module that refers to something of the rewritten one refers to the new."""
    original = module_of(rewrite)
    text = inspect.getsource(original)
    for old in (rewrite.old, rewrite.also[0]):
        if old not in text:
            raise LookupError(f"{original.__name__} no longer contains {old!r}: rewrite the mutant")
    text = text.replace(rewrite.old, rewrite.new)
    if rewrite.also[0]:
        text = text.replace(*rewrite.also)
    jax.clear_caches()  # JAX knows a traced function by its name and place, and would take the right one for the mutant
    mutant = types.ModuleType(original.__name__)
    mutant.__package__ = original.__package__
    mutant.__dict__["__file__"] = original.__file__
    sys.modules[original.__name__] = mutant  # dataclasses look their module up while they are made
    undo: list[tuple[Any, str, Any]] = []
    try:
        exec(compile(text, original.__file__ or "", "exec"), mutant.__dict__)
        undo += _inherited(original, mutant)
        for name, module in list(sys.modules.items()):
            if not name.startswith("pallas_norm") or module is mutant:
                continue
            for attribute, value in list(vars(module).items()):
                if value is original or getattr(value, "__module__", None) == original.__name__:
                    replacement = mutant if value is original else mutant.__dict__.get(attribute)
                    if replacement is not None:
                        undo.append((module, attribute, value))
                        setattr(module, attribute, replacement)
        yield
    finally:
        sys.modules[original.__name__] = original
        for owner, attribute, value in undo:
            setattr(owner, attribute, value)
        jax.clear_caches()
        gpu_callbacks.reset_gpu_interpret_mode_state()  # a mutant may have stopped an interpreted kernel halfway
