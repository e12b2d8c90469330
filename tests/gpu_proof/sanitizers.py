"""compute-sanitizer's four tools over every kernel, side by side, and over planted defects that they must report.

`python -m tests.gpu_proof.sanitizers FOLDER`: a log of each run goes to FOLDER, and a table to the standard output.
Fails if a tool reports something of a kernel of ours, does not report one of its planted defects, or cannot run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.gpu_proof import planted

ROOT = Path(__file__).parents[2]
OURS = "mosaic_gpu"  # is in the name of every kernel that Mosaic GPU compiles: kernel_mosaic_gpu_kernel
ERRORS_FOUND = 99  # the exit status of compute-sanitizer then
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", re.MULTILINE)
PARTS = ("jax: ", "launch")  # of every_kernel, by how the names of its cases begin
DONE = re.compile(r"^every kernel on gpu: [1-9]\d* cases, 0 failed$", re.MULTILINE)


class Tool(NamedTuple):
    options: tuple[str, ...]
    report: str  # how its reports begin


TOOLS = {
    # JAX rounds the sizes of buffers up; the padding keeps what lies behind one from being another one. What XLA and
    # torch ask of CUDA in vain, to see what there is, is no error of a kernel.
    "memcheck": Tool(
        ("--padding", "4096", "--report-api-errors", "no"),
        r"Invalid|Hardware|Out-of-range|Misaligned|Malloc",
    ),
    "racecheck": Tool((), r"(?:Error|Warning): .*(?:Race|hazard)|Potential invalid"),
    # Of the results only a part may be written, of which the host then takes the whole.
    "initcheck": Tool(("--check-api-memory-access", "no"), "Uninitialized"),
    "synccheck": Tool((), "Barrier error"),
}

# A buffer for each array, so that a read past its end is one past an allocation, and one before its time is of memory
# that nobody wrote.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "PYTHONUNBUFFERED": "1",
}


class Run(NamedTuple):
    """One process below one tool: of a part of every_kernel, or of the planted defects."""

    tool: str
    part: str | None

    @property
    def name(self) -> str:
        return f"{self.tool}-{self.part.strip(': ') if self.part else 'planted'}"

    @property
    def program(self) -> tuple[str, ...]:
        module = ("planted", self.tool) if self.part is None else ("every_kernel", self.part)
        return sys.executable, "-m", f"tests.gpu_proof.{module[0]}", module[1]


class Outcome(NamedTuple):
    name: str
    wrong: str | None  # None: as it must be
    seconds: float


def reported(log: str) -> int | None:
    """How many errors or hazards the tool's summary tells of; None if there is none."""
    found = [int(count) for count in SUMMARY.findall(log)]
    return max(found) if found else None


def cases_with_reports(log: str, report: str) -> list[str]:
    """In order, those between whose name and the next one the tool reported something."""
    case, found = "before the first case", []
    for line in log.splitlines():
        if line.startswith("case: "):
            case = line.removeprefix("case: ")
        elif re.match(rf"=+ (?:{report})", line) and case not in found:
            found.append(case)
    return found


def judge(run: Run, status: int | None, log: str) -> str | None:
    """What is wrong with a run that ended with `status` (None: it did not end), or None."""
    if status is None:
        return "did not end in time"
    count, tool = reported(log), TOOLS[run.tool]
    if count is None:
        errors = [line for line in log.splitlines() if re.match(r"=+ .*(?:[Ee]rror|not supported)", line)]
        return f"the tool gave no summary: {errors[0] if errors else f'exit status {status}'}"
    if "Internal Sanitizer Error" in log:
        return "the tool had an error of its own"
    if run.part is None:
        missed = [name for name in planted.DEFECTS[run.tool] if name not in cases_with_reports(log, tool.report)]
        return f"not reported, of what was planted: {'; '.join(missed)}" if missed else None
    if count:
        cases = cases_with_reports(log, tool.report)
        more = f" and {len(cases) - 3} more" if len(cases) > 3 else ""
        return f"{count} reported, in {'; '.join(cases[:3]) or 'no case'}{more}"
    if not DONE.search(log):
        return f"not every case ran and was right (exit status {status})"
    return None if status == 0 else f"exit status {status}"


def execute(run: Run, number: int, *, sanitizer: str, folder: Path, seconds: float) -> Outcome:
    command = [sanitizer, "--tool", run.tool, "--kernel-name", f"kernel_substring={OURS}", *TOOLS[run.tool].options]
    command += ["--error-exitcode", str(ERRORS_FOUND), "--show-backtrace", "device", "--print-limit", "20"]
    command += ["--target-processes", "application-only", "--launch-timeout", "120", "--port", str(49152 + 16 * number)]
    started, path, status = time.monotonic(), folder / f"{run.name}.log", None
    with path.open("w") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True, "cwd": ROOT}
        process = subprocess.Popen([*command, *run.program], env=os.environ | ENVIRONMENT, **options)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and the program below it, a session of their own
            process.wait()
    return Outcome(run.name, judge(run, status, path.read_text(errors="replace")), time.monotonic() - started)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_proof.sanitizers", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the logs")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program")
    parser.add_argument("--tools", nargs="+", choices=tuple(TOOLS), default=tuple(TOOLS))
    parser.add_argument("--seconds", type=float, default=400, help="for each run")
    parser.add_argument("--at-once", type=int, default=12, help="processes")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    if (sanitizer := shutil.which(given.sanitizer)) is None:
        print(
            f"{given.sanitizer} is not on the PATH; it comes with CUDA, and with pip install nvidia-cuda-sanitizer-api"
        )
        return 1
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False).stdout
    print(" ".join(re.findall(r"^Version.*", version, re.MULTILINE)) or "unknown version", flush=True)
    runs = [Run(tool, part) for part in (None, *PARTS) for tool in given.tools]
    with concurrent.futures.ThreadPoolExecutor(given.at_once) as pool:
        options = {"sanitizer": sanitizer, "folder": given.folder, "seconds": given.seconds}
        jobs = [pool.submit(execute, run, number, **options) for number, run in enumerate(runs)]
        outcomes = [job.result() for job in jobs]
    for outcome in outcomes:
        print(
            f"{outcome.name:20} {'as it must be' if outcome.wrong is None else outcome.wrong} {outcome.seconds:.0f} s"
        )
    failed = sum(outcome.wrong is not None for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} runs of compute-sanitizer as they must be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
