"""python -m bench parity and model, on the smallest models."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("implicit_promotion_throughout")]

torch = pytest.importorskip("torch", reason="parity compares torch models")
pytest.importorskip("transformers", reason="parity compares models of transformers")

from bench import model_shapes, model_speed, parity, parity_data, parity_model, parity_report  # noqa: E402
from bench.calls import AbsentError  # noqa: E402
from bench.parity_data import Question  # noqa: E402
from bench.parity_report import COMPILED, EAGER, EXACT, FUSED, LIGER, OURS, SINGLE  # noqa: E402


def arguments(options: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a parity run with a tiny model that it trains."""
    pytest.importorskip("matplotlib", reason="parity draws with matplotlib")
    found = tmp_path_factory.mktemp("parity")
    words = ("--size", "tiny", "--positions", "512", "--length", "64", "--count", "20", "--commit", "c0ffee")
    run = arguments(
        parity_report.parity_options, *words, "--out", str(found / "parity.json"), "--keep", str(found / "model")
    )
    assert parity.run(run) == 0
    return found


@pytest.fixture(scope="module")
def file(folder: Path) -> dict[str, Any]:
    return parity_report.read(folder / "parity.json")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).eval()


def by_provider(file: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in file["rows"] if row["key"] == key}


@pytest.mark.parametrize("key", ["bf16", "int4"])
def test_single_rounding_is_clearly_farther_from_the_exact_model(file: dict[str, Any], key: str) -> None:
    rows = by_provider(file, key)
    for name in (EAGER, OURS, FUSED):
        for measure in ("logits_to_exact", "kl_to_exact"):
            assert 2 * rows[name][measure] < rows[SINGLE][measure], (name, measure)
        assert 2 * rows[name]["layers_to_exact"][-1] < rows[SINGLE]["layers_to_exact"][-1], name
        assert rows[name]["equal_positions_to_exact"] > rows[SINGLE]["equal_positions_to_exact"], name


@pytest.mark.parametrize("key", ["bf16", "int4"])
def test_a_row_agrees_with_itself(file: dict[str, Any], key: str) -> None:
    rows = by_provider(file, key)
    layers = parity_model.SIZES["tiny"].layers
    assert rows[LIGER]["status"] == "absent" or torch.cuda.is_available()
    assert all(value == 0 for value in rows[EXACT]["layers_to_exact"])
    assert rows[EXACT]["kl_to_exact"] == rows[EXACT]["flips"] == rows[EAGER]["flips_to_eager"] == 0
    assert rows[EXACT]["layers_to_eager"] == pytest.approx(rows[EAGER]["layers_to_exact"], rel=1e-3)
    measured = [row for row in rows.values() if row["status"] == "measured"]
    assert {row["provider"] for row in measured} >= {EXACT, EAGER, OURS, FUSED, SINGLE}
    for row in measured:
        assert (row["positions"], row["questions"]) == (512, 20)
        assert len(row["layers_to_exact"]) == layers + 1
        assert (row["logits_to_exact_error"] > 0) == (row["logits_to_exact"] > 0)
        assert row["flips_beyond_4"] <= row["flips_beyond_1"] <= row["flips"] <= 512
        assert row["perplexity"] == pytest.approx(rows[EAGER]["perplexity"] + row["perplexity_less_eager"])
        assert 1 < row["perplexity"] < 256  # has learned something
        assert row["accuracy"] == row["right"] / 20
        low, high = row["interval"]
        assert low < row["accuracy"] < high
    assert rows[FUSED] == {**rows[OURS], "provider": FUSED}  # the same bits


def test_the_record_names_what_was_run_and_is_checked(file: dict[str, Any], folder: Path) -> None:
    assert file["commit"] == "c0ffee"
    assert file["options"]["seed"] == 0
    assert file["options"]["int4_linears"] == 7 * parity_model.SIZES["tiny"].layers
    assert "torch" in file["versions"]
    assert str(folder) not in json.dumps(file)
    broken = json.loads(json.dumps(file))
    del broken["rows"][0]["kl_to_exact"]
    assert parity_report.problems(broken) == ["row 0 has kl_to_exact = None"]
    broken["rows"][0] = broken["rows"][1]
    assert parity_report.problems(broken) == [f"row 1 repeats bf16 of {EAGER}"]
    with pytest.raises(ValueError, match="known are 1 of parity, model"):
        parity_report.write(folder / "no.json", {**file, "command": "run"})


def test_the_table_and_the_picture_show_every_provider(file: dict[str, Any], folder: Path) -> None:
    text = parity_report.table(file)
    for row in file["rows"]:
        assert row["provider"] in text
    picture = (folder / "parity.svg").read_text()
    assert picture.startswith("<?xml")
    assert picture == parity_report.draw(file, folder / "again.svg").read_text()


def test_perplexity_is_that_of_transformers_own_loss(model: Any) -> None:
    text = parity_data.read_text()
    tokens = torch.tensor(parity_data.windows(text.held_out, parity_data.Bytes(), count=4, length=32, seed=1))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    one = parity.Distance()
    one.add_own(logits, tokens[:, 1:])
    nll = -logits.double().log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    assert one.sums["nll"][0] / one.positions == pytest.approx(nll.item())


def test_the_error_of_a_distance_is_that_of_the_mean_of_windows() -> None:
    one, reference = parity.Distance(), torch.ones(4, 2, 8)
    steps = torch.tensor([0.1, 0.2, 0.2, 0.3])[:, None, None]
    one.add("exact", [], reference + steps, ([], reference))
    squares = steps.flatten().double().square()
    assert one.relative("logits", "exact") == pytest.approx([squares.mean().sqrt().item()])
    expected = squares.std() / 2 / (2 * squares.mean().sqrt())  # of the root of a mean of four
    assert one.error("exact") == pytest.approx(expected.item())


def test_scores_are_the_likelihoods_of_the_choices(model: Any) -> None:
    question = Question("def forward(self, x):\n", ("    return x", "    pass", "!"), 0)
    encoded = parity.encode([question], parity_data.Bytes())
    with torch.no_grad():
        found = parity.scores(model, encoded, batch=2, device="cpu")
        for (tokens, prefix), score in zip(encoded, found, strict=True):
            logs = model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
            alone = sum(logs[place - 1, tokens[place]].item() for place in range(prefix, len(tokens)))
            assert score == pytest.approx(alone, rel=2e-2)  # bfloat16, in another batch
    assert parity.answers([question], [-2.0, -1.0, -1.0]) == [1]


def test_providers_leave_the_model_as_it_was(model: Any) -> None:
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before = model(tokens).logits
        for name, way in parity_model.providers(model, compile_model=False).items():
            if name != LIGER:
                with way(model) as call:
                    call(tokens)
        assert torch.equal(model(tokens).logits, before)
    assert all("forward" not in vars(part) for part in model.modules())


def test_the_exact_forward_is_transformers_own_on_exact_sums(model: Any) -> None:
    norm = model.model.norm
    x = torch.randint(-4, 5, (64, norm.weight.shape[0])).to(torch.bfloat16)  # sums of squares are integers
    with torch.no_grad(), parity_model.exact(norm):
        exact = norm(x)
    rstd = 1 / (x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    assert torch.equal(exact, norm.weight * (x.float() * rstd.float()).to(x.dtype))


@pytest.mark.parametrize("name", ["gemma.modeling_gemma.GemmaRMSNorm", "olmo2.modeling_olmo2.Olmo2RMSNorm"])
def test_the_exact_forward_of_other_kinds_is_transformers_own_on_exact_sums(name: str) -> None:
    folder, modeling, owner = name.split(".")
    norm = getattr(importlib.import_module(f"transformers.models.{folder}.{modeling}"), owner)(64).bfloat16()
    torch.manual_seed(0)
    x = 2.0 ** torch.randint(-1, 2, (32, 1)) * torch.ones(32, 64).bfloat16()  # means of squares are powers of 4
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64))
        own = norm(x)
        with parity_model.exact(norm):
            assert "forward" in vars(norm)
            assert torch.equal(norm(x), own)
    if owner == "Olmo2RMSNorm":
        with pytest.raises(AbsentError, match="Olmo2RMSNorm rounds once itself"):
            parity_model.single(norm).__enter__()


def test_a_model_without_a_known_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no RMSNorm of the table of classes"):
        parity_model.exact(torch.nn.Linear(2, 2)).__enter__()
    t5 = importlib.import_module("transformers.models.t5.modeling_t5")
    with pytest.raises(ValueError, match=r"T5LayerNorm: computes weight .*needed Llama's, Olmo2's or Gemma's norm"):
        parity_model.exact(t5.T5LayerNorm(8)).__enter__()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, when inductor is imported
def test_torch_compile_is_a_provider_and_a_kept_model_is_read_again(folder: Path, tmp_path: Path) -> None:
    words = ("--model", str(folder / "model"), "--compile", "--providers", COMPILED, "--weights", "bf16")
    words += ("--positions", "128", "--length", "64", "--count", "4", "--out", str(tmp_path / "parity.json"))
    assert parity.run(arguments(parity_report.parity_options, *words)) == 0
    rows = by_provider(parity_report.read(tmp_path / "parity.json"), "bf16")
    assert list(rows) == [EXACT, EAGER, COMPILED]
    assert 0 < rows[COMPILED]["logits_to_exact"] < 0.05


def test_int4_codes_are_the_nearest() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 8, dtype=torch.bfloat16)
    quantised = parity_model.Int4Linear(linear)
    error = (quantised.weight().float() - linear.weight.float()).abs().unflatten(1, (-1, parity_model.GROUP))
    assert (error <= 0.51 * quantised.scale.float() + 0.01 * linear.weight.abs().max().item()).all()
    assert len(torch.unique(quantised.weight()[0, :128].float() / quantised.scale[0, 0].float())) <= 16
    with pytest.raises(ValueError, match=r"linears have \[96\] inputs; needed multiples of 128"):
        parity_model.quantise(torch.nn.Sequential(torch.nn.Linear(96, 8)))


def test_questions_come_from_the_held_out_text_and_have_one_answer() -> None:
    text = parity_data.read_text()
    assert not set(text.training) & set(text.held_out) - {""}
    questions = parity_data.continuations(text.held_out, count=50, seed=3)
    assert questions == parity_data.continuations(text.held_out, count=50, seed=3)
    for question in questions:
        assert len(set(question.choices)) == parity_data.CHOICES
        assert {len(choice) for choice in question.choices} == {parity_data.CONTINUATION}
        assert any(question.context + question.choices[question.answer] in document for document in text.held_out)
    with pytest.raises(ValueError, match="needed 10001000, for 1000 windows of 10000 positions"):
        parity_data.windows(["short"], parity_data.Bytes(), count=1000, length=10000, seed=0)


def test_a_file_of_questions_is_asked_as_mmlu_is(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "1 + 1?", "choices": ["1", "2"], "answer": "B"}\n')
    (question,) = parity_data.read_questions(path, count=5)
    assert question == Question("1 + 1?\nA. 1\nB. 2\nAnswer:", (" A", " B"), 1)
    path.write_text('{"question": "1 + 1?", "choices": ["1", "2"], "answer": 2}\n')
    with pytest.raises(ValueError, match="line 1: ValueError"):
        parity_data.read_questions(path, count=5)


def test_the_interval_is_wilsons() -> None:
    assert parity_data.interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert parity_data.interval(0, 10)[0] == 0.0
    assert math.isclose(parity_data.interval(10, 10)[1], 1.0)


def check_speeds(rows: dict[tuple[str, str], dict[str, Any]], name: str) -> None:
    shape = model_shapes.SHAPES[name]
    assert rows.keys() == {(case.label, provider) for case in shape.cases for provider in shape.providers}
    for case in shape.cases:
        for provider in shape.providers:
            row = rows[case.label, provider]
            if case.graph and not torch.cuda.is_available():
                assert (row["status"], row["reason"]) == ("absent", "CUDA graphs need a CUDA device")
            elif provider == LIGER and not torch.cuda.is_available():
                assert (row["status"], row["reason"]) == ("absent", "Liger needs a CUDA device")
            else:
                assert row["tokens"] == case.batch * case.tokens
                assert len(row["samples"]) == 2
                assert all(value > 0 for value in row["samples"])


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-mamba2"])
def test_model_knows_other_families(name: str, tmp_path: Path) -> None:
    """And trains: q's and k's norms rotated, gated norms."""
    out = tmp_path / "model.json"
    words = ("--shape", name, "--repetitions", "2", "--out", str(out))
    assert model_speed.run(arguments(parity_report.model_options, *words)) == 0
    check_speeds({(row["key"], row["provider"]): row for row in parity_report.read(out)["rows"]}, name)


def test_model_measures_every_case_with_every_provider(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--shape", "tiny", "--repetitions", "2", "--out", str(tmp_path / "model.json"))
    assert model_speed.run(arguments(parity_report.model_options, *words)) == 0
    file = parity_report.read(tmp_path / "model.json")
    rows = {(row["key"], row["provider"]): row for row in file["rows"]}
    check_speeds(rows, "tiny")
    assert "decode batch 1" in capsys.readouterr().out
    kept = [row for row in file["rows"] if row["key"] != "prefill 16"]
    parity_report.write(tmp_path / "model.json", file | {"rows": kept})
    assert model_speed.run(arguments(parity_report.model_options, *words)) == 0
    assert re.findall("^measured (.*)", capsys.readouterr().out, re.MULTILINE) == ["prefill 16"]
    assert parity_report.read(tmp_path / "model.json")["rows"][: len(kept)] == kept
    whole = (tmp_path / "model.json").read_text()
    with pytest.raises(ValueError, match=r"has options .* needed the same to continue it: pass another --out"):
        model_speed.run(arguments(parity_report.model_options, *words, "--repetitions", "1"))
    assert (tmp_path / "model.json").read_text() == whole
    with pytest.raises(ValueError, match="no case has 'encode' in its label"):
        model_speed.run(arguments(parity_report.model_options, *words, "--only", "encode"))
