"""What is made of a record: comparison, pictures, tables; and what `overhead` writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest

from bench import accuracy, compare, overhead, peers, plots, readme_kernels, record, results, suite, table
from bench.baselines import BASELINES
from bench.calls import AbsentError, Call
from bench.suite import Case

FACTORS = dict(zip(BASELINES, (1, 1.05, 1.1, 1.4, 1.3, 9, 1.2, 1.7, 1.25, 1.08, 1.5, 1.6, 1.3, 1.2), strict=True))


def a_record(cases: tuple[Case, ...], *, faster: float = 1.0) -> dict[str, Any]:
    """Made up: ours `faster` than usual, no tokamax, SGLang failing."""
    file = {"format": record.FORMAT, "command": "run", **results.machine("c0ffee"), "measures": record.DEVICE_TIME}
    file |= {
        "options": {"providers": list(BASELINES), "suite": "made up", "repetitions": 2},
        "sessions": [],
        "left": [],
    }
    file["rows"] = rows = []
    for case, (provider, factor) in itertools.product(cases, FACTORS.items()):
        row = {"key": case.label, **dataclasses.asdict(case), "bytes": case.bytes, "provider": provider}
        if provider == "tokamax":
            row |= {"status": "absent", "reason": "tokamax cannot be imported"}
        elif provider == "SGLang":
            row |= {"status": "failed", "reason": "RuntimeError: no"}
        elif case.heads and provider in ("pallas-norm", "XLA", "plain jit"):
            row |= {"status": "absent", "reason": "a JAX array has no strides"}
        else:
            time_us = (2 + case.bytes / 4e6) * factor / (faster if provider == "pallas-norm" else 1)
            rounds = {"copy": "none", "F.rms_norm": "single", "Quack": "other"}.get(provider, "HF")
            row |= {"status": "measured", "median_us": time_us, "spread_us": 0.01 * time_us, "kernels": 1}
            row |= {"samples_us": [time_us] * 2, "rounding": rounds}
        rows.append(row)
    assert record.problems(file) == []
    return file


def test_only_what_is_beyond_the_spread_is_a_change() -> None:
    before = {"median_us": 10.0, "spread_us": 0.3}
    assert not compare.beyond_spread(before, {"median_us": 10.5, "spread_us": 0.3})
    assert compare.beyond_spread(before, {"median_us": 10.7, "spread_us": 0.3})


def test_a_comparison_tells_what_changed_and_how_the_machines_differ() -> None:
    a, b = a_record(suite.QUICK), a_record(suite.QUICK, faster=1.25)
    b["commit"] = "decade"
    b["rows"][0] = {**b["rows"][0], "status": "absent", "reason": "the copy kernel needs a CUDA device"}
    text = compare.compare(a, b)
    assert "commit: c0ffee -> decade" in text
    ours = len(suite.QUICK) - 1  # the slices are torch's
    assert f"{ours} of {sum(row['status'] == 'measured' for row in b['rows'])} medians changed" in text
    assert f"pallas-norm: B / A, geometric mean of {ours}: 0.800" in text
    assert f"XLA: B / A, geometric mean of {ours}: 1.000" in text
    gone = f"status of copy, {suite.QUICK[0].label}: measured -> absent (the copy kernel needs a CUDA device)"
    assert gone in text
    assert "no change beyond the spread" in compare.compare(a, a)


def test_wall_times_are_not_compared_with_kernel_times() -> None:
    a = a_record(suite.QUICK)
    with pytest.raises(ValueError, match=r"^A has measures 'device time .* needed two records of the same kind$"):
        compare.compare(a, a | {"measures": record.WALL_TIME})


def test_the_table_shows_every_measured_provider_and_every_reason() -> None:
    text = table.of_run(a_record(suite.QUICK))
    head = next(line for line in text.splitlines() if line.startswith("case "))
    assert "pallas-norm torch" in head
    assert "tokamax" not in head
    count = len(suite.QUICK)
    assert f"absent: tokamax, {count} cases (such as {suite.QUICK[0].label}): tokamax cannot be imported" in text
    assert f"failed: SGLang, {count} cases (such as {suite.QUICK[0].label}): RuntimeError: no" in text
    assert "Liger 1.19 (" in text


def test_pictures_are_drawn_and_are_the_same_for_the_same_record(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    file = a_record(suite.QUICK)
    drawn = plots.draw(file, tmp_path)
    assert [path.name for path in drawn] == ["speedup.svg", "roofline.svg"]
    first = [path.read_bytes() for path in drawn]
    assert all(picture.startswith(b"<?xml") and b"<svg" in picture for picture in first)
    assert [path.read_bytes() for path in plots.draw(file, tmp_path)] == first


def test_without_the_copy_kernel_there_is_no_roofline_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    file = a_record(suite.QUICK[:2])
    file["rows"] = [row for row in file["rows"] if row["provider"] != "copy"]
    assert [path.name for path in plots.draw(file, tmp_path)] == ["speedup.svg"]
    assert "no roofline: the record has no time of the copy kernel" in capsys.readouterr().out


def test_a_record_without_a_measured_row_is_refused(tmp_path: Path) -> None:
    file = a_record(suite.QUICK[:1])
    file["rows"] = [row for row in file["rows"] if row["status"] != "measured"]
    with pytest.raises(ValueError, match=r"^the record has no measured row; needed some to draw"):
        plots.draw(file, tmp_path)


def test_the_table_of_kernel_times_has_its_cases_from_a_full_run() -> None:
    text = readme_kernels.performance(a_record(suite.FULL) | {"path": "bench/results/made_up.json"})
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0].startswith("| case | copy | pallas-norm | pallas-norm torch | XLA |")
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {case.label}" for case in suite.README]
    assert f"All {len(suite.FULL)} cases" in text


def test_a_case_in_which_a_peer_is_over_3_percent_faster_than_both_ways_is_named() -> None:
    file = a_record(suite.SMOKE[:2])  # of both ours is the fastest
    assert readme_kernels.behind(file).startswith(
        "In 0 of 2 cases both ways to call the kernel take over 3 % more time"
    )
    slower, _ = (case.label for case in suite.SMOKE[:2])
    times = {row["provider"]: row for row in file["rows"] if row["key"] == slower}
    ours, torchs, peer = (times[name] for name in ("pallas-norm", "pallas-norm torch", "Quack"))
    ours["median_us"], torchs["median_us"], peer["median_us"] = 1.04, 1.02, 1.0  # one of ours is near enough
    assert readme_kernels.behind(file).startswith("In 0 of 2")
    torchs["median_us"] = 1.04
    found = readme_kernels.behind(file)
    assert found.startswith("In 1 of 2")
    (line,) = (line for line in found.splitlines() if line.startswith(f"| {slower} |"))
    assert line.split(" | ")[2:] == ["1.04", f"1.00{table.MARKS[peer['rounding']]}", "Quack |"]


def test_overhead_writes_a_row_for_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("says what happens where there is no GPU")

    def absent(_: Any) -> Call:
        raise AbsentError("not here")

    monkeypatch.setattr(overhead, "BATCHES", 3)
    ways = {"pallas-norm, jax.jit": overhead.WAYS["pallas-norm, jax.jit"], "nobody": absent}
    out = tmp_path / "overhead.json"
    assert overhead.run(out, ways=ways) == 0
    file = record.read(out)
    jitted, nobody = file["rows"]
    assert jitted["rounding"] == "HF"
    assert jitted["first_call_ms"] > jitted["median_us"] / 1e3 > 0
    assert len(jitted["samples_us"]) == 3
    assert (nobody["status"], nobody["reason"]) == ("absent", "not here")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert [path.name for path in plots.draw(file, tmp_path)] == ["overhead.svg"]


def test_a_peer_that_is_not_there_is_named_in_the_file_and_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    monkeypatch.setattr(accuracy, "DTYPES", {"bfloat16": accuracy.DTYPES["bfloat16"]})
    monkeypatch.setattr(accuracy, "ACCURACY", (128,))
    monkeypatch.setattr(accuracy, "ACCURACY_ELEMENTS", 1280)

    def absent(_: Any) -> Call:
        raise AbsentError("Quack cannot be imported: no")

    monkeypatch.setattr(accuracy, "PEERS", {"Quack": absent})
    monkeypatch.setattr(accuracy, "_to_torch", lambda _: torch.zeros(10, 128).bfloat16()[0])
    right = accuracy.providers

    def on_a_cpu(x: Any, weight: Any) -> Any:
        own = right(x, weight)
        return {"HF eager": lambda: (accuracy.single_rounding(x, weight, x[:, 0]), None), "Quack": own["Quack"]}

    monkeypatch.setattr(accuracy, "providers", on_a_cpu)
    path = results.write("accuracy", accuracy.run(), tmp_path, "c0ffee")
    file = json.loads(path.read_text()) | {"path": "accuracy.json"}
    assert [row["provider"] for row in file["rows"]] == ["HF eager"]
    assert [(row["provider"], row["reason"]) for row in file["absent"]] == [("Quack", "Quack cannot be imported: no")]
    assert "Not measured: Quack (Quack cannot be imported: no)." in readme_kernels.accuracy(file)


def test_a_provider_that_was_measured_nowhere_is_named_below_the_table() -> None:
    text = readme_kernels.performance(a_record(suite.QUICK) | {"path": "made_up.json"})
    assert "Not measured: tokamax (tokamax cannot be imported); SGLang (RuntimeError: no)." in text


@pytest.mark.parametrize("path", ["sglang.kernels.ops.layernorm.rmsnorm_hf", "sglang.jit_kernel.rmsnorm_hf"])
def test_sglang_s_norm_is_found_where_the_new_and_the_old_release_have_it(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    there = types.ModuleType(path)
    names = path.split(".")
    for count in range(1, len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[:count]), types.ModuleType(names[count - 1]))
    monkeypatch.setitem(sys.modules, path, there)
    assert peers._sglang_module() is there


def test_without_sglang_the_newer_path_is_what_is_missed() -> None:
    if importlib.util.find_spec("sglang"):
        pytest.skip("says what happens where there is no SGLang")
    with pytest.raises(AbsentError, match="SGLang cannot be imported: No module named 'sglang'"):
        peers._sglang_module()
