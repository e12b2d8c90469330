"""The statements of an attention's forward that normalise q and k and rotate both, and may become one call."""

from __future__ import annotations

import ast

from ._decoder_layers import assigned, lists_of

NORM_ROPE, AT_ITS_PLACE = "_pallas_norm_norm_rope", "_pallas_norm_at_its_place"


def _normalised(statement: ast.stmt) -> tuple[str, ast.Attribute, ast.expr] | None:
    """(name, norm, x) of name = self.norm(x).transpose(1, 2)."""
    match assigned(statement):
        case (
            name,
            ast.Call(
                ast.Attribute(ast.Call(ast.Attribute(ast.Name("self")) as norm, [x], []), "transpose"),
                [ast.Constant(1), ast.Constant(2)],
                [],
            ),
        ):
            return name, norm, x
        case _:
            return None


def _rotated(statement: ast.stmt) -> tuple[str, str, ast.Call] | None:
    """(q, k, call) of q, k = rotate(q, k, cos, sin), where cos and sin are other names: an expression might use q,
    which is not normalised there any more."""
    match statement:
        case ast.Assign(
            [ast.Tuple([ast.Name(q), ast.Name(k)])],
            ast.Call(ast.Name(), [ast.Name(first), ast.Name(second), ast.Name(cos), ast.Name(sin)], []) as call,
        ) if (first, second) == (q, k) and q != k and {q, k}.isdisjoint((cos, sin)):
            return q, k, call
        case _:
            return None


def _uses(statement: ast.stmt, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement))


def _last_use(statements: list[ast.stmt], name: str) -> int | None:
    """The place of the last statement that uses that name."""
    return next((at for at in range(len(statements) - 1, -1, -1) if _uses(statements[at], name)), None)


# Methods that write to no memory that was there before.
VIEWS = {"chunk", "expand", "permute", "split", "squeeze", "transpose", "unflatten", "unsqueeze", "view"}
READS = VIEWS | {"contiguous", "flatten", "reshape", "size"}


def _names(x: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(x) if isinstance(node, ast.Name)}


def _lenders(x: ast.expr) -> set[str]:
    """Names whose memory it may be: methods of READS take numbers beside their tensor. self lends its attributes."""
    match x:
        case ast.Call(ast.Attribute(inner, name)) if name in READS:
            return _lenders(inner)
        case _:
            return _names(x)


def _module_of(x: ast.expr) -> ast.Attribute | None:
    """self.module, where it is what self.module(...) returns, or a view of it."""
    match x:
        case ast.Call(ast.Attribute(ast.Name("self")) as module):
            return module
        case ast.Call(ast.Attribute(inner)):
            return _module_of(inner)
        case _:
            return None


def _leaves_memory(statement: ast.stmt, borrowed: set[str]) -> bool:
    """Whether it does no more than give names to what modules of self, methods of READS and arithmetic return.

    borrowed: names whose own memory a norm may read, which not even a module is given before; with self among them, no
    module is called."""
    match statement:
        case ast.Assign(targets, value) if all(isinstance(one, (ast.Name, ast.Tuple)) for one in targets):
            parts = [part for one in targets for part in (one.elts if isinstance(one, ast.Tuple) else [one])]
        case _:
            return False
    for node in ast.walk(value):
        match node:
            case ast.Call(ast.Attribute(ast.Name("self"))) if borrowed.isdisjoint(_names(node)):
                pass
            case ast.Call(ast.Attribute(of, name)) if name in READS and not (
                isinstance(of, ast.Name) and of.id == "self"
            ):
                pass
            case ast.Call() | ast.NamedExpr() | ast.Await() | ast.Yield() | ast.YieldFrom():
                return False
            case _:
                pass
    return all(isinstance(part, ast.Name) for part in parts)


def _may_change(statements: list[ast.stmt], x: ast.expr) -> bool:
    """Whether one of them may write to x, which is evaluated before them and normalised after them."""
    borrowed = set[str]() if _module_of(x) is not None else _lenders(x)
    return not all(_leaves_memory(_without_its_norm(statement), borrowed) for statement in statements)


def _without_its_norm(statement: ast.stmt) -> ast.stmt:
    """The norm of k behind that of q reads what it is given, and goes away too."""
    other = _normalised(statement)
    return statement if other is None else ast.Assign([ast.Name(other[0], ast.Store())], other[2])


def _calls_a_module(statement: ast.stmt) -> bool:
    for node in ast.walk(_without_its_norm(statement)):
        match node:
            case ast.Call(ast.Attribute(ast.Name("self"))):
                return True
            case _:
                pass
    return False


def _given(norm: ast.Attribute, x: ast.expr, between: list[ast.stmt]) -> ast.expr:
    """What stands where x was normalised: x, or a call that says whether it may wait."""
    module = _module_of(x)
    if module is None or not any(map(_calls_a_module, between)):
        return x
    return ast.Call(ast.Name(AT_ITS_PLACE, ast.Load()), [norm, module, x], [])


def _fuse(statements: list[ast.stmt], at: int) -> tuple[str, ...]:
    """In place, where the statement there rotates what two before it normalise: the norms' attributes and the name of
    the function."""
    if (rotated := _rotated(statements[at])) is None:
        return ()
    *names, call = rotated
    norms: list[tuple[int, ast.Attribute, ast.expr]] = []
    for name in names:
        place = _last_use(statements[:at], name)
        found = None if place is None else _normalised(statements[place])
        if place is None or found is None or found[0] != name or any(_uses(ast.Expr(found[2]), one) for one in names):
            return ()
        if _may_change(statements[place + 1 : at], found[2]):
            return ()
        norms.append((place, *found[1:]))
    given = [_given(norm, x, statements[place + 1 : at]) for place, norm, x in norms]
    for (place, _, _), name, x in zip(norms, names, given, strict=True):
        made = ast.Assign([ast.Name(name, ast.Store())], x)
        statements[place] = ast.fix_missing_locations(ast.copy_location(made, statements[place]))
    function = call.func
    arguments: list[ast.expr] = [*(norm for _, norm, _ in norms), *call.args, function]
    call.args, call.func = arguments, ast.copy_location(ast.Name(NORM_ROPE, ast.Load()), function)
    assert isinstance(function, ast.Name)
    return *(norm.attr for _, norm, _ in norms), function.id


def fuse_statements(definition: ast.FunctionDef) -> tuple[str, ...]:
    for statements in [*lists_of(definition.body)]:
        for at in range(len(statements)):
            if found := _fuse(statements, at):
                return found
    return ()
