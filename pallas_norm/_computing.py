"""Norm modules of JAX known by what they compute: traced, and proved against `rms_norm` on rows that tell roundings
apart.

A module's `__call__` is traced to a jaxpr, whose operations have to be those of a norm: no branch, no loop, no call
back, no random number, no gradient rule of its own. Then it is evaluated one operation at a time, so that every
rounding that is written is done, on rows whose sum of squares is exact in any order and with rstd by IEEE operations.
The form of `rms_norm` that gives the same bits is what it computes; where there is none, the module is left. A proof is
of one dtype, rank and length of rows, and of any number of them: a call is `rms_norm`'s where its own jaxpr is that of
the proof but for the leading sizes.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (Modules are any objects, and jaxprs have few types.)

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from . import _attributes, _outside, _proof_rows, _traces, reference
from ._proof_rows import DTYPES
from ._traces import RefusedError

F32 = jnp.float32
ARITHMETIC = frozenset({"add", "div", "dot_general", "integer_pow", "mul", "pow", "sqrt", "square", "sub"})
MOVES = frozenset({"broadcast_in_dim", "copy", "copy_p", "reshape", "squeeze", "transpose"})
OPERATIONS = ARITHMETIC | MOVES | {"convert_element_type", "reduce_precision", "reduce_sum", "rsqrt"}
OWN_RULES = ("custom_jvp", "custom_vjp")  # how their names begin: the rest differs between JAX's versions
# The axes before the last one, by the rank of x, each proved: all longer than 1, so that a mean over one of them too is
# another one. Of more axes there is no proof.
LEADING = {1: (), 2: (16,), 3: (8, 2), 4: (4, 2, 2), 5: (2, 2, 2, 2)}


def _name(dtype: Any) -> str:
    return jnp.dtype(dtype).name


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


class Array(NamedTuple):
    """A weight, without its values."""

    dtype: str
    weak: bool

    def struct(self, n: int) -> Any:
        return _traces.struct((n,), self.dtype, weak=self.weak)


def array(weight: Any) -> Array | None:
    return None if weight is None else Array(_name(weight.dtype), bool(getattr(weight, "weak_type", False)))


@dataclasses.dataclass(frozen=True)
class Proved:
    """A form, and the jaxpr that has it, of a call with these axes before the last one."""

    form: Form
    leading: tuple[int, ...]
    text: str
    jaxpr: Any = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Computation:
    """What a module computes: the attribute that is its eps, and what the proof of a call needs."""

    eps: str
    offsets: tuple[float, ...]
    read: tuple[tuple[str, str], ...]  # the attributes that _attributes tells, as they were
    weight: Array | None
    proved: tuple[tuple[tuple[str, int, int], Proved], ...]  # at the patch: by dtype and rank of x, and n


# --- one operation at a time ------------------------------------------------------------------------------------------


def _evaluate(jaxpr: Any, constants: Any, arguments: Any) -> list[Any]:
    """Raises RefusedError at an operation that no norm has."""
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    values.update(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
    for equation in jaxpr.eqns:
        operands, name = [read(atom) for atom in equation.invars], equation.primitive.name
        if _traces.shards(equation):
            raise RefusedError("it constrains how an array is sharded, which rms_norm would not do")
        if name in _traces.CALLS:
            inner = _traces.called(equation)
            results = _evaluate(inner.jaxpr, inner.consts, operands)
        elif name == "rsqrt" and operands[0].dtype == F32:
            # XLA's is off in the last bit on a CPU, and another one on a GPU.
            results = [reference.inverse_root(operands[0])]
        elif name in OPERATIONS:
            if (dtype := equation.outvars[0].aval.dtype.name) not in map(_name, DTYPES):
                raise RefusedError(f"it computes in {dtype}; needed float32, bfloat16 or float16")
            found = equation.primitive.bind(*operands, **equation.params)
            results = found if equation.primitive.multiple_results else [found]
        elif name.startswith(OWN_RULES):
            raise RefusedError(f"it has a gradient rule of its own ({name[:10]}), which rms_norm's would replace")
        else:
            raise RefusedError(f"it computes with {name}, which is no operation of an RMSNorm")
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bits(y: Any) -> bytes:
    return np.asarray(y).tobytes()


# --- a module ---------------------------------------------------------------------------------------------------------


def _called(
    module: _traces.Called, rows: Any, rank: int, weight: Any, weight_struct: Any
) -> tuple[Any, tuple[int, ...], Any] | None:
    """What the module gives for these rows as an x of this rank, and its jaxpr at other leading axes, with those; None
    where it takes no such x, or computes something else at other sizes."""
    n = rows.shape[-1]
    shape = (n,) if rank == 1 else (*LEADING[rank], n)
    closed = _traces.traced(module, _traces.struct(shape, rows.dtype), weight_struct)
    leading = _traces.primes(LEADING[rank], n)
    general = _traces.traced(module, _traces.struct((*leading, n), rows.dtype), weight_struct)
    if closed is None or general is None:
        return None

    def evaluated() -> Any:
        found: list[Any] = []
        for x in rows if rank == 1 else [rows.reshape(shape)]:
            outputs = _evaluate(closed.jaxpr, closed.consts, [x, *jax.tree.leaves(weight)])
            if len(outputs) != 1 or outputs[0].shape != x.shape:
                raise RefusedError(f"it gives {len(outputs)} arrays; needed one of the shape of x")
            found.append(np.asarray(outputs[0]))
        return np.stack(found).reshape(rows.shape)

    if any(isinstance(one, jax.core.Tracer) for one in closed.consts):
        raise RefusedError("it computes with what is traced around it")
    own = _outside.aside(evaluated)
    return (own, leading, general) if _traces.alike(general, leading, closed, LEADING[rank]) else None


def _proofs(
    module: _traces.Called, dtype: Any, n: int, weight: Array | None, eps: float, offsets: tuple[float, ...], ranks: Any
) -> Iterator[tuple[tuple[str, int, int], Proved]]:
    """Those ranks of x at which the module gives the bits of a form of rms_norm, with the first such form."""
    rows = _outside.aside(lambda: _proof_rows.rows(n, dtype, eps))
    w = None if weight is None else _outside.aside(lambda: _proof_rows.weight(n, weight.dtype))

    @functools.cache
    def bits(form: Form) -> bytes:  # of each row by itself, so at any rank
        return _bits(form.compute(_exact, rows, w, eps))

    for rank in ranks:
        called = _called(module, rows, rank, w, None if weight is None else weight.struct(n))
        if called is None or called[0].dtype.name not in map(_name, DTYPES):
            continue
        own, leading, general = called
        candidates = list(forms(_name(rows.dtype), own.dtype.name, offsets))
        form = _outside.aside(lambda: next((form for form in candidates if bits(form) == _bits(own)), None))  # noqa: B023
        if form is not None:
            yield (_name(dtype), rank, n), Proved(form, leading, str(general), general)


def computation_of(module: Any, weight: Any, called: _traces.Called) -> Computation:
    """What the module computes, whose only array is `weight` or that has none (None). Raises RefusedError."""
    x, *more = [*list(inspect.signature(type(module).__call__).parameters.values())[1:], None]
    if x is None or x.kind not in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD):
        raise RefusedError("it is not called with x")
    if any(one.default is one.empty and one.kind is not one.VAR_KEYWORD for one in more if one is not None):
        raise RefusedError("it is called with more than x")
    floats = {name: value for name, value in vars(module).items() if type(value) is float}
    names = [name for name in floats if "eps" in name.lower()]
    if len(names) != 1:
        raise RefusedError(f"{len(names)} of its attributes are named after eps and hold a float; needed one")
    (name,), kind = names, array(weight)
    if weight is not None and (weight.ndim == 0 or weight.shape[-1] < 2):
        raise RefusedError(f"its weight has shape {weight.shape}; needed (n,), for the n elements of a row")
    if kind is not None and kind.dtype not in map(_name, DTYPES):
        raise RefusedError(f"its weight is {kind.dtype}; needed float32, bfloat16 or float16")
    offsets = tuple(dict.fromkeys([1.0, *(value for other, value in floats.items() if other != name and value)]))
    n = 96 if weight is None else weight.shape[-1]  # of rows without a weight, others are proved as they come
    found = [one for dtype in DTYPES for one in _proofs(called, dtype, n, kind, floats[name], offsets, tuple(LEADING))]
    if not found:
        raise RefusedError("its bits are those of no form of rms_norm")
    return Computation(name, offsets, _attributes.plain_attributes(module), kind, tuple(found))


class Proofs:
    """Of the modules with this computation: the form of each of their calls."""

    def __init__(self, computation: Computation) -> None:
        self.computation = computation
        self._proved: dict[Any, Proved | None] = dict(computation.proved)
        self._calls: dict[Any, Form | None] = {}

    def form(self, module: _traces.Called, x: Any, weight: Any, eps: float) -> Form | None:
        """None where it is not proved what the module computes of arrays like these: a weight is proved as one number
        for each element of a row."""
        if x.weak_type or x.ndim not in LEADING or array(weight) != self.computation.weight:
            return None
        if weight is not None and weight.shape != x.shape[-1:]:
            return None
        if not _outside.here():
            return self._form(module, x, eps)  # it may see axes that are bound here
        key = (x.dtype.name, x.shape, jax.sharding.get_abstract_mesh())
        if key not in self._calls:
            self._calls[key] = self._form(module, x, eps)
        return self._calls[key]

    def _form(self, module: _traces.Called, x: Any, eps: float) -> Form | None:
        weight, (*leading, n) = self.computation.weight, x.shape
        try:
            proved = self._proof(module, x, n, eps)
            own = proved and _traces.traced(module, _traces.struct(x.shape, x.dtype), weight and weight.struct(n))
        except RefusedError:
            return None
        if proved is None or own is None or not _traces.alike(proved.jaxpr, proved.leading, own, leading):
            return None
        return proved.form

    def _proof(self, module: _traces.Called, x: Any, n: Any, eps: float) -> Proved | None:
        key = (x.dtype.name, x.ndim, n)
        if key not in self._proved:
            known = any(x.dtype == dtype for dtype in DTYPES) and isinstance(n, int) and n > 1
            weight, offsets = self.computation.weight, self.computation.offsets
            found = dict(_proofs(module, x.dtype, n, weight, eps, offsets, [x.ndim]) if known else ())
            self._proved[key] = found.get(key)
        return self._proved[key]


def _exact(x: Any, weight: Any, **options: Any) -> Any:
    with jax.disable_jit():
        return reference.forward(x, weight, **options)[0]
