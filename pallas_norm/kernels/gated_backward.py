"""The backward kernel of a gated norm: dx, dgate, and each program's part of dweight.

Where groups have weights of their own a program has rows of one group, program p those of the (p mod groups)-th.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._activation import activated, slope
from .._dtypes import Dtypes
from .._row_sum import inverse
from .._spec import Spec
from ..gated_reference import Form, product_dtype
from ..plans.plan import BackwardPlan
from . import activation, dweight_sum
from .backward import Operands, accumulated, partial_dweight_rows
from .block import Block, Chunks
from .gated import in_groups
from .rows import Rows
from .weight import Factors, Weight

F32 = jnp.float32
NAMES = ("x", "gate", "dy")


class Terms(NamedTuple):
    """Of one chunk, in float32; the names are those of gated_reference.gradients."""

    u: jax.Array
    dunit: jax.Array
    of_dweight: jax.Array
    x: jax.Array
    gate: jax.Array
    s: jax.Array
    a: jax.Array
    da: jax.Array  # with norm_before_gate


def _terms(
    block: Block, given: Operands, factors: Factors, scale: jax.Array, form: Form, dtypes: Dtypes
) -> Iterator[Terms]:
    for x, gate, dy, factor in zip(given["x"], given["gate"], given["dy"], factors, strict=True):
        x, gate, dy = block.widened(x), block.widened(gate), block.widened(dy)
        s = activation.sigmoid(gate, block.layout, interpret=block.interpret)
        a = activated(gate, s, form.activation)
        u = (x if form.norm_before_gate else x * a) * scale
        unit = block.rounded(u, dtypes.unit)
        dv = da = dy
        if form.norm_before_gate:
            da = dy * block.rounded(unit if factor is None else unit * factor, product_dtype(dtypes))
            dv = block.rounded(block.product(dy, a), product_dtype(dtypes))
        dunit = block.rounded(dv if factor is None else block.product(dv, factor), dtypes.unit)
        yield Terms(u, dunit, dv * unit, x, gate, s, a, da)


def gradient(
    block: Block,
    rows: Rows[Operands],
    weight: Weight,
    partial: Chunks | None,
    refs: dict[str, Any],
    *,
    form: Form,
    dtypes: Dtypes,
) -> Chunks | None:
    """Writes dx and dgate of the block's rows; returns `partial` with their dweight added."""
    given, factors = rows.first(block), weight.factors(block)
    scale = block.broadcast(block.load_rows(refs["rstd"]))
    products, partials, dgates = [], [], list[jax.Array]()
    for i, terms in enumerate(_terms(block, given, factors, scale, form, dtypes)):
        products.append(block.product(terms.dunit, terms.u))
        if partial is not None:
            partials.append(partial[i] + terms.of_dweight)
        if form.norm_before_gate:
            dgates.append(_dgate(block, terms, terms.da, form, refs))
    if form.norm_before_gate:  # it waits for no sum, and what it takes is not kept for the second pass
        block.store(refs["dgate"], dgates)
    begun = block.begin_sum(products)
    rows.all_read(block)
    weight.all_read(block)
    total = block.end_sum(begun)
    given, factors = rows.second(block, given), weight.factors(block)
    mean = block.broadcast(total * inverse(block.plan.n))
    dxs = list[jax.Array]()
    for terms in _terms(block, given, factors, scale, form, dtypes):
        dh = (terms.dunit - block.product(terms.u, mean)) * scale
        dxs.append((dh if form.norm_before_gate else dh * terms.a).astype(dtypes.s))
        if not form.norm_before_gate:
            dgates.append(_dgate(block, terms, dh * terms.x, form, refs))
    block.store(refs["dx"], dxs)
    if not form.norm_before_gate:
        block.store(refs["dgate"], dgates)
    return None if partial is None else partials


def _dgate(block: Block, terms: Terms, da: jax.Array, form: Form, refs: dict[str, Any]) -> jax.Array:
    return (da * slope(terms.gate, terms.s, form.activation, block.product)).astype(refs["dgate"].dtype)


def partial_dweights(
    operands: dict[str, jax.Array],
    *,
    plan: BackwardPlan,
    spec: Spec,
    form: Form,
    with_dweight: bool,
    interpret: bool,
) -> dict[str, jax.Array]:
    """dx, dgate and of dweight the part of each program: of x, gate and dy (rows, n), rstd (rows,), and where given
    weight. `plan` is one that is gated.fitted. LaunchArguments as of the norm's kernels."""
    x, gate = operands["x"], operands["gate"]
    operands = in_groups(operands)
    groups = operands["weight"].size // x.shape[-1] if "weight" in operands else 1
    dtypes = spec.dtypes(x.dtype, weight=operands["weight"].dtype if "weight" in operands else None)
    outputs = {"dx": jax.ShapeDtypeStruct(x.shape, x.dtype), "dgate": jax.ShapeDtypeStruct(x.shape, gate.dtype)}

    def of_block(block: Block, rows: Rows[Operands], weight: Weight, partial: Chunks | None, refs: Any) -> Any:
        return gradient(block, rows, weight, partial, refs, form=form, dtypes=dtypes)

    options: Any = {"spec": spec, "weight_dtype": dtypes.weight, "with_dweight": with_dweight, "interpret": interpret}
    least = dweight_sum.TILE * groups
    return accumulated(of_block, operands, outputs, NAMES, plan=plan, least=least, **options)


def backward(
    operands: dict[str, jax.Array],
    *,
    plan: BackwardPlan,
    spec: Spec,
    form: Form,
    with_dweight: bool,
    dweight_dtype: Any = F32,
    interpret: bool,
) -> dict[str, jax.Array]:
    """As partial_dweights, but the sum of dweight's parts, rounded to dweight_dtype."""
    results = partial_dweights(
        operands, plan=plan, spec=spec, form=form, with_dweight=with_dweight, interpret=interpret
    )
    if with_dweight:
        rows, n = operands["x"].shape
        groups = operands["weight"].size // n
        parts, used = results["dweight"], partial_dweight_rows(plan, rows)
        parts = parts.reshape(len(parts) // groups, groups * n)
        results["dweight"] = dweight_sum.column_sum(parts, used // groups, dweight_dtype, interpret=interpret)
    return results
