"""`bench evidence` goes on where it stopped, mixes nothing, and names files as docs look for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__, evidence, results, shown
from bench.evidence import STEPS, Step

MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "commit": "c0ffee",
    "versions": {"jax": "1"},
    "date": "2026-12-01T10:00:00",
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Another than this one: steps of bench are replaced by a line that writes a file, and their words are kept."""
    found = dict(MACHINE)
    monkeypatch.setattr(results, "machine", lambda commit: found | ({"commit": commit} if commit else {}))
    monkeypatch.setattr(evidence, "changed_files", list)

    def command(step: Step, work: Path, *, seconds: float, commit: str) -> list[str]:
        del seconds
        return [sys.executable, "-c", step.words, str(work / f"{step.kind}.json"), commit]

    monkeypatch.setattr(evidence, "command", command)
    return found


WRITE = "import json, sys; json.dump({'commit': sys.argv[2], 'left': []}, open(sys.argv[1], 'w'))"
ADD = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
rows = json.loads(path.read_text())["rows"] + 1 if path.exists() else 1
path.write_text(json.dumps({"rows": rows, "left": ["a case"] * (2 - rows)}))
"""


def test_files_have_names_that_docs_look_for(tmp_path: Path) -> None:
    assert evidence.run(tmp_path, steps=(Step("accuracy", WRITE, 1), Step("model", WRITE, 1))) == 0
    found = {kind: path.name for kind, path in shown.evidence(tmp_path).items()}
    assert found == {"accuracy": "accuracy_h100_2026-12-01.json", "model": "model_h100_2026-12-01.json"}
    assert json.loads((tmp_path / "model_h100_2026-12-01.json").read_text())["commit"] == "c0ffee"
    assert {step.kind for step in STEPS} == {*shown.KINDS, "gpu_tests"}


def test_a_step_that_is_not_whole_is_continued_and_one_that_is_done_is_not_run_again(
    tmp_path: Path, machine: dict[str, Any]
) -> None:
    steps = (Step("accuracy", WRITE, 1), Step("run", ADD, 1))
    assert evidence.run(tmp_path, steps=steps) == 3
    (tmp_path / "work" / "accuracy.json").unlink()  # would be written again
    machine["date"] = "2026-12-02T00:00:00"
    assert evidence.run(tmp_path, steps=steps) == 0
    assert not (tmp_path / "work" / "accuracy.json").exists()
    assert json.loads((tmp_path / "run_h100_2026-12-01.json").read_text()) == {"rows": 2, "left": []}


def test_a_step_for_which_there_is_no_time_is_left_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.run(tmp_path, seconds=50, steps=(Step("accuracy", WRITE, 60), Step("training", WRITE, 1))) == 3
    assert "accuracy: not begun, it takes about 60 s and " in capsys.readouterr().out
    assert [path.name for path in shown.evidence(tmp_path).values()] == ["training_h100_2026-12-01.json"]


def test_steps_that_time_nothing_run_side_by_side_and_before_the_others(tmp_path: Path) -> None:
    """The first two end only when both have begun; the third looks whether both have ended."""
    meet = (
        "import pathlib, sys, time; path = pathlib.Path(sys.argv[1]); path.with_suffix('.began').touch(); "
        "other = path.with_name('OTHER.began'); end = time.monotonic() + 60\n"
        "while not other.exists():\n    assert time.monotonic() < end\n    time.sleep(0.01)\n"
    ) + WRITE
    alone = (
        "import pathlib, sys; here = pathlib.Path(sys.argv[1]).parent; "
        "assert (here / 'accuracy.json').exists() and (here / 'parity.json').exists()\n"
    ) + WRITE
    steps = (
        Step("training", alone, 1),
        Step("accuracy", meet.replace("OTHER", "parity"), 1, times=False),
        Step("parity", meet.replace("OTHER", "accuracy"), 1, times=False),
    )
    assert evidence.run(tmp_path, steps=steps) == 0
    state = json.loads((tmp_path / "evidence.json").read_text())["steps"]
    assert {kind: entry["whole"] for kind, entry in state.items()} == dict.fromkeys(
        ("accuracy", "parity", "training"), True
    )
    assert all(step.times == (step.kind not in {"accuracy", "parity", "gpu_tests"}) for step in STEPS)


def test_a_step_that_dies_is_not_whole(tmp_path: Path) -> None:
    assert evidence.run(tmp_path, steps=(Step("accuracy", WRITE + "; sys.exit(2)", 1),)) == 3
    assert shown.evidence(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "other"), [("commit", "decade"), ("device", "NVIDIA H200"), ("versions", {"jax": "2"})]
)
def test_evidence_of_another_machine_or_commit_is_not_added(
    tmp_path: Path, machine: dict[str, Any], name: str, other: Any
) -> None:
    evidence.run(tmp_path, steps=(Step("accuracy", WRITE, 1),))
    machine[name] = other
    with pytest.raises(ValueError, match=rf"evidence\.json has {name} .* pass another folder$"):
        evidence.run(tmp_path, steps=())


def test_a_tree_that_is_not_the_commit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "changed_files", lambda: [" M bench/run.py"])
    with pytest.raises(
        ValueError, match=r"^1 files differ from the commit \(such as M bench/run\.py\); evidence is of a"
    ):
        evidence.run(tmp_path, steps=())
    assert evidence.run(tmp_path, commit="c0ffee", steps=()) == 0


def test_the_log_of_the_gpu_tests_says_where_it_is_from(tmp_path: Path) -> None:
    write = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[1]).parent / 'gpu-tests'; folder.mkdir(); "
        "(folder / 'summary.txt').write_text('xla passed\\n')"
    )
    assert evidence.run(tmp_path, steps=(Step("gpu_tests", write, 1),)) == 0
    first, second = (tmp_path / "gpu_tests_h100_2026-12-01.log").read_text().splitlines()
    assert "NVIDIA H100 80GB HBM3, commit c0ffee, 2026-12-01" in first
    assert second == "xla passed"


COMMAND = evidence.command  # the fixture replaces it


def test_every_step_is_a_command_that_there_is(tmp_path: Path) -> None:
    for step in STEPS:
        words = COMMAND(step, tmp_path, seconds=500, commit="c0ffee")
        if step.kind == "gpu_tests":
            assert (evidence.ROOT / words[0]).is_file()
            assert words[1:] == [str(tmp_path / "gpu-tests"), sys.executable, "tests"]
        else:
            assert words[:3] == [sys.executable, "-m", "bench"]
            arguments = __main__._parser().parse_args(words[3:])
            assert arguments.commit == "c0ffee"
            assert {getattr(arguments, "out", None), getattr(arguments, "folder", None)} & {
                tmp_path,
                tmp_path / f"{step.kind}.json",
            }
