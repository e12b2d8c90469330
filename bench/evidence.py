"""python -m bench evidence: every result file that docs show, of one commit and one device, step by step.

Each step is a command of its own, and what it wrote is kept: the same command again goes on where the last stopped,
also on another day. Steps that time nothing run first, side by side; then the others, each alone. FOLDER holds
KIND_DEVICE_DATE.json of the steps that are done, the log of the GPU tests under such a name, `evidence.json` with the
machine, and in `work` what a step has so far.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import results

ROOT = Path(__file__).parent.parent
SAME = ("device", "commit", "versions")


@dataclasses.dataclass(frozen=True)
class Step:
    """`words` are a command of bench, or for the tests a script; what is in braces is filled in."""

    kind: str
    words: str
    seconds: int  # that have to be left for it to begin
    times: bool = True  # so nothing may run beside it

    @property
    def suffix(self) -> str:
        return ".log" if self.kind == "gpu_tests" else ".json"


STEPS = (
    Step("accuracy", "accuracy --folder {folder}", 560, times=False),
    Step("parity", "parity --out {out}", 560, times=False),
    Step("gpu_tests", "scripts/gpu-tests {folder}/gpu-tests {python} tests", 560, times=False),
    Step("training", "training --folder {folder}", 60),
    Step("overhead", "overhead --out {out}", 90),
    Step("model", "model --repetitions 5 --out {out}", 200),
    Step("model-qwen3", "model --shape qwen3-0.6b --repetitions 5 --out {out}", 200),
    Step("model-mamba2", "model --shape mamba2-130m --repetitions 5 --out {out}", 80),
    Step("run", "run --suite full --ahead {processes} --time-limit {seconds} --out {out}", 120),
)


def named(kinds: str | None) -> tuple[Step, ...]:
    """The steps of a comma-separated list; all for None."""
    wanted = [step.kind for step in STEPS] if kinds is None else kinds.split(",")
    if unknown := [kind for kind in wanted if kind not in {step.kind for step in STEPS}]:
        raise ValueError(f"no step is called {', '.join(unknown)}; there are {', '.join(step.kind for step in STEPS)}")
    return tuple(step for step in STEPS if step.kind in wanted)


def short(device: str) -> str:
    """h200 of NVIDIA H200."""
    words = [word for word in device.lower().split() if word != "nvidia"]
    return "".join(letter for letter in (words or ["unknown"])[0] if letter.isalnum())


def changed_files() -> list[str]:
    try:
        done = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.splitlines()


def begin(folder: Path, commit: str | None) -> dict[str, Any]:
    """What `evidence.json` says, new or continued: ValueError where the machine or the tree are others."""
    if commit is None and (changed := changed_files()):
        raise ValueError(
            f"{len(changed)} files differ from the commit (such as {changed[0].strip()}); evidence is of a commit: "
            "commit or stash them, or name with --commit what this tree is"
        )
    machine = results.machine(commit)
    if machine["commit"] is None:
        raise ValueError("this tree is no checkout; pass --commit with the commit that it is")
    path = folder / "evidence.json"
    if not path.exists():
        return {name: machine[name] for name in (*SAME, "date")} | {"steps": {}}
    state = json.loads(path.read_text())
    for name in SAME:
        if state[name] != machine[name]:
            raise ValueError(
                f"{path} has {name} {state[name]!r}, this run has {machine[name]!r}; needed the same to continue it: "
                "pass another folder"
            )
    return state


def command(step: Step, work: Path, *, seconds: float, commit: str) -> list[str]:
    out = work / f"{step.kind}{step.suffix}"
    given = {"folder": work, "out": out, "seconds": int(seconds), "python": sys.executable}
    filled = [word.format(**given, processes=os.cpu_count() or 1) for word in step.words.split()]
    if step.kind == "gpu_tests":
        return filled
    return [sys.executable, "-m", "bench", *filled, "--commit", commit]


def whole(step: Step, work: Path, status: int) -> bool:
    """Whether the step's file is complete: a suite may have cases left, which its status does not tell."""
    if step.kind == "gpu_tests":
        return status in (0, 1)  # 1: a group failed, as the log says
    path = work / f"{step.kind}.json"
    return path.exists() and status in (0, 1) and not json.loads(path.read_text()).get("left")


def keep(step: Step, folder: Path, state: dict[str, Any]) -> Path:
    """The step's file, under the name that docs look for."""
    work, name = folder / "work", f"{step.kind}_{short(state['device'])}_{state['date'][:10]}{step.suffix}"
    if step.kind == "gpu_tests":
        where = f"{state['device']}, commit {state['commit']}, {state['date'][:10]}"
        head = f"scripts/gpu-tests on {where}: {state['versions']}"
        (folder / name).write_text(f"{head}\n{(work / 'gpu-tests' / 'summary.txt').read_text()}")
    else:
        shutil.copyfile(work / f"{step.kind}.json", folder / name)
    return folder / name


def ended(running: dict[Step, subprocess.Popen[bytes]]) -> Iterator[tuple[Step, int]]:
    """(step, exit status) of each as soon as it ends."""
    left = dict(running)
    while left:
        for step, process in list(left.items()):
            status = process.poll()
            if status is not None:
                del left[step]
                yield step, status
        time.sleep(0.05)


def run(
    folder: Path, *, commit: str | None = None, seconds: float = float("inf"), steps: Sequence[Step] = STEPS
) -> int:
    """0 when every step is done, 1 where one failed, 3 where time ended before."""
    began = time.monotonic()
    folder = folder.resolve()  # steps run in the root of the checkout
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    state = begin(folder, commit)

    def write() -> None:
        (folder / "evidence.json").write_text(json.dumps(state, indent=1) + "\n")

    write()
    for group in ([step for step in steps if not step.times], *([step] for step in steps if step.times)):
        left = seconds - (time.monotonic() - began)
        limit = min(left, 3600) - 20  # a suite starts nothing that would end later
        running: dict[Step, subprocess.Popen[bytes]] = {}
        for step in group:
            if state["steps"].get(step.kind, {}).get("whole"):
                continue
            if left < step.seconds:
                print(f"{step.kind}: not begun, it takes about {step.seconds} s and {max(0, left):.0f} are left")
                continue
            print(f"{step.kind}: begins", flush=True)
            running[step] = subprocess.Popen(command(step, work, seconds=limit, commit=state["commit"]), cwd=ROOT)
        start = time.monotonic()
        for step, status in ended(running):
            entry = state["steps"].setdefault(step.kind, {"seconds": 0})
            entry["seconds"] = round(entry["seconds"] + time.monotonic() - start, 1)
            entry |= {"status": status, "whole": whole(step, work, status)}
            if entry["whole"]:
                entry["file"] = keep(step, folder, state).name
            write()
    return report(folder, state, steps)


def report(folder: Path, state: dict[str, Any], steps: Sequence[Step]) -> int:
    for step in steps:
        entry = state["steps"].get(step.kind)
        outcome = "left" if entry is None else entry.get("file") or f"not whole, status {entry['status']}"
        print(f"{step.kind:10} {entry['seconds'] if entry else 0:7.1f} s  {outcome}")
    found = [state["steps"].get(step.kind, {}) for step in steps]
    if not all(entry.get("whole") for entry in found):
        print("Run the same command again for the rest.")
        return 3
    print(f"Copy {folder}/*_{short(state['device'])}_*.* to bench/results and run python -m bench readme")
    return int(any(entry["status"] for entry in found))
