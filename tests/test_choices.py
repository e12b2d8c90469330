"""What a program is given where a kernel cannot be compiled for it, and what is kept for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_norm import add_rms_norm, rms_norm


def draw(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# --- export with a row count that is not known ----------------------------------------------------------------------


def exported(function: Callable[..., Any], dims: str, platform: str) -> export.Exported:
    x = jax.ShapeDtypeStruct(export.symbolic_shape(f"{dims}, 256"), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((256,), jnp.bfloat16)
    done = export.export(jax.jit(function), platforms=(platform,))(x, weight)
    return export.deserialize(done.serialize())


def gradient(x: Any, weight: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](x)


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("n", "weight_dtype", "fitting"),
    # The forward kernel, whose y and dy are float32 beside such a weight; the two of the backward pass; all.
    [(16384, "float32", 1), (18432, "bfloat16", 2), (1024, "bfloat16", 3)],
)
def test_a_plan_that_does_not_fit_the_shared_memory_gives_way_to_xla(n: int, weight_dtype: str, fitting: int) -> None:
    """What no plan should do, since each is fitted to its GPU: Mosaic's own count is the last word."""
    core = pytest.importorskip("jax.experimental.mosaic.gpu.core", reason="needs Mosaic GPU")
    x, weight = jax.ShapeDtypeStruct((100, n), jnp.bfloat16), jax.ShapeDtypeStruct((n,), jnp.dtype(weight_dtype))

    def kernels(**how: Any) -> int:
        def run(x: Any, weight: Any) -> Any:
            y, gradients = jax.vjp(lambda x, weight: rms_norm(x, weight, **how), x, weight)
            return gradients(jnp.ones_like(y))

        return (
            jax.jit(run).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu")
        )

    with core.artificial_shared_memory_limit(101376):
        assert kernels() == fitting
        if fitting < 3:
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
