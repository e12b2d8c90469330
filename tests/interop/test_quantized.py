"""rms_norm_quantized and add_rms_norm_quantized of torch, by torch's statements, by fake kernels, on a GPU by the
launch: the bits are the oracle's of y, and y is rms_norm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pallas_norm
from pallas_norm.plans.hardware import H200
from pallas_norm_torch import add_rms_norm, add_rms_norm_quantized, launch, rms_norm, rms_norm_quantized
from pallas_norm_torch._kernels import Quantized
from pallas_norm_torch.launch import proof
from pallas_norm_torch.programs import Program
from tests import quantized_oracle
from tests.interop.cases import assert_same, draw
from tests.interop.fake_kernels import FakeKernel
from tests.interop.fake_kernels import made as made
from tests.oracle import BF16, DTYPES, Array

Tensor = torch.Tensor
KINDS = (torch.float8_e4m3fn, torch.int8)
FORMS: dict[str, dict[str, Any]] = {"tensor": {"scale": 0.0625}, "row": {}, "group": {"group_size": 128}}
NUMPY = {torch.bfloat16: BF16, torch.float16: DTYPES["f16"], torch.float32: DTYPES["f32"]}


def in_whole_groups(*lengths: int) -> list[tuple[str, int]]:
    return [(form, n) for form in FORMS for n in lengths if form != "group" or n % 128 == 0]


def as_numpy(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(quantized_oracle.E4M3)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.numpy()


def check(x: Tensor, residual: Tensor | None, weight: Tensor | None, form: str, dtype: torch.dtype) -> None:
    options, n = FORMS[form] | {"dtype": dtype}, x.shape[-1]
    group = {"tensor": 0, "row": n, "group": 128}[form]
    if residual is None:
        q, scale, y = rms_norm_quantized(x, weight, return_y=True, **options)
        assert_same(y, rms_norm(x, weight))
        without = rms_norm_quantized(x, weight, **options)
    else:
        q, scale, s, y = add_rms_norm_quantized(x, residual, weight, return_y=True, **options)
        for found, expected in zip((y, s), add_rms_norm(x, residual, weight), strict=True):
            assert_same(found, expected)
        *without, its_s = add_rms_norm_quantized(x, residual, weight, **options)
        assert_same(its_s, s)
    assert q.dtype == dtype
    assert q.shape == x.shape
    assert scale.shape == (() if form == "tensor" else (*x.shape[:-1], n // group))
    kind = str(dtype).removeprefix("torch.")
    quantized_oracle.assert_quantized(as_numpy(y), as_numpy(q), as_numpy(scale), kind, group)
    quantized_oracle.assert_same_q(as_numpy(without[0]), as_numpy(q))
    assert_same(without[1], scale)


def operands(dtype: torch.dtype, n: int, *, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x, residual = (draw(5, 3, n, dtype=dtype, seed=seed).to(device) for seed in (0, 1))
    return x, residual, draw(n, dtype=dtype, seed=2).to(device)


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
@pytest.mark.parametrize(("form", "n"), in_whole_groups(7, 128, 384, 1000))
def test_torch_statements_give_the_oracles_bits(form: str, dtype: torch.dtype, n: int) -> None:
    x, residual, weight = operands(dtype, n)
    for kind in KINDS:
        check(x, None, weight, form, kind)
        check(x, residual, None, form, kind)
        check(x[0, 0], None, weight, form, kind)
        check(x[:0], residual[:0], weight, form, kind)


def test_special_values() -> None:
    x = torch.ones(5, 64, dtype=torch.bfloat16)
    x[0], x[1], x[2, 3], x[3, 0] = 0, -0.0, torch.nan, torch.inf
    for kind in KINDS:
        check(x, None, None, "row", kind)
        check(x, None, None, "tensor", kind)
    for kind, most in ((torch.float8_e4m3fn, 448), (torch.int8, 127)):
        assert (rms_norm_quantized(x[4], dtype=kind, scale=1e-4)[0].float() == most).all()
    q, scale = rms_norm_quantized(x)
    assert scale[0] == scale[1] == 2.0**-23
    assert scale[2].isnan()
    assert q[2].float().isnan().all()
    assert not rms_norm_quantized(x, dtype=torch.int8)[0][2].any()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_are_those_of_jax(form: str) -> None:
    """Of sums that are exact in any order, so that y is the same."""
    x = torch.from_numpy(np.random.default_rng(0).integers(-4, 5, (9, 256)).astype(np.float32)).to(torch.bfloat16)
    weight = draw(256, dtype=torch.bfloat16, seed=2)
    for kind in KINDS:
        q, scale, y = rms_norm_quantized(x, weight, dtype=kind, return_y=True, **FORMS[form])
        name = str(kind).removeprefix("torch.")
        of_jax = pallas_norm.rms_norm_quantized(
            jnp.asarray(as_numpy(x)), jnp.asarray(as_numpy(weight)), dtype=name, return_y=True, **FORMS[form]
        )
        for found, expected in zip((q, scale, y), of_jax, strict=True):
            assert as_numpy(found).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("form", "n"), in_whole_groups(128, 1000, 4096, 65536))
def test_a_kernel_is_launched_with_what_it_takes(made: dict[Program, FakeKernel], form: str, n: int) -> None:
    x, residual, weight = operands(torch.bfloat16, n)
    check(x, residual, weight, form, torch.int8)
    check(x[1:, 1:2], None, weight, form, torch.float8_e4m3fn)  # copied first
    kernels = [kernel for kernel in made.values() if kernel.program.kind == "quantized"]
    assert len(kernels) == 4  # with y and without, of either call
    assert all(kernel.launches and kernel.launches[0][0] == 99 for kernel in kernels)
    before = sum(len(kernel.launches) for kernel in kernels)
    rms_norm_quantized(x[:0], weight, dtype=torch.float8_e4m3fn, **FORMS[form])
    assert sum(len(kernel.launches) for kernel in kernels) == before  # no rows, no launch


def test_groups_that_no_kernel_has_are_torchs(made: dict[Program, FakeKernel]) -> None:
    check(draw(3, 1152, dtype=torch.float32), None, None, "group", torch.int8)
    assert not any(program.kind == "quantized" for program in made)


def test_a_kernel_that_is_not_what_it_should_be_is_replaced(
    made: dict[Program, FakeKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(program: Program, device: int) -> Any:
        raise launch.Unavailable("planted")

    monkeypatch.setattr(launch, "kernel", refused)
    check(*operands(torch.bfloat16, 256)[:2], None, "row", torch.int8)
    assert not made


@pytest.mark.usefixtures("made")  # for CPU addresses
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_a_trial_run_finds_a_wrong_kernel_and_only_that(form: str, residual: bool) -> None:  # noqa: FBT001
    spec = pallas_norm._spec.Spec()
    for n, weight in ((128, None), (1024, torch.bfloat16)):
        group = {"tensor": 0, "row": n, "group": 128}[form]
        for dtype in KINDS:
            added = torch.bfloat16 if residual else None
            program = Quantized(n, torch.bfloat16, weight, spec, added, dtype, group, with_y=True).program(H200)
            for off, right in ((0, True), (1, False)):
                kernel: Any = FakeKernel(program, off=off)
                verdict = proof.CHECKS["quantized"](kernel, program, torch.device("cpu"), 0)
                assert verdict["q"] == right
                assert verdict.get("s", True)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": (
        {"dtype": torch.float8_e5m2},
        TypeError,
        "dtype is float8_e5m2; needed torch.float8_e4m3fn or torch.int8, the dtype of q",
    ),
    "no dtype": (
        {"dtype": "int8"},
        TypeError,
        "dtype is a str; needed torch.float8_e4m3fn or torch.int8, the dtype of q",
    ),
    "an array for a dtype": (
        {"dtype": np.array([1, 2])},
        TypeError,
        "dtype is a ndarray; needed torch.float8_e4m3fn or torch.int8, the dtype of q",
    ),
    "group": ({"group_size": 64}, ValueError, "group_size is 64; needed 128, or None for one scale for each row"),
    "zero": ({"scale": 0.0}, ValueError, "scale is 0.0; needed a positive float32 number: y is divided by it"),
    "two scales": (
        {"scale": torch.ones(2)},
        ValueError,
        "scale is float32[2] on cpu; needed one number: pass scale=None to compute one for each row",
    ),
    "scale dtype": (
        {"scale": torch.ones(1, dtype=torch.bfloat16)},
        TypeError,
        "scale is bfloat16[1] on cpu; needed float32: cast it with scale.to(torch.float32)",
    ),
    "scale device": (
        {"scale": torch.ones(1, device="meta")},
        ValueError,
        "scale is on meta but x is on cpu; move it with scale.to(x.device)",
    ),
    "return_y": ({"return_y": 1}, TypeError, "return_y is int; needed True or False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_told(name: str) -> None:
    options, error, message = WRONG[name]
    with pytest.raises(error) as raised:
        rms_norm_quantized(torch.ones(2, 192), **options)
    assert str(raised.value) == message


# Of which a kernel, which gets no more than an address, would read something else.
NOT_IN_MEMORY: dict[str, tuple[Callable[[], Tensor], str]] = {
    "negated": (
        lambda: torch._neg_view(torch.tensor(-0.5)),
        "scale is negated lazily, so its memory holds other values; needed them themselves: pass scale.resolve_neg()",
    ),
    "zero": (
        lambda: torch._efficientzerotensor((), dtype=torch.float32),
        "scale is a zero tensor without memory; needed one with: pass torch.zeros_like(scale)",
    ),
    "sparse": (
        lambda: torch.tensor([0.5]).to_sparse(),
        "scale has the layout torch.sparse_coo; needed torch.strided: pass scale.to_dense()",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.tensor([0.5])]),
        "scale is a nested tensor; needed a plain one: pass scale.to_padded_tensor(0.0)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("name", NOT_IN_MEMORY)
def test_a_scale_that_is_not_in_its_memory_is_refused(name: str) -> None:
    scale, message = NOT_IN_MEMORY[name]
    with pytest.raises(TypeError) as raised:
        rms_norm_quantized(torch.ones(2, 192), scale=scale())
    assert str(raised.value) == message


@pytest.mark.gpu
@pytest.mark.parametrize("n", [128, 384, 1000, 4096, 16384, 65536])
def test_on_a_gpu_the_launched_kernel_gives_the_oracles_bits(n: int) -> None:
    x, residual, weight = operands(torch.bfloat16, n, device="cuda")
    for form in FORMS if n % 128 == 0 else ("tensor", "row"):
        for kind in KINDS:
            check(x, None, weight, form, kind)
            check(x, residual, weight, form, kind)
    kernel = Quantized(
        n, torch.bfloat16, torch.bfloat16, pallas_norm._spec.Spec(), torch.bfloat16, torch.int8, n, with_y=True
    )
    assert launch.kernel(kernel.program(launch.gpu_of(0)), 0) is not None  # not refused


@pytest.mark.gpu
def test_on_a_gpu_a_graph_replays_it() -> None:
    x, _, weight = operands(torch.bfloat16, 4096, device="cuda")
    expected = rms_norm_quantized(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rms_norm_quantized(x, weight)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))
