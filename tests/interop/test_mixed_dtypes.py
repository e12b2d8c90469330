"""Every combination of dtypes of x, residual, weight, unit, y and s in torch; and results written where the operands
lie."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from pallas_norm_torch import RMSNorm, add_rms_norm, decompositions, rms_norm, statements
from pallas_norm_torch.programs import Program
from tests import oracle
from tests import test_mixed_dtypes as mixed
from tests.interop.cases import DTYPES, OPTIONS, assert_same, draw
from tests.interop.fake_kernels import FakeKernel, made  # noqa: F401  a fixture
from tests.interop.test_statements import host
from tests.test_mixed_dtypes import EPS, TRAINED, Mix

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
BF16, F16, F32 = DTYPES
Tensors = dict[str, torch.Tensor]


def tensors(given: dict[str, Any]) -> Tensors:
    def tensor(value: Any) -> torch.Tensor:
        if value.dtype == oracle.BF16:
            return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(value.copy())

    return {name: tensor(value) for name, value in given.items()}


def options(mix: Mix) -> dict[str, Any]:
    named = {"unit_dtype": mix.unit_dtype, "out_dtype": mix.out_dtype, "s_dtype": mix.s_dtype}
    found: dict[str, Any] = {name: TORCH[dtype] for name, dtype in named.items() if dtype is not None}
    return found | {"round_weight": mix.round_weight, "weight_offset": mix.weight_offset, "eps": EPS}


def call(mix: Mix, given: Tensors, norm: Any = rms_norm, add: Any = add_rms_norm) -> Tensors:
    """Everything of a call and its gradients, by name; rstd as the operators give it."""
    names = [name for name in ("x", "residual", "weight") if name in given]
    leaves = [given[name].clone().requires_grad_() for name in names]
    named = dict(zip(names, leaves, strict=True))
    results = [norm(**named, **options(mix))] if mix.residual is None else add(**named, **options(mix))
    cotangents = [given["dy"], *([given["ds"]] if mix.residual is not None else [])]
    gradients = torch.autograd.grad(results, leaves, cotangents)
    found = dict(zip(("y", "s"), (one.detach() for one in results), strict=False))
    found |= {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    wide = found.get("s", given["x"]).float()
    return found | {"rstd": torch.rsqrt(wide.pow(2).mean(-1) + EPS)}


def check(mix: Mix, given: dict[str, Any], found: Tensors) -> None:
    mixed.check(mix, given, {name: host(value) for name, value in found.items()}, "xla")


@pytest.mark.parametrize("residual", [None, *TORCH], ids=str)
@pytest.mark.parametrize("x", TORCH)
def test_every_combination_of_dtypes_has_the_bits_of_the_replay(x: str, residual: str | None) -> None:
    for mix in mixed.every(x, residual):
        given = mixed.draw(mix)
        check(mix, given, call(mix, tensors(given)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mix", TRAINED, ids=str)
@pytest.mark.parametrize(("rows", "n"), [(21, 128), (5, 1000), (7, 4096)])
def test_the_results_are_those_of_jax(rows: int, n: int, mix: Mix, device: str) -> None:
    """y and s to the bit for an rstd of the same bits; on a GPU all but dweight's order of rows."""
    given = mixed.draw(mix, rows, n)
    found = call(mix, {name: value.to(device) for name, value in tensors(given).items()})
    check(mix, given, {name: value.cpu() for name, value in found.items()} | _rstd_of(mix, given, found, device))


def _rstd_of(mix: Mix, given: dict[str, Any], found: Tensors, device: str) -> Tensors:
    """The kernel's own, where one is launched: s is read in the same chunks, whatever it is the sum of."""
    if device == "cpu":
        return {}
    s = tensors(given)["x"].to(device) if mix.residual is None else found["s"]
    return {"rstd": torch.ops.pallas_norm.rms_norm(s, None, EPS, *OPTIONS[1:])[1].cpu()}


@pytest.mark.parametrize("mix", TRAINED, ids=str)
def test_a_prepared_call_launches_one_kernel_and_its_gradient_two(
    mix: Mix,
    made: dict[Program, FakeKernel],  # noqa: F811
) -> None:
    given = mixed.draw(mix, 37, 128)
    for _ in range(2):  # made, then found
        before = sum(len(kernel.launches) for kernel in made.values())
        check(mix, given, call(mix, tensors(given)))
        after = sum(len(kernel.launches) for kernel in made.values())
        assert after - before == 1 + (1 if mix.weight is None else 2)
    plain = {name: value for name, value in tensors(given).items() if name in ("x", "residual", "weight")}
    norm = rms_norm if mix.residual is None else add_rms_norm
    with torch.no_grad():
        first, again = norm(**plain, **options(mix)), norm(**plain, **options(mix))
    for one, other in zip(torch.utils._pytree.tree_leaves(first), torch.utils._pytree.tree_leaves(again), strict=True):
        assert_same(one, other)
    assert not any("rstd" in program.outputs for program in list(made)[-1:])


def test_calls_that_differ_in_dtypes_alone_are_told_apart(made: dict[Program, FakeKernel]) -> None:  # noqa: F811
    x, weight = draw(6, 128, dtype=BF16), draw(128, dtype=F32, seed=1)
    residuals = [draw(6, 128, dtype=dtype, seed=2) for dtype in DTYPES]
    for _ in range(2):
        assert [rms_norm(x, weight, out_dtype=dtype).dtype for dtype in (None, *DTYPES)] == [F32, *DTYPES]
        assert rms_norm(x, weight, round_weight=True).dtype == BF16
        assert [add_rms_norm(x, residual, weight)[1].dtype for residual in residuals] == DTYPES
        assert [add_rms_norm(x, residuals[0], weight, s_dtype=dtype)[1].dtype for dtype in DTYPES] == DTYPES
        one, two = (rms_norm(x, weight, unit_dtype=dtype) for dtype in (BF16, F16))
        assert not torch.equal(one, two)
    assert made


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's export, of itself
@pytest.mark.parametrize("mix", TRAINED, ids=str)
def test_compiled_exported_and_decomposed_they_are_the_same(mix: Mix) -> None:
    given = mixed.draw(mix, 9, 64)
    torch._dynamo.reset()
    compiled = [torch.compile(function, backend="aot_eager", fullgraph=True) for function in (rms_norm, add_rms_norm)]
    check(mix, given, call(mix, tensors(given), *compiled))

    class Norm(torch.nn.Module):
        def forward(self, operands: Tensors) -> Any:
            return (rms_norm if mix.residual is None else add_rms_norm)(**operands, **options(mix))

    operands = {name: value for name, value in tensors(given).items() if name in ("x", "residual", "weight")}
    right = Norm()(operands)
    program = torch.export.export(Norm(), (operands,))
    table = torch.export.default_decompositions()
    table.update(decompositions())
    for one in (program, program.run_decompositions(table)):
        found = one.module()(operands)
        for own, other in zip(*map(torch.utils._pytree.tree_leaves, (found, right)), strict=True):
            assert_same(own, other)
    assert "pallas_norm" not in str(program.run_decompositions(table).graph)


@pytest.mark.parametrize("mix", [TRAINED[2], TRAINED[5], TRAINED[8]], ids=str)
def test_opcheck(mix: Mix) -> None:
    given = tensors(mixed.draw(mix, 5, 64))
    names = [name for name in ("x", "residual", "weight") if name in given]
    leaves = [given[name].requires_grad_() for name in names]
    unit, out, s = (dtype and TORCH[dtype] for dtype in (mix.unit_dtype, mix.out_dtype, mix.s_dtype))
    rounding = (unit, mix.round_weight, out, *([s] if mix.residual else []))
    operator = torch.ops.pallas_norm.rms_norm if mix.residual is None else torch.ops.pallas_norm.add_rms_norm
    torch.library.opcheck(operator, (*leaves, EPS, True, mix.weight_offset, *rounding))


@pytest.mark.parametrize("mix", TRAINED, ids=str)
def test_vmap_is_a_loop(mix: Mix) -> None:
    given = tensors(mixed.draw(mix, 3, 64))
    operands = [given[name] for name in ("x", "residual", "weight") if name in given]
    norm = functools.partial(rms_norm if mix.residual is None else add_rms_norm, **options(mix))
    pairs = [torch.stack([value, value * 2]) for value in operands]
    for dims in (
        tuple(0 for _ in operands),
        tuple(None if i == len(operands) - 1 else 0 for i in range(len(operands))),
    ):
        if not any(dim == 0 for dim in dims):
            continue
        inputs = [pair if dim == 0 else pair[0] for pair, dim in zip(pairs, dims, strict=True)]
        names = [name for name in ("x", "residual", "weight") if name in given]

        def member(*values: torch.Tensor, names: Any = names) -> Any:
            return norm(**dict(zip(names, values, strict=True)))

        batched = torch.utils._pytree.tree_leaves(torch.vmap(member, dims)(*inputs))
        for i in range(2):
            alone = member(*(pair[i if dim == 0 else 0] for pair, dim in zip(pairs, dims, strict=True)))
            for one, other in zip(batched, torch.utils._pytree.tree_leaves(alone), strict=True):
                assert_same(one[i], other)


def test_the_second_derivative_of_a_float32_weight_is_not_rounded_on_the_way() -> None:
    given = tensors(mixed.draw(TRAINED[2], 4, 64))
    x, weight = given["x"].requires_grad_(), given["weight"].requires_grad_()
    y = rms_norm(x, weight, round_weight=True, out_dtype=F32)
    (dx,) = torch.autograd.grad(y, x, given["dy"].float(), create_graph=True)
    (second,) = torch.autograd.grad(dx.float().square().sum(), weight)
    assert second.dtype == F32
    assert (second.to(BF16).float() != second).float().mean() > 0.9


def test_dweight_of_a_float32_weight_is_within_float32s_bounds() -> None:
    given = mixed.draw(Mix("bf16", None, "f32", round_weight=True), 65_536, 32)
    operands = tensors(given)
    weight = operands["weight"].requires_grad_()
    rms_norm(operands["x"], weight, round_weight=True).backward(operands["dy"])
    _, rstd = torch.ops.pallas_norm.rms_norm(operands["x"], None, *OPTIONS)
    exact, bound = oracle.weight_gradient64(given["x"], host(rstd), given["dy"], oracle.F32)
    oracle.assert_within(host(weight.grad), exact, bound / 65_537 * 64)


def test_a_module_rounds_as_it_is_told_and_one_that_was_saved_before_does_as_it_did() -> None:
    x = draw(5, 64, dtype=BF16)
    norm = RMSNorm(64, out_dtype=BF16, unit_dtype=F32, round_weight=True)
    torch.nn.init.normal_(norm.weight)
    assert_same(norm(x).detach(), rms_norm(x, norm.weight.detach(), out_dtype=BF16, cast_before_scale=False))
    assert norm.extra_repr() == "64, eps=1e-06, out_dtype=torch.bfloat16, unit_dtype=torch.float32, round_weight=True"
    for name in ("out_dtype", "unit_dtype", "round_weight"):
        del vars(norm)[name]
    assert_same(norm(x).detach(), rms_norm(x, norm.weight.detach()))


# --- results where the operands lie -----------------------------------------------------------------------------------

PLACES = [(out, s_out) for out, s_out in itertools.product((None, "x", "residual", "own"), repeat=2) if (out, s_out) not in ((None, None), ("x", "x"), ("residual", "residual"))]  # fmt: skip  # noqa: E501


def placed(
    x: torch.Tensor, residual: torch.Tensor, own: torch.Tensor, places: tuple[str | None, str | None]
) -> Tensors:
    at = {"x": x, "residual": residual}
    given = {"out": places[0], "s_out": places[1]}
    return {name: at[place] if place in at else own[int(name == "out")] for name, place in given.items() if place}


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
        (kernel,) = kernels.values()
        _, _, named = kernel.launches[-1]
        in_place = {named["y"], named["s"]} & {named["x"], named["residual"]}
        safe = (rows, n) in ((64, 128), (7, 4096))
        assert bool(in_place) == (safe and bool({"x", "residual"} & {*places}))


def statements_of(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    from pallas_norm._spec import Spec

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
