"""A forward as a term: what its operators compute from x and the parameters, whatever they are called.

The operators are recorded below autograd, where `x.float()` and `x.to(torch.float32)`, `x * x` and `x.pow(2)`, in place
or not, are the same. A term carries the dtype in which it was computed, so roundings are in it.
"""

# pyright: reportPrivateUsage=false
# (the identity of a storage has no public name)

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Tensor = torch.Tensor


class Unknown(Exception):
    """Why a forward is not recognised, in words that complete "its forward ..."."""


@dataclasses.dataclass(frozen=True)
class Term:
    """`operation` of `arguments`, computed in `dtype`. A leaf has no arguments but a name."""

    operation: str  # x, parameter, to, multiply, add, square, mean, sum, rsqrt, sqrt
    dtype: torch.dtype
    arguments: tuple[Term | float, ...] = ()
    name: str = ""

    def __str__(self) -> str:
        inner = ", ".join(map(str, self.arguments))
        return f"{self.name or self.operation}({inner})" if inner else self.name or self.operation


def widened(term: Term) -> Term:
    """Without conversions that change no value."""
    while term.operation == "to":
        (inner,) = term.arguments
        assert isinstance(inner, Term)
        if torch.promote_types(inner.dtype, term.dtype) != term.dtype:
            break
        term = inner
    return term


def _to(term: Term, dtype: torch.dtype) -> Term:
    return term if term.dtype == dtype else Term("to", dtype, (term,))


def _both(name: str, a: Term | float, b: Term | float, dtype: torch.dtype) -> Term:
    """Commutative, of operands widened to the dtype of the result, which changes nothing."""
    operands = [widened(one) if isinstance(one, Term) else one for one in (a, b)]
    return Term(name, dtype, tuple(sorted(operands, key=str)))


def _multiply(a: Term | float, b: Term | float, dtype: torch.dtype) -> Term:
    if isinstance(a, Term) and isinstance(b, Term) and widened(a) == widened(b):
        return Term("square", dtype, (widened(a),))
    for one, other in ((a, b), (b, a)):
        if one == 1.0 and isinstance(other, Term) and other.dtype == dtype:  # 1.0 / x is 1.0 * reciprocal(x)
            return other
    return _both("multiply", a, b, dtype)


def _add(a: Term | float, b: Term | float, dtype: torch.dtype) -> Term:
    return _both("add", a, b, dtype)


def _power(a: Term, exponent: float, dtype: torch.dtype) -> Term:
    names = {2.0: "square", -0.5: "rsqrt", 0.5: "sqrt", -1.0: "reciprocal"}
    if exponent not in names:
        raise Unknown(f"raises to the power {exponent:g}")
    return _one(names[exponent], a, dtype)


def _one(name: str, a: Term, dtype: torch.dtype) -> Term:
    if name == "reciprocal" and a.operation == "sqrt" and a.dtype == dtype:
        return Term("rsqrt", dtype, a.arguments)
    if name == "sqrt" and a.operation == "reciprocal" and a.dtype == dtype:
        return Term("rsqrt", dtype, a.arguments)
    return Term(name, dtype, (widened(a),))


def _divide(a: Term | float, b: Term | float, dtype: torch.dtype) -> Term:
    if not isinstance(b, Term):
        assert isinstance(a, Term)
        return Term("divide", dtype, (widened(a), b))
    if a == 1.0:
        return _one("reciprocal", b, dtype)
    return Term("divide", dtype, (widened(a) if isinstance(a, Term) else a, widened(b)))


def _reduced(name: str, term: Term, shape: Any, dims: Any, dtype: torch.dtype | None, into: torch.dtype) -> Term:
    if dims is None or [dim % len(shape) for dim in dims] != [len(shape) - 1]:
        raise Unknown(f"takes a {name} over other axes than the last one")
    return Term(name, into, (widened(_to(term, dtype) if dtype is not None else term), _count(shape[-1])))


def _symbol(size: Any) -> str:
    return str(size.node.expr)


def _count(size: Any) -> float:
    """Of a symbol its example, without asking for it, which would make it a number."""
    node: Any = getattr(size, "node", None)
    return float(size if node is None else node.hint)


SAME = {"view", "_unsafe_view", "reshape", "unsqueeze", "expand", "clone", "alias", "contiguous", "squeeze"}
UNARY = {"rsqrt", "sqrt", "reciprocal", "square"}


class Recorder(TorchDispatchMode):
    """The term of every tensor that operators make of the known ones."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[int, Term] = {}
        self.kept: list[Tensor] = []  # so that no id is used again
        self.protected: dict[int, str] = {}  # storages that a forward may not write to
        self.columns = ""  # of x, where their number is a symbol

    def know(self, tensor: Tensor, operation: str, name: str) -> None:
        """A leaf: x, or a parameter."""
        self.terms[id(tensor)] = Term(operation, tensor.dtype, name=name)
        self.kept.append(tensor)
        if operation == "x" and isinstance(last := tensor.shape[-1], torch.SymInt):  # pyright: ignore
            self.columns = _symbol(last)
        self.protected[tensor.untyped_storage()._cdata] = "input" if operation == "x" else name

    def term(self, value: Any) -> Term | float:
        if not isinstance(value, Tensor):
            if isinstance(value, (int, float)) and math.isfinite(value):
                return float(value)
            if isinstance(value, torch.SymInt) and self.columns == _symbol(value):
                return _count(value)
            raise Unknown(f"computes with {value!r}, which is no number known beforehand")
        if (found := self.terms.get(id(value))) is None:
            raise Unknown("computes with a tensor that is neither its input nor a parameter of its own")
        return found

    def tensor_of(self, wanted: Callable[[Term], bool]) -> Tensor:
        known = ((tensor, self.terms.get(id(tensor))) for tensor in self.kept)
        return next(tensor for tensor, term in known if term is not None and wanted(term))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("prim"):
            return func(*args, **kwargs)
        written, name = (args[0], name[:-1]) if name.endswith("_") else (None, name)
        term = self._term_of(name, args, kwargs)
        result = func(*args, **kwargs)
        if written is not None:
            storage = written.untyped_storage()._cdata
            if storage in self.protected:
                raise Unknown(f"writes to its {self.protected[storage]}")
            for tensor in self.kept:
                if tensor is not written and tensor.untyped_storage()._cdata == storage:
                    self.terms.pop(id(tensor), None)
        if not isinstance(result, Tensor):
            raise Unknown(f"calls torch's {name}, of which no part of an RMSNorm is made")
        for tensor in (result,) if written is None else (result, written):
            self.terms[id(tensor)] = term(result)
            self.kept.append(tensor)
        return result

    def _term_of(self, name: str, args: Any, kwargs: Any) -> Callable[[Tensor], Term]:
        """The term of the operator's result, given the result, whose dtype it takes; looked at before the call, which
        may write."""
        if name not in SAME | UNARY | {"_to_copy", "pow", "mul", "add", "div", "mean", "sum", "sub", "rsub"}:
            raise Unknown(f"calls torch's {name}, of which no part of an RMSNorm is made")
        a, *rest = args
        first, shape = self.term(a), a.shape if isinstance(a, Tensor) else ()
        if name in SAME:
            return lambda result: self._kept_rows(name, a, first, result)
        if name == "_to_copy":
            if kwargs.get("device") not in (None, a.device):
                raise Unknown("moves to another device")
            return lambda result: _to(first, result.dtype)  # type: ignore[arg-type]
        if name == "pow":
            exponent = self.term(rest[0])
            if not isinstance(first, Term) or not isinstance(exponent, float):
                raise Unknown("raises to a power that is a tensor")
            return lambda result: _power(first, exponent, result.dtype)
        if name in ("mean", "sum"):
            dims, dtype = (rest[0] if rest else None), kwargs.get("dtype")
            return lambda result: _reduced(name, first, shape, dims, dtype, result.dtype)  # type: ignore[arg-type]
        if name in UNARY:
            return lambda result: _one(name, first, result.dtype)  # type: ignore[arg-type]
        if name in ("sub", "rsub"):
            raise Unknown("subtracts: a LayerNorm is no RMSNorm")
        if kwargs.get("alpha", 1) != 1:
            raise Unknown("adds a multiple")
        if kwargs.get("rounding_mode") is not None:
            raise Unknown("rounds a quotient")
        second = self.term(rest[0])
        build: Any = {"mul": _multiply, "add": _add, "div": _divide}[name]
        return lambda result: build(first, second, result.dtype)

    def _kept_rows(self, name: str, a: Tensor, term: Any, result: Tensor) -> Term:
        """Views that leave the last axis as it is, or give an axis of one."""
        if a.shape[-1:] != result.shape[-1:] and not (a.numel() and _numbers_per_row(term) == 1):
            raise Unknown(f"regroups its columns with {name}")
        return term


def _numbers_per_row(term: Term) -> int:
    """1 for statistics, which have no columns."""
    if term.operation in ("mean", "sum"):
        return 1
    inner = [one for one in term.arguments if isinstance(one, Term)]
    return 1 if inner and all(_numbers_per_row(one) == 1 for one in inner) else 2
