"""Every combination of dtypes of x, residual, weight, unit, y and s in torch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from pallas_norm_torch import RMSNorm, add_rms_norm, decompositions, rms_norm
from pallas_norm_torch.programs import Program
from tests import mixed_dtypes as mixed
from tests import oracle
from tests.interop.cases import DTYPES, OPTIONS, assert_same, draw
from tests.interop.fake_kernels import FakeKernel, made  # noqa: F401  a fixture
from tests.interop.mixed_cases import TORCH, Tensors, call, options, tensors
from tests.interop.test_statements import host
from tests.mixed_dtypes import EPS, TRAINED, Mix

BF16, F16, F32 = DTYPES


def check(mix: Mix, given: dict[str, Any], found: Tensors) -> None:
    """Of torch's own statements, and of a GPU's kernels: the roundings from the rstd that is found, which lies within
    the bound of any order of additions, as dx does."""
    results = {name: host(value) for name, value in found.items()}
    x, weight, rstd, dy = given["x"], given.get("weight"), results["rstd"], given["dy"]
    if mix.residual is not None:
        s_dtype = mix.s_dtype and oracle.DTYPES[mix.s_dtype]
        oracle.assert_same(results["s"], oracle.add(x, given["residual"], s_dtype))
        x = results["s"]
    rounding = mix.of_norm | {"weight_offset": mix.weight_offset}
    if mix.unit_dtype is None:
        rounding |= {"unit_dtype": x.dtype}
    n = x.shape[-1]
    oracle.assert_rstd(rstd, x, EPS, n)
    oracle.assert_same(results["y"], oracle.replay(x, weight, rstd, **rounding))
    ds, bound = oracle.input_gradient64(x, weight, rstd, dy, n, **rounding)
    if mix.residual is not None:  # added to the rounded gradient, and rounded
        ds = ds + given["ds"].astype(np.float64)
        bound = bound + oracle.U * np.abs(ds)
        bound = bound + oracle.spacing(np.abs(ds) + bound, x.dtype) / 2
    for name in ("x", "residual") if mix.residual is not None else ("x",):
        gradient = results[f"d{name}"]
        assert gradient.dtype == given[name].dtype
        narrowed = 0 if gradient.dtype == x.dtype else oracle.spacing(np.abs(ds) + bound, gradient.dtype) / 2
        oracle.assert_within(gradient, ds, bound + narrowed)
    if weight is not None:
        of_unit = {"unit_dtype": rounding["unit_dtype"]}
        oracle.assert_within(results["dweight"], *oracle.weight_gradient64(x, rstd, dy, weight.dtype, **of_unit))
        assert results["dweight"].dtype == weight.dtype


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(10)
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
