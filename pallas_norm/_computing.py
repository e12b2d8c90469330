"""Norm modules of JAX known by what they compute: traced, and proved against `rms_norm` on rows that tell roundings
apart.

A module's `__call__` is traced to a jaxpr, whose operations have to be those of a norm: no branch, no loop, no call
back, no random number. Then it is evaluated one operation at a time, so that every rounding that is written is done, on
rows whose sum of squares is exact in any order and with rstd by IEEE operations. The form of `rms_norm` that gives the
same bits for each dtype is what it computes; where there is none, the module is left.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (Modules are any objects, and jaxprs have few types.)

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from . import reference

F32 = jnp.float32
DTYPES = (jnp.bfloat16, jnp.float16, F32)
ARITHMETIC = frozenset({"add", "div", "dot_general", "integer_pow", "max", "mul", "pow", "sqrt", "square", "sub"})
MOVES = frozenset({"broadcast_in_dim", "copy", "copy_p", "reshape", "squeeze", "transpose"})
OPERATIONS = ARITHMETIC | MOVES | {"convert_element_type", "reduce_precision", "reduce_sum", "rsqrt"}
CALLS = frozenset({"custom_jvp_call", "custom_vjp_call", "jit", "pjit"})
ROWS = 5
RANKS = (1, 2, 3)  # of x, each proved; more axes are as three
LARGEST = 5  # of the integers in a row: LARGEST^2 * 131072 elements are exact in float32


def _name(dtype: Any) -> str:
    return jnp.dtype(dtype).name


class RefusedError(Exception):
    """Why a module is left."""


@dataclasses.dataclass(frozen=True)
class Form:
    """y = rms_norm(x, weight, eps=...), of dtype `out`, with x rounded to `unit` before the weight; of a weight that is
    as it is or cast to `out` first, with an offset that is added in float32 or in the dtype of that weight."""

    unit: str
    out: str
    cast_weight: bool
    offset: float = 0.0
    offset_in_float32: bool = False

    def compute(self, norm: Callable[..., Any], x: Any, weight: Any, eps: float) -> Any:
        options: dict[str, Any] = {"eps": eps, "unit_dtype": self.unit, "out_dtype": self.out}
        if weight is not None:
            # By round_to, since XLA drops the roundings of a cast and a sum inside jit.
            if self.cast_weight:
                weight = reference.round_to(weight.astype(F32), self.out)
            if self.offset_in_float32:
                options["weight_offset"] = self.offset
            elif self.offset:
                weight = reference.round_to(weight.astype(F32) + F32(self.offset), weight.dtype)
        return norm(x, weight, **options)


def forms(x: str, out: str, offsets: tuple[float, ...]) -> Iterator[Form]:
    """Of an x and a y of these dtypes."""
    for unit, cast_weight in itertools.product(dict.fromkeys((x, out, "float32")), (False, True)):
        yield Form(unit, out, cast_weight)
        for offset, in_float32 in itertools.product(offsets, (False, True)):
            yield Form(unit, out, cast_weight, offset, in_float32)


@dataclasses.dataclass(frozen=True)
class Computation:
    """What a module computes: by the dtypes of x and weight that were proved, and the attribute that is its eps."""

    eps: str
    forms: tuple[tuple[tuple[str, int], Form], ...]  # by the dtype and the rank of x
    read: tuple[tuple[str, str], ...]  # the attributes that are no arrays, as they were
    weight: str | None  # its dtype

    def form(self, x: Any, weight: Any) -> Form | None:
        """The one of arrays like these, or None."""
        if self.weight != (None if weight is None else weight.dtype.name):
            return None
        return dict(self.forms).get((_name(x.dtype), min(x.ndim, RANKS[-1])))


# --- one operation at a time ------------------------------------------------------------------------------------------


def _evaluate(jaxpr: Any, constants: Any, arguments: Any) -> list[Any]:
    """Raises RefusedError at an operation that no norm has."""
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    values.update(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
    for equation in jaxpr.eqns:
        operands, name = [read(atom) for atom in equation.invars], equation.primitive.name
        if name == "sharding_constraint":
            results = operands
        elif name in CALLS:
            inner = next(one for one in equation.params.values() if hasattr(one, "jaxpr"))
            results = _evaluate(inner.jaxpr, inner.consts, operands)
        elif (
            name == "rsqrt" and operands[0].dtype == F32
        ):  # XLA's is off in the last bit on a CPU, and another one on a GPU
            results = [reference.inverse_root(operands[0])]
        elif name in OPERATIONS:
            found = equation.primitive.bind(*operands, **equation.params)
            results = found if equation.primitive.multiple_results else [found]
        else:
            raise RefusedError(f"it computes with {name}, which is no operation of an RMSNorm")
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bits(y: Any) -> tuple[str, bytes]:
    y = np.asarray(y)
    return y.dtype.name, y.tobytes()


def _rows(n: int, dtype: Any) -> Any:
    """Rows whose square sum is exact, of several magnitudes: the least ones are of eps's."""
    draw = np.random.default_rng(n)
    rows = draw.integers(1, LARGEST + 1, (ROWS, n)) * draw.choice([-1, 1], (ROWS, n))
    scales = 2.0 ** np.array([0, 3, -3, -9, -11])[:, None]
    return jnp.asarray(rows * scales, dtype)


def _weight(n: int, dtype: Any) -> Any:
    """Some beyond what float16 has, which a cast to it would change, and which a product with x brings back."""
    weight = np.random.default_rng(n + 1).uniform(0.25, 2.0, n)
    weight[: n // 8] *= 2.0**16
    weight[n // 8 : n // 4] *= 2.0**-27
    return jnp.asarray(weight, dtype)


def plain_attributes(module: Any) -> tuple[tuple[str, str], ...]:
    """What may change what the module computes, in words."""
    plain = (bool, int, float, str, type, np.dtype, type(None))
    return tuple((name, repr(value)) for name, value in sorted(vars(module).items()) if isinstance(value, plain))


# --- a module ---------------------------------------------------------------------------------------------------------


def _called(rebuilt: Callable[[Any], Any], x: Any, weight: Any) -> tuple[str, bytes] | None:
    """The bits of what the module gives; None where it takes no x like this one."""

    def call(x: Any, weight: Any) -> Any:
        return rebuilt(weight)(x)

    try:
        closed = jax.make_jaxpr(call)(x, weight)
    except Exception:  # anybody's: an einsum or a reshape for another rank, an assertion on it
        return None
    outputs = _evaluate(closed.jaxpr, closed.consts, [x, *jax.tree.leaves(weight)])
    if len(outputs) != 1 or outputs[0].shape != x.shape:
        raise RefusedError(f"it gives {len(outputs)} arrays; needed one of the shape of x")
    return _bits(outputs[0])


def computation_of(module: Any, weight: Any, rebuilt: Callable[[Any], Any]) -> Computation:
    """What the module computes, whose only array is `weight` or that has none (None); rebuilt(weight) is the module
    with another one. Raises RefusedError."""
    _, *more = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    if any(one.default is one.empty and one.kind is not one.VAR_KEYWORD for one in more):
        raise RefusedError("it is called with more than x")
    floats = {name: value for name, value in vars(module).items() if type(value) is float}
    names = [name for name in floats if "eps" in name.lower()]
    if len(names) != 1:
        raise RefusedError(f"{len(names)} of its attributes are named after eps and hold a float; needed one")
    (name,) = names
    offsets = tuple(dict.fromkeys([1.0, *(value for other, value in floats.items() if other != name and value)]))
    n = 96 if weight is None else weight.shape[-1]
    found = list[tuple[tuple[str, int], Form]]()
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        w = None if weight is None else _weight(n, weight.dtype)
        for dtype, rank in itertools.product(DTYPES, RANKS):
            rows = _rows(n, dtype)
            x = rows[-1] if rank == 1 else rows.reshape(ROWS, *([1] * (rank - 2)), n)
            if (own := _called(rebuilt, x, w)) is None or own[0] not in map(_name, DTYPES):
                continue
            candidates = forms(_name(dtype), own[0], offsets)
            equal = (form for form in candidates if _bits(form.compute(_exact, x, w, floats[name])) == own)
            if (form := next(equal, None)) is not None:
                found.append(((_name(dtype), rank), form))
    if not found:
        raise RefusedError("its bits are those of no form of rms_norm")
    return Computation(name, tuple(found), plain_attributes(module), None if weight is None else weight.dtype.name)


def _exact(x: Any, weight: Any, **options: Any) -> Any:
    with jax.disable_jit():
        return reference.forward(x, weight, **options)[0]
