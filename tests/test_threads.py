"""Threads that the tests start, while coverage is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

STARTS = """
import concurrent.futures
import sys
import threading
import time

def hook(event, _):
    if event == "sys.settrace":
        time.sleep(0.01)  # lets go of the interpreter's lock, as any hook in Python does sooner or later

def test_threads():
    sys.addaudithook(hook)
    together = threading.Barrier(8, timeout=5)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(together.wait) for _ in range(8)]
    assert sorted(job.result() for job in jobs) == [*range(8)]
"""


BEFORE_3_12 = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="from 3.12 on coverage installs no trace functions"
)


@BEFORE_3_12
def test_no_thread_of_this_run_installs_a_trace_function() -> None:
    assert threading.gettrace() is None


@pytest.mark.slow
@pytest.mark.parametrize("mended", [True, pytest.param(False, marks=BEFORE_3_12)])
def test_threads_that_start_at_once_do_their_work_while_coverage_is_measured(tmp_path: Path, *, mended: bool) -> None:
    """Two that install its trace function at once: one dies before its work, but for a line of conftest.py."""
    pytest.importorskip("pytest_cov", reason="needs pytest-cov")
    (tmp_path / "test_threads.py").write_text(STARTS)
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest if mended else conftest.replace("threading.settrace(None)", "pass"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "--cov=."]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV"))}
    kept["PYTHONPATH"] = str(Path(__file__).parents[1])  # conftest.py imports from the tests
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode == 0) == mended, done.stdout[-3000:]
    if not mended:
        assert "another trace function is being installed" in done.stdout
