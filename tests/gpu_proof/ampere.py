"""A Hopper GPU that runs what an Ampere GPU would: the plans of an A100, lowered for 8.0, as PTX for sm_80.

PTX for an older architecture runs on every later one, and the driver compiles it for the GPU at hand. It is made in
other processes, since the assembler in JAX's plugin keeps the first architecture of a process, and takes the place of
the code that the direct launch has recorded; all else of a launch is the package's own. JAX's programs are lowered for
8.0 and assembled for the GPU at hand.

    python -m pytest -p tests.gpu_proof.ampere -m gpu FILE

runs tests so; those of rows that need a cluster are skipped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pallas_norm import _compat, _target
from tests import gpus

A100 = gpus.CARDS["A100"].gpu
FEWER_ROWS = 1 << 14  # than the nominal ones of a launch, whose arrays no GPU has room for; it bounds nothing
VERSION = ".version 8.3"  # of PTX, that a driver of CUDA 12.3 takes; nothing newer is used


def ptx_of(program: Any) -> str:
    """For sm_80. In a process that has no GPU and compiles for no other architecture."""
    import jax

    from pallas_norm_torch import programs

    (device,) = gpus.described("A100")
    sharding = jax.sharding.SingleDeviceSharding(device)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"MOSAIC_GPU_DUMP_TO": folder}),
        mock.patch.object(programs, "NOMINAL_ROWS", FEWER_ROWS),
    ):
        structs = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding) for one in program.structs]
        jitted = jax.jit(program.function(), in_shardings=sharding, out_shardings=sharding)
        with _target.in_mosaic(_target.Target(A100, device)):
            jitted.trace(*structs).lower(lowering_platforms=("cuda",)).compile()
        (file,) = Path(folder).glob("*.ptx")
        text = file.read_text()
    assert ".target sm_80\n" in text, text[:300]
    return re.sub(r"\.version \S+", VERSION, text)


def _quiet() -> None:
    """The plugin tells of each kernel that there is no nvdisasm; errors are exceptions."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Assembler:
    """ptx_of in other processes, once for each program."""

    def __init__(self, pool: concurrent.futures.Executor) -> None:
        self._pool, self._texts = pool, dict[Any, concurrent.futures.Future[str]]()

    def ptx(self, program: Any) -> concurrent.futures.Future[str]:
        if program not in self._texts:
            self._texts[program] = self._pool.submit(ptx_of, program)
        return self._texts[program]


@contextlib.contextmanager
def assembler(workers: int) -> Iterator[Assembler]:
    environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _quiet) as pool:
        with mock.patch.dict(os.environ, environment):
            list(pool.map(abs, range(4 * workers)))  # starts them all
        try:
            yield Assembler(pool)
        finally:
            pool.shutdown(cancel_futures=True)


def _function(ptx: str) -> int:
    """Of the current context, compiled by the driver."""
    from pallas_norm_torch.launch.driver import ask

    entry = re.search(r"\.entry (\w+)", ptx)
    assert entry is not None
    module = ask("cuModuleLoadData", ptx.encode() + b"\0")
    return int(ask("cuModuleGetFunction", module, entry[1].encode()))


@contextlib.contextmanager
def as_ampere(assembled: Assembler, loaded: list[Any]) -> Iterator[None]:
    """Calls inside take an A100's kernels; `loaded` gets the program of each that was loaded."""
    from pallas_norm_torch import direct, launch, prepared, prepared_gradient
    from pallas_norm_torch.launch import compiling
    from pallas_norm_torch.launch.kernels import Kernel

    own = compiling._loaded

    def load(program: Any, module: bytes, addresses: int, device: int) -> Any:
        recorded = own(program, module, addresses, device)
        ptx = assembled.ptx(program).result()
        loaded.append(program)
        return Kernel(recorded.recorded._replace(function=_function(ptx)), device, recorded.name)

    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (compiling, "_loaded", load),
            (launch, "gpu_of", lambda device: A100),
            (direct, "_refused", {}),
            (prepared, "_forward", {}),
            (prepared_gradient, "_calls", {}),
            (_target, "assemble_for", lambda capability: None),  # the assembler of this process is not asked
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        before = dict(direct.calls)
        direct.calls.clear()
        try:
            yield
        finally:
            direct.calls.clear()
            direct.calls.update(before)


@contextlib.contextmanager
def jax_as_ampere() -> Iterator[None]:
    """Programs of JAX that are lowered inside are lowered for an A100."""
    from jax.experimental.mosaic.gpu import utils

    with (
        mock.patch.object(utils, "_infer_arch", return_value=A100.capability),
        mock.patch.object(_compat, "gpu_of", return_value=A100),
    ):
        yield


# --- a plugin of pytest -----------------------------------------------------------------------------------------------

_running = contextlib.ExitStack()


def pytest_configure() -> None:
    _running.enter_context(jax_as_ampere())
    _running.enter_context(as_ampere(_running.enter_context(assembler(4)), []))


def pytest_unconfigure() -> None:
    _running.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        return (yield)
    except NotImplementedError as error:
        if "has no clusters" in str(error):
            pytest.skip("needs a cluster, which no GPU has before Hopper")
        raise
