"""`python -m bench run` on a CPU: the record it writes, what it says is absent, and how it continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from bench import __main__, ahead, measuring, record, run, suite
from bench.baselines import BASELINES, named
from bench.suite import Case

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("implicit_promotion_throughout")]

CASES = (
    Case("forward", 8, 128),
    Case("add", 4, 96, "float16"),
    Case("backward", 8, 64, "float32"),
    Case("forward", 16, 64, heads=4),
)
WITHOUT_COMPILER = [name for name in BASELINES if name != "torch.compile"]


def small(out: Path, cases: Sequence[Case] = CASES, providers: Sequence[str] = WITHOUT_COMPILER, **options: Any) -> int:
    return run.run("smoke", providers, out, commit="c0ffee", repetitions=3, cases=cases, **options)


def by_provider(file: dict[str, Any], case: Case) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in file["rows"] if row["key"] == case.label}


@pytest.fixture(autouse=True, scope="module")
def no_gpu() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("says what happens where there is no GPU")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, implicit_promotion_throughout: None) -> Path:
    del implicit_promotion_throughout  # of the plain formulas that are measured
    path = tmp_path_factory.mktemp("bench") / "run.json"
    assert small(path) == 0
    return path


def test_the_record_has_a_row_for_every_case_and_provider_and_names_its_machine(out: Path) -> None:
    file = record.read(out)
    assert record.problems(file) == []
    assert {(row["key"], row["provider"]) for row in file["rows"]} == {
        (case.label, provider) for case in CASES for provider in WITHOUT_COMPILER
    }
    assert (file["commit"], file["measures"], file["left"]) == ("c0ffee", record.WALL_TIME, [])
    assert file["device"]
    assert file["versions"]["jax"] == jax.__version__
    for row in record.measured(file):
        assert len(row["samples_us"]) == 3
        assert row["host_us"] > 0


def test_what_cannot_be_measured_is_there_with_its_reason(out: Path) -> None:
    rows = by_provider(record.read(out), CASES[0])
    assert (rows["copy"]["status"], rows["copy"]["reason"]) == ("absent", "the copy kernel needs a CUDA device")
    assert rows["Liger"]["reason"] == "Liger needs a CUDA device"
    slices = by_provider(record.read(out), CASES[3])
    assert slices["XLA"]["reason"] == "a JAX array has no strides: a slice is a copy"
    assert not [row for row in record.read(out)["rows"] if row["status"] == "failed"]


def test_every_measured_provider_has_its_rounding_and_no_wrong_output(out: Path) -> None:
    file = record.read(out)
    assert all(row["wrong_outputs"] == 0 for row in record.measured(file))
    for case in CASES:
        rows = by_provider(file, case)
        for provider in ("pallas-norm", "XLA", "HF eager"):
            if rows[provider]["status"] == "measured":
                assert rows[provider]["rounding"] == ("float32" if case.dtype == "float32" else "HF")
        if case.dtype != "float32" and rows["F.rms_norm"]["status"] == "measured":
            assert rows["F.rms_norm"]["rounding"] == "single"


def test_what_a_provider_runs_beside_its_norm_is_said(out: Path) -> None:
    rows = by_provider(record.read(out), CASES[1])
    assert rows["pallas-norm"]["note"] == "the XLA path: no CUDA device"
    if rows["HF eager"]["status"] == "measured":
        assert rows["HF eager"]["note"] == "add, then norm"


def test_the_terminal_gets_a_table_the_reasons_and_what_a_cpu_cannot_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(tmp_path / "run.json", CASES[:1], ["copy", "pallas-norm"])
    said = capsys.readouterr()
    assert run.CPU_REMARK in said.out
    assert "forward 8 x 128 bfloat16" in said.out
    assert "absent: copy, 1 case (such as forward 8 x 128 bfloat16): the copy kernel needs a CUDA device" in said.out
    assert "[########################] 1/1" in said.err


def test_a_run_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, providers = tmp_path / "run.json", ["XLA"]
    small(out, CASES[:2], providers, time_limit_s=-1)
    assert not out.exists()  # no time for a single case
    measured = []
    measure_case = run.measure_case

    def counted(case: Case, *arguments: Any, **options: Any) -> Any:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(case)
        return measure_case(case, *arguments, **options)

    monkeypatch.setattr(run, "measure_case", counted)
    with pytest.raises(KeyboardInterrupt):
        small(out, CASES[:3], providers)
    assert record.read(out)["left"] == [case.label for case in CASES[1:3]]
    first = record.read(out)["rows"]

    measured.clear()
    small(out, CASES[:2], providers)
    file = record.read(out)
    assert measured == [CASES[1]]
    assert file["rows"][:1] == first
    assert file["left"] == []
    assert len(file["sessions"]) == 2


def test_a_file_of_another_tree_or_with_other_options_is_not_continued(out: Path) -> None:
    before = out.read_text()
    with pytest.raises(ValueError, match=r"has options .* needed the same to continue it: pass another --out"):
        small(out, CASES, ["XLA"])
    with pytest.raises(ValueError, match=r"has commit 'c0ffee', this run has 'another'; needed the same"):
        run.run("smoke", WITHOUT_COMPILER, out, commit="another", repetitions=3, cases=CASES)
    assert out.read_text() == before


def test_a_provider_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(BASELINES, "XLA", breaks)
    out = tmp_path / "run.json"
    assert small(out, CASES[:1], ["pallas-norm", "XLA"]) == 0
    rows = by_provider(record.read(out), CASES[0])
    assert (rows["XLA"]["status"], rows["XLA"]["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert rows["pallas-norm"]["status"] == "measured"
    monkeypatch.undo()
    small(out, CASES[:1], ["pallas-norm", "XLA"])
    assert by_provider(record.read(out), CASES[0])["XLA"]["status"] == "failed"
    small(out, CASES[:1], ["pallas-norm", "XLA"], retry=True)
    assert by_provider(record.read(out), CASES[0])["XLA"]["status"] == "measured"


def test_a_failure_or_a_wrong_output_of_ours_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.rounding, "wrong_outputs", lambda *_: 7)
    assert small(tmp_path / "wrong.json", CASES[:1], ["pallas-norm"]) == 1
    monkeypatch.setitem(BASELINES, "pallas-norm", lambda _: 1 / 0)
    assert small(tmp_path / "failed.json", CASES[:1], ["pallas-norm"]) == 1


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(suite.SUITES, "smoke", CASES[:1])
    out = str(tmp_path / "run.json")
    words = ["run", "--suite", "smoke", "--providers", "xla,PALLAS-norm", "--out", out, "--commit", "c0ffee"]
    assert __main__.main(words) == 0
    assert record.read(Path(out))["options"]["providers"] == ["pallas-norm", "XLA"]
    assert __main__.main(["compare", out, out]) == 0
    assert "0 of 2 medians changed" in capsys.readouterr().out
    assert __main__.main(["run", "--providers", "nobody"]) == 2
    assert "no provider is called nobody; there are copy, pallas-norm, " in capsys.readouterr().err
    assert __main__.main(["compare", out, str(tmp_path / "none.json")]) == 2
    assert "does not exist; python -m bench run --out" in capsys.readouterr().err


def test_a_broken_record_is_named(tmp_path: Path, out: Path) -> None:
    file = record.read(out)
    broken = [
        ({"format": 2}, "the file has format 2; this reads 1"),
        ({"command": "walk"}, "the file has command 'walk'; known are run, overhead, tune"),
        ({"rows": [{**file["rows"][0], "status": "fine"}]}, "row 0 has status 'fine'"),
        ({"rows": [{**file["rows"][0], "reason": ""}]}, "row 0 is absent and gives no reason"),
        ({"rows": [file["rows"][0]] * 2}, f"row 1 repeats {CASES[0].label} of copy"),
        ({"rows": [{**record.measured(file)[0], "samples_us": []}]}, "row 0 has samples_us = []"),
    ]
    for change, message in broken:
        assert record.problems(file | change) == [message]
    del file["versions"]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=r"is no record of format 1: the file has no versions$"):
        record.read(path)


def test_providers_are_named_without_regard_to_case_and_punctuation() -> None:
    assert named(None) == list(BASELINES)
    assert named("hf-eager,F.RMS_norm,copy") == ["copy", "HF eager", "F.rms_norm"]


BUILT_AHEAD = """
from pathlib import Path
from bench import ahead, run
from bench.suite import Case

def kept():
    return {path.name for path in ahead.CACHE.iterdir() if not path.name.endswith("-atime")}

cases, providers = [Case("forward", 8, 128), Case("backward", 8, 64, "float32")], ["XLA", "plain jit"]
ahead.build(cases, providers, 2)
before = kept()
assert before
run.run("smoke", providers, Path("OUT"), commit="c0ffee", repetitions=2, cases=cases)
print("compiled again:", sorted(kept() - before))
"""


def test_cases_built_ahead_are_not_compiled_again(tmp_path: Path) -> None:
    """In a process of its own, as this one has compiled programs that no disk knows of."""
    out = tmp_path / "run.json"
    done = subprocess.run(
        [sys.executable, "-c", BUILT_AHEAD.replace("OUT", str(out))],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.stdout.splitlines()[0] == "2 cases are built by 2 processes"
    assert done.stdout.splitlines()[-1] == "compiled again: []"
    assert record.read(out)["left"] == []


def test_a_process_that_ends_early_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ahead, "keep_programs", lambda _: None)  # here, in the process of the other tests
    ahead.build([Case("no operation", 8, 128)], ["XLA"], 1, tmp_path)
    assert "1 processes ended early, and their cases are built as they are measured" in capfd.readouterr().out
