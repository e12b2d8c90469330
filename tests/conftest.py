"""Eight virtual CPU devices, Hypothesis profiles, and which tests can run on this machine."""

from __future__ import annotations

import functools
import sys
import threading

import hypothesis
import jax
import pytest

from tests import division

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device: the sharding tests want several

DRAWN = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
PROFILES = {
    "dev": {"max_examples": 25, "phases": (*DRAWN, hypothesis.Phase.shrink)},
    # Each step of shrinking compiles a kernel: a failure prints its case and its blob, which dev shrinks.
    "ci": {"max_examples": 100, "derandomize": True, "print_blob": True, "phases": DRAWN},
    "quick": {"max_examples": 25, "derandomize": True, "print_blob": True, "phases": DRAWN},  # make test
    "nightly": {"max_examples": 2000, "print_blob": True},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", choices=tuple(PROFILES), default="ci", help="how many examples Hypothesis draws")


def pytest_configure(config: pytest.Config) -> None:
    for name, values in PROFILES.items():
        # An example that meets a new shape compiles a kernel, so times say nothing.
        hypothesis.settings.register_profile(
            name, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], **values
        )
    hypothesis.settings.load_profile(config.getoption("--profile"))
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if config.getoption("--profile") == "quick" and cache is not None:
        keep_compiled(config, cache)


def keep_compiled(config: pytest.Config, cache: pytest.Cache) -> None:
    """XLA's programs stay on disk for the next `make test`: of three files it took 0.56 of the CPU time. The key has
    the program, XLA's version and its options, so a program that a change makes another one is compiled. One folder for
    each worker, since one might read an entry that another writes. Not in `make test-all`: it depends on nothing.
    """
    worker = getattr(config, "workerinput", {}).get("workerid", "alone")
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("xla") / worker))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    division.thin(items)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart() -> None:
    """Lines that threads run are not measured before Python 3.12: there a thread installs coverage's trace function as
    it starts, which CPython refuses while another thread does the same (its issue 98257), so that the thread dies and
    its work is never done: test_threads.py.
    """
    if sys.version_info < (3, 12):
        threading.settrace(None)


@functools.cache
def _no_gpu() -> str | None:
    devices = [device for device in jax.local_devices() if device.platform == "gpu"]
    if not devices:
        return "needs a CUDA device of compute capability 9.0 or newer; JAX sees none"
    oldest = min(float(device.compute_capability) for device in devices)
    return None if oldest >= 9.0 else f"needs a CUDA device of compute capability 9.0 or newer; one here has {oldest}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _no_gpu()) is not None:
        pytest.skip(reason)


@pytest.fixture(params=["xla", "interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)], scope="module")
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param
