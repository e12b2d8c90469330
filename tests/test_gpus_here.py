"""What the GPUs of this machine are to a program: one kind, with what all of them have, or none, and explain says why.

No GPU is needed: they are as much of JAX's devices as is looked at.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_norm import _compat, _target, explain, rms_norm
from pallas_norm.plans.hardware import H200, Gpu
from tests import rewrites
from tests.lowered import modules, nothing_compiled  # noqa: F401  a fixture
from tests.rewrites import Rewrite


class Device:
    """As much of one of JAX's GPUs as is looked at."""

    platform, device_kind, process_index = "gpu", "NVIDIA A100-SXM4-40GB", 0

    def __init__(self, capability: str, shared_bytes: int = 166912, multiprocessors: int = 108) -> None:
        self.compute_capability = capability
        self.shared_memory_per_block_optin, self.core_count = shared_bytes, multiprocessors


@contextlib.contextmanager
def machine(*devices: Device) -> Iterator[None]:
    """These are the GPUs of this process. Programs that are lowered inside are a CPU's, whose client has no others."""
    with pytest.MonkeyPatch.context() as patch, jax.default_device(jax.devices("cpu")[0]):
        patch.setattr(_compat, "cuda_devices", lambda: list(devices))
        yield


def newest_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))


def test_the_gpus_here_are_one_kind_with_what_all_of_them_have(monkeypatch: pytest.MonkeyPatch) -> None:
    newest_jax(monkeypatch)
    with machine(Device("8.0"), Device("8.0", 160000, 56)):
        assert _target.here().gpu == Gpu((8, 0), 160000, 56)
    with machine():
        assert _target.here() == (H200, None)


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (("7.5",), "a GPU has compute capability 7.5; the kernels need 8.0 (Ampere) or newer"),
        (("9.0", "7.5"), "a GPU has compute capability 7.5; the kernels need 8.0 (Ampere) or newer"),
        (
            ("9.0", "8.9"),
            "the GPUs have compute capabilities 8.9 and 9.0, and a program is lowered for all of them; "
            "CUDA_VISIBLE_DEVICES leaves those of one",
        ),
    ],
)
def test_gpus_without_kernels_and_of_two_kinds_are_xla_s(
    devices: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest_jax(monkeypatch)
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)
    with machine(*map(Device, devices)):
        path = explain(x)
        assert (path.cuda, path.plan) == ("xla", None)
        assert path.why == f"{reason}, so XLA compiles the reference, with the same rounding"
        assert modules(rms_norm, x) == []


def test_before_0_11_an_ampere_is_xla_s_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM ends the process there: Mosaic's kernels had instructions of Hopper in each."""
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(_compat, "VERSION", "0.10.2")
    with machine(Device("8.6")):
        assert explain(jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)).why == (
            "a GPU has compute capability 8.6; the kernels need 9.0 (Hopper) or newer with jax 0.10.2, and 8.0 with "
            "jax 0.11, so XLA compiles the reference, with the same rounding"
        )


@pytest.mark.parametrize(
    ("n", "capability", "end"),
    [
        (512, "9.0", "for other platforms"),
        (
            4096,
            "8.0",
            "; on compute capability 8.0 (Ampere: A100, A30) rows are read forward from registers and backward from "
            "memory, with the bits of other GPUs; up to 4 rows are shared by more warps, with the same bits",
        ),
        (
            32768,
            "8.0",
            "; the backward pass is XLA's, because rows of 32768 elements are shared by a cluster of 8 CTAs, and a GPU "
            "of compute capability 8.0 has no clusters, which came with 9.0 (Hopper)",
        ),
    ],
)
def test_explain_says_which_plan_and_why(n: int, capability: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    newest_jax(monkeypatch)
    with machine(Device(capability, 232448 if capability == "9.0" else 166912)):
        path = explain(jax.ShapeDtypeStruct((4, n), jnp.bfloat16))
    assert (path.cuda, path.elsewhere) == ("mosaic_gpu", "xla")
    assert path.why.endswith(end)
    assert path.plan is not None


def test_what_mosaic_would_lower_for_another_gpu_is_not_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    newest_jax(monkeypatch)
    monkeypatch.setattr(_compat, "mosaic_architecture", lambda: (9, 0))
    monkeypatch.setattr(_compat, "default_device", lambda device: contextlib.nullcontext())
    with machine(Device("8.0")):
        assert modules(rms_norm, jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)) == []
        with pytest.raises(_target.NoKernel) as error, _target.in_mosaic(_target.here()):
            pass
    assert str(error.value) == "Mosaic would lower for compute capability 9.0, and the GPU has 8.0"
    _target._assembled_for.clear()
    with machine(Device("10.0", 232448, 148)), _target.in_mosaic(_target.here()):
        assert _target._assembled_for == [(10, 0)]  # whose assembler takes modules of Hopper's


# --- wrong targets ----------------------------------------------------------------------------------------------------


def target() -> Any:
    return sys.modules["pallas_norm._target"]


def lowered_for_two_kinds() -> None:
    with machine(Device("9.0"), Device("8.9")), pytest.raises(target().NoKernel):
        target().here()


def lowered_for_turing() -> None:
    with machine(Device("7.5")), pytest.raises(target().NoKernel):
        target().here()


def lowered_for_another_architecture() -> None:
    with pytest.MonkeyPatch.context() as patch, machine(Device("8.0")):
        patch.setattr(_compat, "mosaic_architecture", lambda: (9, 0))
        patch.setattr(_compat, "default_device", lambda device: contextlib.nullcontext())
        with pytest.raises(target().NoKernel), target().in_mosaic(target().here()):
            pass


def default_device_left() -> None:
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, machine(ampere := Device("8.0")):
        patch.setattr(_compat, "mosaic_architecture", lambda: (8, 0) if asked else (9, 0))
        patch.setattr(_compat, "default_device", lambda device: asked.append(device) or contextlib.nullcontext())
        with target().in_mosaic(target().here()):
            assert asked == [ampere]


def assembled_for_two() -> None:
    target().assemble_for((9, 0))
    with machine(Device("8.0")), pytest.raises(target().NoKernel):
        target().here()


def with_least_of_two() -> None:
    with machine(Device("8.0"), Device("8.0", 160000, 56)):
        assert target().here().gpu == Gpu((8, 0), 160000, 56)


MUTANTS: dict[str, tuple[Rewrite, Callable[[], None]]] = {
    "GPUs of two kinds": (Rewrite("_target", "if len(capabilities) > 1:", "if False:"), lowered_for_two_kinds),
    "a GPU that is too old": (Rewrite("_target", "if capability >= oldest:", "if True:"), lowered_for_turing),
    "a module of another architecture": (
        Rewrite("_target", "if not takes(capability, found):", "if False:"),
        lowered_for_another_architecture,
    ),
    "the default device's architecture": (
        Rewrite("_target", "if _compat.mosaic_architecture() != capability:", "if False:"),
        default_device_left,
    ),
    "two architectures in a process": (
        Rewrite("_target", "if _assembled_for in ([], [capability]):", "if True:"),
        assembled_for_two,
    ),
    "what one of two GPUs has": (Rewrite("_target", "[min(getattr", "[max(getattr"), with_least_of_two),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_target_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    newest_jax(monkeypatch)
    rewrite, check = MUTANTS[name]
    check()
    target()._assembled_for.clear()
    with rewrites.rewritten(rewrite), pytest.raises((AssertionError, pytest.fail.Exception, target().NoKernel)):
        check()
