"""Results written where the operands lie: y and s where x and the residual were, or elsewhere."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm_torch import add_rms_norm, statements
from pallas_norm_torch.programs import Program
from tests import mixed_dtypes as mixed
from tests.interop.cases import DTYPES, assert_same, draw
from tests.interop.fake_kernels import FakeKernel, made  # noqa: F401  a fixture
from tests.interop.mixed_cases import Tensors, call, options, tensors
from tests.mixed_dtypes import TRAINED

BF16, _, F32 = DTYPES
PLACES = [(out, s_out) for out, s_out in itertools.product((None, "x", "residual", "own"), repeat=2) if (out, s_out) not in ((None, None), ("x", "x"), ("residual", "residual"))]  # fmt: skip  # noqa: E501


def placed(
    x: torch.Tensor, residual: torch.Tensor, own: torch.Tensor, places: tuple[str | None, str | None]
) -> Tensors:
    at = {"x": x, "residual": residual}
    given = {"out": places[0], "s_out": places[1]}
    return {name: at[place] if place in at else own[int(name == "out")] for name, place in given.items() if place}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize(("rows", "n"), [(64, 128), (65, 128), (7, 4096), (3, 40000)])
def test_y_and_s_are_written_where_the_operands_lie(
    rows: int,
    n: int,
    places: tuple[str | None, str | None],
    request: pytest.FixtureRequest,
    *,
    launched: bool,
) -> None:
    """Whole blocks, rows that fill none, and rows that are read twice, which are written elsewhere first."""
    kernels = request.getfixturevalue("made") if launched else {}
    for _ in range(2):  # checked, then as a prepared call
        x, residual = draw(rows, n, dtype=BF16), draw(rows, n, dtype=BF16, seed=1)
        weight, own = draw(n, dtype=BF16, seed=2), torch.full((2, rows, n), torch.nan, dtype=BF16)
        y, s = statements_of(x, residual, weight)
        where = placed(x, residual, own, places)
        versions = {name: place._version for name, place in where.items()}
        found = add_rms_norm(x, residual, weight, **where)
        assert_same(found[0], y)
        assert_same(found[1], s)
        for name, place in where.items():
            assert place.data_ptr() == found[name != "out"].data_ptr()
            assert place._version > versions[name]
    if launched:
        (kernel,) = [kernel for kernel in kernels.values() if kernel.launches]
        _, _, named = kernel.launches[-1]
        in_place = {named["y"], named["s"]} & {named["x"], named["residual"]}
        safe = (rows, n) in ((64, 128), (7, 4096))
        assert bool(in_place) == (safe and bool({"x", "residual"} & {*places}))


def statements_of(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    return statements.forward(x.clone(), residual.clone(), weight, Spec(), with_rstd=False)[:2]


@pytest.mark.parametrize("places", [("x", "residual"), ("residual", "x"), ("x", None), (None, "residual")], ids=str)
def test_rows_at_strides_are_written_in_place_too(
    places: tuple[str | None, str | None],
    made: dict[Program, FakeKernel],  # noqa: F811
) -> None:
    wide = [draw(8, 5, 128, dtype=BF16, seed=seed) for seed in range(2)]
    x, residual = (one[:, 1:4] for one in wide)
    before = [one[:, [0, 4]].clone() for one in wide]
    weight = draw(128, dtype=BF16, seed=2)
    y, s = statements_of(x, residual, weight)
    found = add_rms_norm(x, residual, weight, **placed(x, residual, torch.empty(2), places))
    assert_same(found[0], y)
    assert_same(found[1], s)
    for one, edges in zip(wide, before, strict=True):
        assert_same(one[:, [0, 4]], edges)
    assert any(program.strided for program in made)


def test_a_float32_stream_is_added_to_in_place(made: dict[Program, FakeKernel]) -> None:  # noqa: F811
    """SGLang's on-policy mode: the residual is float32, and becomes s; y goes where x was."""
    given = mixed.draw(TRAINED[5], 8, 128)
    operands = tensors(given)
    right = call(TRAINED[5], operands)
    x, residual = operands["x"], operands["residual"]
    for _ in range(2):
        one, other = x.clone(), residual.clone()
        y, s = add_rms_norm(one, other, operands["weight"], out=one, s_out=other, **options(TRAINED[5]))
        assert (y is one, s is other) == (True, True)
        assert_same(y, right["y"])
        assert_same(s, right["s"])
    (program,) = [program for program in made if "rstd" not in program.outputs and program.kind == "forward"]
    assert made[program].launches[-1][2]["s"] == made[program].launches[-1][2]["residual"]


def test_out_and_s_out_under_compile() -> None:
    torch._dynamo.reset()
    x, residual, weight = draw(5, 64, dtype=BF16), draw(5, 64, dtype=BF16, seed=1), draw(64, dtype=BF16, seed=2)
    y, s = statements_of(x, residual, weight)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> Any:
        return add_rms_norm(x, residual, weight, out=x, s_out=residual)

    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, residual)
    for own, right, place in zip(found, (y, s), (x, residual), strict=True):
        assert_same(own, right)
        assert_same(place, right)


@pytest.mark.gpu
@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize(("rows", "n"), [(64, 128), (65, 128), (4097, 4096), (33, 16384), (17, 32768), (9, 131072)])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
def test_a_kernel_in_place_has_the_bits_of_one_elsewhere(
    stream: torch.dtype, rows: int, n: int, places: tuple[str | None, str | None]
) -> None:
    dtypes = {"x": BF16, "residual": stream}
    if stream == F32 and (places[0] == "residual" or places[1] == "x"):
        return  # of another dtype than y, or s
    x, residual = (draw(rows, n, dtype=dtype, device="cuda", seed=i) for i, dtype in enumerate(dtypes.values()))
    weight = draw(n, dtype=BF16, device="cuda", seed=2)
    given: dict[str, Any] = {} if stream == BF16 else {"out_dtype": BF16, "unit_dtype": BF16}
    y, s = add_rms_norm(x, residual, weight, **given)
    for _ in range(5):
        one, other = x.clone(), residual.clone()
        own = [torch.empty_like(residual), torch.empty_like(x)]
        at = {"x": one, "residual": other}
        where = dict(zip(("out", "s_out"), places, strict=True))
        where = {name: at.get(place, own[int(name == "out")]) for name, place in where.items() if place}
        found = add_rms_norm(one, other, weight, **given, **where)
        assert_same(found[0], y)
        assert_same(found[1], s)
