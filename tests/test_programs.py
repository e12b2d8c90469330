"""What a program costs and needs: how often a call compiles, how many kernels a model has, which devices tracing asks,
and JAX's configurations under which every call works.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_norm import add_rms_norm, explain, rms_norm

ROOT = Path(__file__).parent.parent
COMPILED = "/jax/core/compile/backend_compile_duration"


def draw(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.sum(rms_norm(x, weight).astype(jnp.float32) ** 2)


# --- programs are kept ----------------------------------------------------------------------------------------------

X, WEIGHT = draw(4, 128), draw(128, seed=1)
OUTSIDE_JIT: dict[str, Callable[[], Any]] = {
    "grad": lambda: jax.grad(loss, (0, 1))(X, WEIGHT),
    "vjp": lambda: jax.vjp(rms_norm, X, WEIGHT)[1](X),
    "vjp of the sum": lambda: jax.vjp(add_rms_norm, X, X, WEIGHT)[1]((X, X)),
    "vmap": lambda: jax.vmap(rms_norm, in_axes=(0, None))(X, WEIGHT),
    "vmap, a weight each": lambda: jax.vmap(rms_norm)(X, X),
    "vmap of grad": lambda: jax.vmap(jax.grad(loss), in_axes=(0, None))(X, WEIGHT),
    "second derivative": lambda: jax.grad(lambda x: jnp.sum(jax.grad(loss)(x, WEIGHT).astype(jnp.float32)))(X),
    "remat": lambda: jax.grad(jax.checkpoint(rms_norm_sum))(X),
    "a plain call": lambda: rms_norm(X, WEIGHT),
}


def rms_norm_sum(x: jax.Array) -> jax.Array:
    return loss(x, WEIGHT)


@pytest.fixture
def compiles() -> Any:
    """The compilations of a test so far."""
    seen: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", OUTSIDE_JIT)
def test_a_call_outside_jit_compiles_the_first_time_only(name: str, compiles: list[str]) -> None:
    """custom_vjp and custom_vmap trace their rules anew in every transformation: 1.3 s and 4 MB a call, for ever."""
    call = OUTSIDE_JIT[name]
    jax.clear_caches()
    call()
    assert compiles  # the listener hears
    call()
    compiles.clear()
    for _ in range(5):
        call()
    assert compiles == []


def test_memory_does_not_grow_with_the_number_of_calls() -> None:
    def calls(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(OUTSIDE_JIT["grad"]())

    calls(20)
    gc.collect()
    tracemalloc.start()
    try:
        calls(20)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        calls(200)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 200 * 1024  # a compiled program each was 4 MB


LAYERS = 64


def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return weight * unit.astype(x.dtype)


def model(norm: Callable[..., Any]) -> Callable[..., Any]:
    """64 layers, unrolled, of two norms and two matrix products each."""

    def run(x: jax.Array, weights: Any, matrices: Any) -> jax.Array:
        for (first, second), (up, down) in zip(weights, matrices, strict=True):
            x = x + norm(x, first) @ up
            x = x + norm(x, second) @ down
        return jnp.sum(x.astype(jnp.float32))

    return jax.grad(run, argnums=(0, 1, 2))


def lowered(norm: Callable[..., Any], platform: str) -> tuple[str, float]:
    struct = jax.ShapeDtypeStruct
    x, weight, matrix = (struct(shape, jnp.bfloat16) for shape in ((4, 16, 256), (256,), (256, 256)))
    operands = x, [(weight, weight)] * LAYERS, [(matrix, matrix)] * LAYERS
    jax.clear_caches()
    start = time.process_time()
    text = jax.jit(model(norm)).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    return text, time.process_time() - start


def test_a_deep_model_has_one_kernel_text_for_each_distinct_norm() -> None:
    text, _ = lowered(rms_norm, "cuda")
    assert text.count("custom_call @mosaic_gpu") == 3  # forward, backward, and the sum of the parts of dweight
    assert len(text) < 2_000_000  # 18 MB, with 384 kernels
    assert "mosaic_gpu" not in lowered(rms_norm, "cpu")[0]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_deep_model_traces_and_lowers_about_as_fast_as_the_plain_formula(platform: str) -> None:
    """Processor time, in turns, the least of three each. On CUDA three kernels are lowered on top, once."""
    lowered(rms_norm, platform)  # imports
    ours = min(lowered(rms_norm, platform)[1] for _ in range(3))
    theirs = min(lowered(plain, platform)[1] for _ in range(3))
    assert ours <= 1.3 * theirs + (1.0 if platform == "cuda" else 0.0)


# --- tracing asks no device -----------------------------------------------------------------------------------------

NOTHING_STARTED = """
import jax, jax.numpy as jnp, numpy as np
from jax._src import xla_bridge
from pallas_norm import add_rms_norm, rms_norm

x, w = jax.ShapeDtypeStruct((4, 256), "bfloat16"), jax.ShapeDtypeStruct((256,), "bfloat16")
def gradient(x, w): return jax.vjp(rms_norm, x, w)[1](x)
for function in (rms_norm, gradient, lambda x, w: add_rms_norm(x, x, w), lambda x, w: rms_norm(x, np.ones(256, "float32"))):
    jax.eval_shape(function, x, w)
    jax.make_jaxpr(function)(x, w)
    jax.eval_shape(jax.vmap(lambda x: function(x, jnp.ones(256, "bfloat16"))), x)
assert not xla_bridge.backends_are_initialized(), "a backend was started"
jax.distributed.initialize("localhost:{port}", num_processes=1, process_id=0)
assert rms_norm(jnp.ones((2, 64)), jnp.ones(64)).shape == (2, 64)
"""


def test_tracing_starts_no_backend() -> None:
    """What runs is decided when a program is lowered; jax.distributed.initialize works after eval_shape."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = NOTHING_STARTED.replace("{port}", str(port))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- configurations -------------------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion strict": lambda: jax.numpy_dtype_promotion("strict"),
    "debug_nans": lambda: jax.debug_nans(True),  # noqa: FBT003
    "disable_jit": jax.disable_jit,
    "checking leaks": jax.checking_leaks,
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "x64": lambda: jax.enable_x64(True),  # noqa: FBT003
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_call_works_under_each_configuration(name: str, dtype: str) -> None:
    x, weight, dy = draw(3, 4, 96, dtype=dtype), draw(96, seed=1, dtype=dtype), draw(3, 4, 96, seed=2, dtype=dtype)
    weights = draw(3, 96, seed=3, dtype=dtype)

    def calls() -> list[Any]:
        def gradient(x: Any, weight: Any, dy: Any) -> Any:
            return jax.vjp(rms_norm, x, weight)[1](dy)

        return jax.tree.leaves([
            rms_norm(x, weight),
            rms_norm(x),
            add_rms_norm(x, dy, weight, return_rstd=True),
            gradient(x, weight, dy),
            jax.vjp(add_rms_norm, x, dy, weight)[1]((dy, x)),
            jax.vjp(gradient, x, weight, dy)[1]((dy, weight)),
            jax.vmap(rms_norm, in_axes=(0, None))(x, weight),
            jax.vmap(rms_norm)(x, weights),
            jax.jit(rms_norm)(x, weight),
        ])  # fmt: skip

    expected = calls()
    with CONFIGURATIONS[name]():
        found = calls()
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == other.dtype
        if name == "disable_jit":  # operation by operation: XLA contracts no product and sum
            wide = np.asarray(other, np.float64)
            step = float(jnp.finfo(own.dtype).eps)
            assert np.all(np.abs(np.asarray(own, np.float64) - wide) <= 96 * step * np.abs(wide).max())
        else:
            assert np.array_equal(own, other)


# --- the dtype of a weight made of Python numbers -------------------------------------------------------------------


def test_a_weakly_typed_weight_gives_way_as_it_does_in_a_product() -> None:
    weak, x = jnp.full(128, 0.7), draw(4, 128)
    assert weak.weak_type
    assert rms_norm(x, weak).dtype == (x * weak).dtype == jnp.bfloat16
    assert np.array_equal(rms_norm(x, weak), rms_norm(x, weak.astype(jnp.bfloat16)))
    carried, _ = jax.lax.scan(lambda x, _: (rms_norm(x, weak), None), x, length=2)
    assert carried.dtype == jnp.bfloat16
    dweight = jax.grad(lambda w: jnp.sum(rms_norm(x, w).astype(jnp.float32)))(weak)
    assert dweight.dtype == jnp.float32


def test_a_weakly_typed_sum_gives_way_too() -> None:
    x, ones = draw(4, 128), jnp.full((4, 128), 1.0)
    for y, s in (add_rms_norm(x, ones), add_rms_norm(ones, x)):
        assert y.dtype == s.dtype == jnp.bfloat16
    assert add_rms_norm(ones, ones)[1].dtype == jnp.float32


# --- one output of add_rms_norm that nobody uses --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_where_only_the_sum_is_used_its_gradient_passes_as_it_is(dtype: str) -> None:
    """The gradient of y is a symbolic zero, not an array of zeros, which a rstd of infinity would make NaN."""
    x = draw(5, 128, dtype=dtype).at[0].set(0).at[1, 3].set(jnp.inf).at[2].set(jnp.finfo(dtype).max)
    residual, weight = jnp.zeros_like(x), draw(128, seed=1, dtype=dtype)
    ds = draw(5, 128, seed=2, dtype=dtype)

    def used(x: Any, residual: Any, weight: Any) -> Any:
        _, s = add_rms_norm(x, residual, weight, eps=0.0)
        return s

    for run in (lambda: jax.vjp(used, x, residual, weight)[1](ds), jax.jit(lambda: jax.vjp(used, x, residual, weight)[1](ds))):  # noqa: E501
        dx, dresidual, dweight = run()
        assert np.array_equal(dx, ds)
        assert np.array_equal(dresidual, ds)
        assert not np.any(dweight)
    text = jax.jit(lambda: jax.vjp(used, x, residual, weight)[1](ds)).trace().lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") <= 1  # nothing runs backward


def test_where_only_y_is_used_no_gradient_of_the_sum_is_added() -> None:
    x, weight, dy = draw(5, 128), draw(128, seed=1), draw(5, 128, seed=2)
    only_y = jax.vjp(lambda x: add_rms_norm(x, x, weight)[0], x)[1](dy)
    assert np.array_equal(only_y[0], 2 * jax.vjp(lambda s: rms_norm(s, weight), x + x)[1](dy)[0])


# --- vmap with a weight for each member -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cast_before_scale": False}, {"weight_offset": 1.0}], ids=str)
def test_a_weight_for_each_member_is_one_program_without_a_loop(options: Any) -> None:
    x, weights = draw(256, 4, 128), draw(256, 128, seed=1)

    def both(x: Any, weight: Any) -> Any:
        y, pullback = jax.vjp(lambda x, weight: rms_norm(x, weight, **options), x, weight)
        return y, *pullback(y)

    together = jax.jit(jax.vmap(both))
    text = together.trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
    assert "stablehlo.while" not in text
    y, dx, dweight = together(x, weights)
    alone = jax.jit(both)
    for member in (0, 100, 255):
        one = alone(x[member], weights[member])
        assert np.array_equal(y[member], one[0])
        if options == {"cast_before_scale": False}:  # dy * weight is in no fusion with what follows, so no fma takes it
            assert np.allclose(np.asarray(dx[member], np.float32), np.asarray(one[1], np.float32), rtol=2**-7, atol=1e-5)
        else:
            assert np.array_equal(dx[member], one[1])
        assert np.allclose(np.asarray(dweight[member], np.float32), np.asarray(one[2], np.float32), rtol=2**-7, atol=1e-5)


# --- export with a row count that is not known ----------------------------------------------------------------------


def exported(function: Callable[..., Any], dims: str, platform: str) -> export.Exported:
    x = jax.ShapeDtypeStruct(export.symbolic_shape(f"{dims}, 256"), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((256,), jnp.bfloat16)
    done = export.export(jax.jit(function), platforms=(platform,))(x, weight)
    return export.deserialize(done.serialize())


def gradient(x: Any, weight: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](x)


@pytest.mark.parametrize("dims", ["b", "b, t"])
@pytest.mark.parametrize("function", [rms_norm, gradient])
def test_a_symbolic_row_count_exports_for_a_cpu(function: Any, dims: str) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("runs what was exported for a CPU")
    call = exported(function, dims, "cpu").call
    for shape in ((3, 256), (7, 256)) if dims == "b" else ((2, 3, 256), (1, 5, 256)):
        x, weight = jnp.round(draw(*shape)), draw(256, seed=1)
        for own, other in zip(jax.tree.leaves(call(x, weight)), jax.tree.leaves(function(x, weight)), strict=True):
            assert own.shape == other.shape
            assert np.allclose(np.asarray(own, np.float32), np.asarray(other, np.float32), rtol=2**-7, atol=1e-5)


def test_a_symbolic_row_count_for_cuda_says_what_to_do() -> None:
    with pytest.raises(NotImplementedError) as error:
        exported(rms_norm, "b, t", "cuda")
    assert str(error.value) == (
        "x has b, t rows, a number that this program does not know, and a kernel's grid is compiled for its rows; "
        'export one program for each number of rows, or pass implementation="xla"'
    )
    assert exported(lambda x, w: rms_norm(x, w, implementation="xla"), "b", "cuda").platforms == ("cuda",)


# --- a GPU with less shared memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "dtype"), [(8192, "bfloat16"), (6144, "float32"), (20480, "bfloat16"), (1024, "bfloat16")])
def test_a_plan_that_does_not_fit_the_shared_memory_gives_way_to_xla(n: int, dtype: str) -> None:
    core = pytest.importorskip("jax.experimental.mosaic.gpu.core", reason="needs Mosaic GPU")
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in ((64, n), (n,)))

    def kernels(**how: Any) -> int:
        def run(x: Any, weight: Any) -> Any:
            return jax.vjp(lambda x, weight: rms_norm(x, weight, **how), x, weight)[1](x.astype(x.dtype))

        return jax.jit(run).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu")

    with core.artificial_shared_memory_limit(101376):
        assert kernels() == (3 if n == 1024 else 1 if n < 20480 else 0)
        assert explain(x).cuda == ("xla" if n == 20480 else "mosaic_gpu")
        if n == 20480:
            assert "shared memory" in explain(x).why
            with pytest.raises(NotImplementedError, match="shared memory"):
                kernels(implementation="mosaic_gpu")
    assert kernels() == 3


# --- what is kept for the backward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True])
def test_what_is_kept_for_the_backward_pass_is_x_rstd_and_the_weight(
    remat: bool,  # noqa: FBT001
    capsys: pytest.CaptureFixture[str],
) -> None:
    def block(x: Any, residual: Any, weight: Any) -> Any:
        y, s = add_rms_norm(jnp.sin(x), residual, weight)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(s.astype(jnp.float32))

    policy = jax.checkpoint_policies.save_only_these_names("pallas_norm_rstd")
    jax.ad_checkpoint.print_saved_residuals(
        jax.checkpoint(block, policy=policy) if remat else block, draw(8, 128), draw(8, 128), draw(128)
    )
    lines = capsys.readouterr().out.splitlines()
    shapes = sorted(line.split()[0] for line in lines)
    if remat:  # the arguments, and rstd by its name
        assert shapes == ["bf16[128]", "bf16[8,128]", "bf16[8,128]", "f32[8]"]
    else:  # cos(x) is the sine's; of the norm s, rstd and the weight
        assert shapes == ["bf16[128]", "bf16[8,128]", "bf16[8,128]", "f32[8]"]
