"""Processes of every kind: forked after the import, spawned, and ended while tensors are alive and calls under way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEAD = """
import os, sys, threading, time
import torch, jax, jax.numpy as jnp
import pallas_norm, pallas_norm_torch
from pallas_norm_torch import RMSNorm, add_rms_norm, call_jax, rms_norm, to_jax, to_torch

device = sys.argv[1]

def check():
    x = torch.arange(3.0 * 64, device=device).view(3, 64).bfloat16()
    weight = torch.full((64,), 2.0, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = rms_norm(x, weight)
    y.sum().backward()
    unit = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert torch.equal(y.detach().cpu(), (2.0 * unit).cpu())
    assert torch.equal(weight.grad.float().cpu(), unit.float().sum(0).bfloat16().float().cpu())
"""


def run(folder: Path, device: str, code: str, **variables: str) -> str:
    """What HEAD and the code print, as a script, with these variables of the environment; it has to exit 0 and say
    nothing on stderr, not even a warning."""
    script = folder / "script.py"
    script.write_text(HEAD + code)
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XDG_CACHE_HOME": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONFAULTHANDLER": "1",
        **variables,
    }
    if device == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, str(script), device], env=environment, capture_output=True, text=True, timeout=180
    )
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


# --- fork and spawn -------------------------------------------------------------------------------------------------

FORK = """
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()  # the rule: an import starts no backend, so a fork may follow
assert threading.active_count() == 1
children = []
for _ in range(2):
    if (child := os.fork()) == 0:
        check()
        sys.stdout.write("child ")
        sys.stdout.flush()
        os._exit(0)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
check()  # the parent may start its own after that
print("parent")
"""


@pytest.mark.parametrize("device", DEVICES)
def test_a_fork_after_the_import(device: str, tmp_path: Path) -> None:
    assert run(tmp_path, device, FORK) == "child child parent\n"


SPAWN = """
import multiprocessing

def work(weight):
    check()
    return rms_norm(torch.ones(2, 64, dtype=weight.dtype, device=device), weight.to(device)).cpu()

if __name__ == "__main__":
    check()  # JAX runs in the parent: what a fork would not survive, a spawn does
    norm = RMSNorm(64, dtype=torch.bfloat16)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for found in pool.map(work, [norm.weight.detach()] * 4):
            assert torch.equal(found, torch.ones(2, 64, dtype=torch.bfloat16))
    print("done")
"""


@pytest.mark.parametrize("device", DEVICES)
def test_spawned_workers_with_jax_running_in_the_parent(device: str, tmp_path: Path) -> None:
    assert run(tmp_path, device, SPAWN) == "done\n"


TWO_AT_ONCE = """
children = []
for _ in range(2):
    if (child := os.fork()) == 0:
        check()
        os._exit(0)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
print(sorted(name.rpartition(".")[2] for name in os.listdir(os.path.join(os.environ["XDG_CACHE_HOME"], "pallas_norm"))))
"""


@pytest.mark.gpu
def test_two_processes_that_compile_the_same_kernels_at_once(tmp_path: Path) -> None:
    """Both compile, and both store: whole files, and no temporary ones are left."""
    suffixes = run(tmp_path, "cuda", TWO_AT_ONCE)
    assert "kernel" in suffixes
    assert "part" not in suffixes


# --- the end ----------------------------------------------------------------------------------------------------------

ALIVE = """
x = torch.randn(4, 64, device=device)
norm = RMSNorm(64, device=device)
y = norm(x)  # with its graph
z, s = add_rms_norm(x, x, norm.weight)
gradient, = torch.autograd.grad(y.sum(), norm.weight)
array = to_jax(x.clone())
back = to_torch(jnp.ones((4, 64)))
called = call_jax(jax.jit(pallas_norm.rms_norm), x)
cycle = [y, array]
cycle.append(cycle)
from pallas_norm import dlpack
of_numpy = dlpack.rms_norm(x.cpu().numpy())
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["end", "sys.exit(0)", "os._exit(0)"])
def test_an_exit_with_everything_alive(way: str, device: str, tmp_path: Path) -> None:
    assert run(tmp_path, device, ALIVE + ("" if way == "end" else f"{way}\n")) == ""


FROM_ATEXIT = """
import atexit
check()
atexit.register(lambda: (check(), print("called")))
"""


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_at_exit(device: str, tmp_path: Path) -> None:
    assert run(tmp_path, device, FROM_ATEXIT) == "called\n"


DAEMON = """
started = threading.Event()

def work():
    y = rms_norm(x, norm.weight.detach())
    pair = add_rms_norm(y, x)
    norm(x).sum().backward()
    check()
    started.set()
    threading.Event().wait()  # for ever, with all this alive

threading.Thread(target=work, daemon=True).start()
assert started.wait(120)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_an_exit_while_a_daemon_thread_that_has_called_waits(device: str, tmp_path: Path) -> None:
    """Not one inside a call: up to 3.13 Python ends such a thread by unwinding it, and C++ aborts where that meets a
    destructor. A loop of torch's own F.rms_norm, or of any jitted JAX function, dies of it just as well."""
    assert run(tmp_path, device, ALIVE + DAEMON) == ""


THREADS = """
def work():
    for _ in range(20):
        check()

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_end_of_the_script_waits_for_threads_that_call(device: str, tmp_path: Path) -> None:
    assert run(tmp_path, device, THREADS) == ""


EVERY_GRADIENT = """
check()
for n in (64, 8192):
    x, gate = torch.ones(3, n, device=device).bfloat16().requires_grad_(), torch.ones(3, n, device=device).bfloat16()
    weight = torch.ones(n, device=device, requires_grad=True)
    y = rms_norm(x, weight) + sum(add_rms_norm(x, x, weight)) + pallas_norm_torch.rms_norm_gated(x, gate, weight)
    y.sum().backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()
"""


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_goes_back_to_the_driver_at_once(device: str, tmp_path: Path) -> None:
    """As people run torch below compute-sanitizer. The trial run of the sum over dweight's parts took the address of a
    copy that nobody kept: torch's own allocator leaves such memory as it is, the driver takes it out of the map, and
    the launch ended the process."""
    assert run(tmp_path, device, EVERY_GRADIENT, PYTORCH_NO_CUDA_MEMORY_CACHING="1") == ""


def test_what_these_tests_look_for_can_be_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="noise"):
        run(tmp_path, "cpu", "sys.stderr.write('noise')\n")
    with pytest.raises(AssertionError, match="3"):
        run(tmp_path, "cpu", "sys.exit(3)\n")
