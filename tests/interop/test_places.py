"""Where no memory has an address, in programs of torch.compile and under torch.func, out and s_out may not overlap
either."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.backends.common import aot_autograd

from pallas_norm_torch import add_rms_norm, rms_norm
from tests.interop.cases import draw

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore")  # of Dynamo, where as errors they would end a program


def _added(x: Tensor, weight: Tensor, out: Tensor, s_out: Tensor) -> Tensor:
    return add_rms_norm(x, x, weight, out=out, s_out=s_out)[0]


# In rows of 8 elements: x, 5 rows; places of 10 rows, of which a call takes views.
WRONG: dict[str, tuple[Callable[..., Tensor], str]] = {
    "out and s_out": (
        lambda x, weight, places: _added(x, weight, places[:5], places[2:7]),
        "out overlaps s_out, and both are written; pass memory of its own for each",
    ),
    "out and the weight": (
        lambda x, weight, places: rms_norm(x[:1], weight, out=weight.view(1, 8)),
        "out overlaps weight, which every row reads; pass memory of its own",
    ),
    "out and a part of x": (
        lambda x, weight, places: rms_norm(places[:5], weight, out=places[1:6]),
        "out overlaps x without being x: rows would be written before they are read; "
        "pass out=x to work in place, or memory of its own",
    ),
}
RIGHT: dict[str, Callable[..., Tensor]] = {
    "apart": lambda x, weight, places: _added(x, weight, places[:5], places[5:]),
    "columns": lambda x, weight, places: _added(x, weight, places.view(5, 16)[:, :8], places.view(5, 16)[:, 8:]),
    "in place": lambda x, weight, places: _added(x, weight, x, places[5:]),
}


def _operands() -> tuple[Tensor, Tensor, Tensor]:
    return draw(5, 8, dtype=torch.float32), draw(8, dtype=torch.float32, seed=1), torch.zeros(10, 8)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_a_program_refuses_places_that_overlap(name: str, *, dynamic: bool) -> None:
    """It computed y and s apart, and wrote one over the other."""
    function, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(*_operands())
    for fullgraph in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=fullgraph, backend="aot_eager", dynamic=dynamic)
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=re.escape(message)):
            compiled(*_operands())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_a_program_writes_to_places_apart(name: str, *, dynamic: bool) -> None:
    torch._dynamo.reset()
    found = torch.compile(RIGHT[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)(*_operands())
    assert torch.equal(found, RIGHT[name](*_operands()))


def test_a_program_of_unknown_rows_is_not_asked_where_they_lie() -> None:
    x, weight, places = _operands()
    expected = RIGHT["in place"](x.clone(), weight, places)
    residual = x.clone()
    for tensor in (x, residual):
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, residual: add_rms_norm(x, residual, weight, out=x, s_out=residual)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x, residual), expected)


def test_a_program_keeps_nothing_of_the_check() -> None:
    kept: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        kept.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(RIGHT["in place"], fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    torch._dynamo.reset()
    compiled(*_operands())
    assert "pallas_norm.add_rms_norm.default" in kept
    assert not [target for target in kept if "check_places" in target]


def test_a_check_of_a_program_is_an_operator() -> None:
    x, weight, places = _operands()
    operands = places[:5], places[5:], x, None, weight
    assert set(torch.library.opcheck(torch.ops.pallas_norm.check_places.default, operands).values()) == {"SUCCESS"}


@pytest.mark.parametrize("around", ["vmap", "grad", "functionalize"])
def test_places_under_torch_func_are_where_what_it_wraps_is(around: str) -> None:
    """Its wrappers have no memory to ask for an address: they raised RuntimeError."""

    def through(function: Callable[..., Tensor]) -> Tensor:
        x, weight, places = _operands()
        if around == "vmap":
            return torch.func.vmap(function)(*(tensor.expand(3, *tensor.shape).clone() for tensor in _operands()))[0]
        if around == "functionalize":
            return torch.func.functionalize(function)(x, weight, places)

        def times(factor: Tensor) -> Tensor:
            return (factor * function(x.clone(), weight.clone(), places.clone())).sum()

        return torch.func.grad(times)(torch.ones(5, 8))  # which is y

    expected = RIGHT["in place"](*_operands())
    for name, function in RIGHT.items():
        if around != "vmap" or name != "apart":  # rows of a member lie between rows of another
            assert torch.equal(through(function), expected)
    for function, message in WRONG.values():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            through(function)
