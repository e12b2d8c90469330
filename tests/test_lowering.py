"""What a program becomes when it is lowered: a Mosaic GPU kernel for CUDA, the reference elsewhere. Needs no GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest

from pallas_norm import add_rms_norm, explain, rms_norm
from pallas_norm.plans.plan import Plan
from pallas_norm.regimes import backward_plan_for, plan_for
from tests.mixed_dtypes import TRAINED, Mix, call, draw

ROWS = 37  # fills no whole number of blocks
KINDS = {  # one width at least for every kind of plan, forward and backward; the test below looks for more
    "bfloat16": [
        *(
            32,
            33,
            80,
            128,
            200,
            300,
            320,
            512,
            896,
            1000,
            1023,
            1024,
            1025,
            1088,
            4096,
            4097,
            5000,
            6144,
            7680,
            8192,
            8200,
            12288,
            12352,
            16384,
        ),
        *(16385, 16640, 32768, 32769, 40000, 65536, 65537, 65896, 131071, 131072),
    ],
    "float32": [
        *(
            32,
            33,
            128,
            512,
            800,
            1000,
            1024,
            1025,
            1088,
            1536,
            4096,
            4107,
            4224,
            8192,
            8193,
            8472,
            16384,
            16620,
            32768,
            32916,
        ),
        *(65536, 131072),
    ],
}


def kind(plan: Plan) -> tuple[Any, ...]:
    """What decides which statements of a kernel's body are there."""
    keeps_weight = getattr(plan, "keeps_weight", None)
    shared = plan.warpgroups > 1, plan.cluster > 1
    return plan.regime, *shared, plan.overlap > 0, plan.source, plan.rows_in_registers, keeps_weight


def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(function: Callable[..., Any], *operands: Any, platform: str) -> str:
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def kernels_in(text: str) -> int:
    """Calls of a Mosaic GPU kernel: their target is mosaic_gpu_v2, or mosaic_gpu before that."""
    return text.count("custom_call @mosaic_gpu")


def gradient(x: Any, weight: Any, dy: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](dy)


def add_gradient(x: Any, residual: Any, weight: Any, dy: Any) -> Any:
    return jax.vjp(add_rms_norm, x, residual, weight)[1]((dy, x))


def check(function: Callable[..., Any], *operands: Any, kernels: int) -> None:
    assert kernels_in(lowered(function, *operands, platform="cuda")) == kernels
    assert "custom_call" not in lowered(function, *operands, platform="cpu")


@pytest.mark.parametrize("dtype", KINDS)
def test_the_widths_below_reach_every_kind_of_plan(dtype: str) -> None:
    every = [*range(32, 1100), *range(1100, 131073, 97), *range(1536, 131073, 128)]
    for find in (plan_for, backward_plan_for):
        assert {kind(find(n, dtype)) for n in every} <= {kind(find(n, dtype)) for n in KINDS[dtype]}


@pytest.mark.sampled(55)
@pytest.mark.parametrize(("dtype", "n"), [(dtype, n) for dtype, widths in KINDS.items() for n in widths])
def test_forward_and_backward_lower_to_one_kernel_each_for_cuda_and_to_none_elsewhere(dtype: str, n: int) -> None:
    x, weight = array(ROWS, n, dtype=dtype), array(n, dtype=dtype)
    check(rms_norm, x, weight, kernels=1)
    check(gradient, x, weight, x, kernels=3)  # forward, backward, and the sum of the parts of dweight


@pytest.mark.sampled(8)
@pytest.mark.parametrize("n", [33, 128, 1000, 1025, 4096, 16384, 40000, 131072])
def test_the_residual_form_lowers_to_one_kernel_each_way(n: int) -> None:
    x, weight = array(ROWS, n, dtype="bfloat16"), array(n, dtype="bfloat16")
    check(add_rms_norm, x, x, weight, kernels=1)
    check(add_gradient, x, x, weight, x, kernels=3)


@pytest.mark.sampled(18)
@pytest.mark.parametrize("n", [*KINDS["bfloat16"][::3], *KINDS["float32"][::4], 32800])
def test_a_float32_stream_beside_a_bfloat16_x_lowers_at_every_kind_of_plan(n: int) -> None:
    mix = TRAINED[5]
    given = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in draw(mix, ROWS, n).items()}
    check(functools.partial(call, mix, implementation=None), given, kernels=3)


@pytest.mark.sampled(30)
@pytest.mark.parametrize("n", [200, 2048, 32768])
@pytest.mark.parametrize("mix", TRAINED, ids=str)
def test_what_people_train_with_lowers(mix: Mix, n: int) -> None:
    given = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in draw(mix, ROWS, n).items()}
    check(functools.partial(call, mix, implementation=None), given, kernels=3 if mix.weight else 2)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("n", [1, 31, 131073])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_widths_without_a_kernel_take_the_reference_everywhere(n: int, dtype: str) -> None:
    x, weight = array(ROWS, n, dtype=dtype), array(n, dtype=dtype)
    check(rms_norm, x, weight, kernels=0)
    check(add_rms_norm, x, x, weight, kernels=0)
    check(gradient, x, weight, x, kernels=0)


@pytest.mark.sampled(36)
@pytest.mark.parametrize("n", [200, 2048, 32768])
@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float16", "float32", None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_mix_of_dtypes_lowers_with_every_output(dtype: str, weight_dtype: str | None, n: int) -> None:
    x = array(2, ROWS, n, dtype=dtype)
    weight = [] if weight_dtype is None else [array(n, dtype=weight_dtype)]
    dy = jax.eval_shape(rms_norm, x, *weight)
    options = {"return_rstd": True, "cast_before_scale": n != 2048, "weight_offset": float(bool(weight) and n != 200)}

    def backward(dy: Any, *operands: Any) -> Any:
        return jax.vjp(lambda *operands: rms_norm(*operands, **options)[0], *operands)[1](dy)

    check(lambda *operands: rms_norm(*operands, **options), x, *weight, kernels=1)
    check(backward, dy, x, *weight, kernels=3 if weight else 2)


def test_no_rows_need_no_kernel() -> None:
    check(rms_norm, array(0, 256, dtype="bfloat16"), array(256, dtype="bfloat16"), kernels=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_rounding_of_the_reference_is_one_that_xla_may_not_remove(dtype: str) -> None:
    """A pair of casts does not do: XLA drops it in some fusions (bfloat16 on a CPU, float16 on a GPU), and the outputs
    come out rounded once."""
    x, weight = array(ROWS, 256, dtype=dtype), array(256, dtype=dtype)
    roundings = {
        rms_norm: 2,  # unit, y
        lambda x, weight: add_rms_norm(x, x, weight): 3,  # s
        lambda x, weight: rms_norm(x, weight, cast_before_scale=False): 1,
        lambda x, weight: gradient(x, weight, x): 5,  # those of the forward pass that are needed again, g, dx, dweight
    }
    for function, least in roundings.items():
        assert lowered(function, x, weight, platform="cpu").count("stablehlo.reduce_precision") >= least


def test_one_traced_program_can_be_lowered_for_each_platform() -> None:
    traced = jax.jit(rms_norm).trace(array(ROWS, 256, dtype="bfloat16"), array(256, dtype="bfloat16"))
    kernels = [kernels_in(traced.lower(lowering_platforms=(platform,)).as_text()) for platform in ("cuda", "cpu")]
    assert kernels == [1, 0]


def test_a_program_for_both_platforms_at_once_has_the_kernel_for_one_of_them() -> None:
    """Pallas Mosaic GPU refuses to be lowered for several platforms; here it is lowered for CUDA only."""
    x, both = array(ROWS, 256, dtype="bfloat16"), {"lowering_platforms": ("cuda", "cpu")}
    assert kernels_in(jax.jit(rms_norm).trace(x).lower(**both).as_text()) == 1
    by_xla = jax.jit(lambda x: rms_norm(x, implementation="xla")).trace(x).lower(**both)
    assert kernels_in(by_xla.as_text()) == 0


def test_a_forced_xla_path_has_no_kernel_on_cuda_either() -> None:
    x, weight = array(ROWS, 256, dtype="bfloat16"), array(256, dtype="bfloat16")
    check(lambda x, weight: rms_norm(x, weight, implementation="xla"), x, weight, kernels=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("n", [31, 32, 1023, 1024, 131072, 131073])
def test_explain_tells_what_lowering_does(n: int) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("on a GPU older than Hopper the answer is another one")
    x = array(ROWS, n, dtype="bfloat16")
    for platform, path in (("cuda", explain(x).cuda), ("cpu", explain(x).elsewhere)):
        assert path == ("mosaic_gpu" if kernels_in(lowered(rms_norm, x, platform=platform)) else "xla")
