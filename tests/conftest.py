"""Eight virtual CPU devices, Hypothesis profiles, and which tests can run on this machine."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

from tests import division, typed

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device: the sharding tests want several
# Nothing widens or broadcasts by JAX's own rules: neither in the packages, whose roundings are all written down, nor in
# a test, whose operands are what they seem to be. A test that is about those rules says so where it turns them on.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if typed.missing() is None:
    typed.install()

DRAWN = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
PROFILES = {
    "dev": {"max_examples": 25, "phases": (*DRAWN, hypothesis.Phase.shrink)},
    # Each step of shrinking compiles a kernel: a failure prints its case and its blob, which dev shrinks.
    "ci": {"max_examples": 100, "derandomize": True, "print_blob": True, "phases": DRAWN},
    "quick": {"max_examples": 3, "derandomize": True, "print_blob": True, "phases": DRAWN},  # make test
    "nightly": {"max_examples": 2000, "print_blob": True},
}


@contextlib.contextmanager
def _promotion_left_to_jax() -> Iterator[None]:
    """In every thread: bench compiles in several."""
    flags = {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    before = {name: getattr(jax.config, name) for name in flags}
    for name, value in flags.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture
def implicit_promotion() -> Iterator[None]:
    """For what other people write, who leave promotion to JAX."""
    with _promotion_left_to_jax():
        yield


@pytest.fixture(scope="module")
def implicit_promotion_throughout() -> Iterator[None]:
    """For a module whose own fixtures run what other people write."""
    with _promotion_left_to_jax():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", choices=tuple(PROFILES), default="ci", help="how many examples Hypothesis draws")


def pytest_report_header() -> str | None:
    return typed.missing()


def pytest_configure(config: pytest.Config) -> None:
    for name, values in PROFILES.items():
        # An example that meets a new shape compiles a kernel, so times say nothing.
        hypothesis.settings.register_profile(
            name, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], **values
        )
    hypothesis.settings.load_profile(config.getoption("--profile"))
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    quick = config.getoption("--profile") == "quick"
    # With nothing on disk 225 s instead of 275. No bit may depend on what LLVM does to a program: it does little in
    # `make test`, and all that it can in `make test-all`.
    jax.config.update("jax_disable_most_optimizations", quick)
    if quick and cache is not None:
        keep_compiled(config, cache)


def keep_compiled(config: pytest.Config, cache: pytest.Cache) -> None:
    """XLA's programs stay on disk for the next `make test`: of three files it took 0.56 of the CPU time. The key has
    the program, XLA's version and its options, so a program that a change makes another one is compiled. One folder for
    each worker, since one might read an entry that another writes; before they start, each gets what all have. Not in
    `make test-all`: it depends on nothing.
    """
    folder, worker = cache.mkdir("xla"), getattr(config, "workerinput", {}).get("workerid")
    if worker is None:
        share_compiled(folder)
    from pallas_norm import _partitioning

    # Of partitioned calls the key has what is computed, and not the programs that the package makes of them.
    sources = b"".join(path.read_bytes() for path in sorted(Path(_partitioning.__file__).parent.rglob("*.py")))
    digest = hashlib.sha256(sources).hexdigest()
    _partitioning.version = lambda: digest
    jax.config.update("jax_compilation_cache_dir", str(folder / (worker or "alone")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def share_compiled(folder: Path) -> None:
    """Links what each worker has into the others' folders: which tests one gets is another set each time."""
    entries = {path.name: path for path in folder.glob("*/*-cache")}
    for worker in folder.iterdir():
        for name in entries.keys() - set(os.listdir(worker)):
            with contextlib.suppress(FileExistsError):  # of another session that starts now
                os.link(entries[name], worker / name)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again: 0.08 of two files' CPU time."""
    gc.freeze()


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
