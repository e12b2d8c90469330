"""Options, files, tables and picture of parity and model. The files are JSON as record.py's, one line for each row.

format, command     1; "parity" or "model"
device, nvidia_smi, versions, commit, date      of the machine, see results.machine
options             what was asked for
rows                key (weights, or case), provider, status "measured", "absent" or "failed", reason unless measured
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from . import plot_style, record, results
from .record import FORMAT, STATUSES, measured

EXACT, EAGER, OURS, FUSED = "HF exact", "HF eager", "pallas-norm", "pallas-norm fused"
SINGLE, LIGER, COMPILED = "F.rms_norm", "Liger", "torch.compile"

FILE_FIELDS: dict[str, Any] = {
    name: record.FILE_FIELDS[name]
    for name in ("format", "command", "device", "nvidia_smi", "versions", "commit", "date", "options", "rows")
}
PARITY_FIELDS: dict[str, Any] = {
    **{name: list for name in ("layers_to_exact", "layers_to_eager")},
    **{name: (int, float) for name in ("logits_to_exact_error", "logits_to_eager_error")},
    **{name: (int, float) for name in ("logits_to_exact", "logits_to_eager", "kl_to_exact", "kl_to_eager")},
    **{name: int for name in ("positions", "flips", "flips_to_eager", "flips_beyond_1", "positions_beyond_1")},
    **{name: int for name in ("flips_beyond_4", "positions_beyond_4", "questions", "right")},
    **{name: (int, float) for name in ("floor_logit", "perplexity", "perplexity_less_eager", "accuracy")},
    "interval": (list, tuple),
    "answers_not_exact": int,
    "answers_not_eager": int,
}
MODEL_FIELDS: dict[str, Any] = {"tokens_per_s": (int, float), "spread": (int, float), "samples": list, "tokens": int}
FIELDS = {"parity": PARITY_FIELDS, "model": MODEL_FIELDS}
NAMES = {FUSED: "pallas-norm torch", EXACT: "XLA"}  # whose style in plot_style.STYLES is free here


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--providers", help="comma-separated; default all")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the model too")
    parser.add_argument("--seed", type=int, default=0)


def parity_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--model", help="local folder or hub id of a causal LM; default: a small one trained here")
    parser.add_argument("--size", help="of the model trained here: full, reduced or tiny")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keeps the trained model there, for --model")
    parser.add_argument("--questions", type=Path, metavar="JSONL", help="lines of question or context, choices, answer")
    parser.add_argument("--count", type=int, help="of questions; default 4000, 100 on a CPU")
    parser.add_argument("--positions", type=int, help="default 65536, 2048 on a CPU")
    parser.add_argument("--length", type=int, help="positions of one window; default 512, 128 on a CPU")
    parser.add_argument("--batch", type=int, default=8, help="windows of one forward pass")
    parser.add_argument("--weights", default="bf16,int4", help="comma-separated, of bf16 and int4")
    parser.add_argument("--picture", type=Path, help="default: beside --out, as SVG")


def model_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--shape", help="one of bench/model_shapes.py; default llama-3-8b on a CUDA device, or tiny")
    parser.add_argument("--repetitions", type=int, default=11, help="samples of each provider and case")
    parser.add_argument("--only", help="cases whose label has this in it")


def begin(command: str, options: dict[str, Any], commit: str | None) -> dict[str, Any]:
    return {"format": FORMAT, "command": command, **results.machine(commit), "options": options, "rows": []}


def _wrong(value: dict[str, Any], fields: dict[str, Any], where: str) -> list[str]:
    return [
        f"{where} has {name} = {value.get(name)!r}" for name in fields if not isinstance(value.get(name), fields[name])
    ]


def problems(file: dict[str, Any]) -> list[str]:
    """What keeps `file` from being a record of parity or model; empty for a good one."""
    found = _wrong(file, FILE_FIELDS, "the file")
    if found:
        return found
    if file["format"] != FORMAT or file["command"] not in FIELDS:
        return [f"the file is format {file['format']} of {file['command']!r}; known are 1 of {', '.join(FIELDS)}"]
    seen = set()
    for number, row in enumerate(file["rows"]):
        where = f"row {number}"
        found += (wrong := _wrong(row, record.ROW_FIELDS, where))
        if wrong:
            continue
        if row["status"] not in STATUSES:
            found.append(f"{where} has status {row['status']!r}")
        elif row["status"] == "measured":
            found += _wrong(row, FIELDS[file["command"]], where)
        elif not row.get("reason"):
            found.append(f"{where} is {row['status']} and gives no reason")
        if (row["key"], row["provider"]) in seen:
            found.append(f"{where} repeats {row['key']} of {row['provider']}")
        seen.add((row["key"], row["provider"]))
    return found


def read(path: Path) -> dict[str, Any]:
    file = json.loads(path.read_text())
    if wrong := problems(file):
        raise ValueError(f"{path} is no record of parity or model: {'; '.join(wrong[:5])}")
    return file


def write(path: Path, file: dict[str, Any]) -> None:
    if wrong := problems(file):
        raise ValueError(f"not written, this is no record of parity or model: {'; '.join(wrong[:5])}")
    record.replace_file(path, file)


def _grid(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if not place else cell.rjust(width) for place, (cell, width) in enumerate(zipped))
        for zipped in (list(zip(line, widths, strict=True)) for line in lines)
    )


HEAD = ("provider", "last hidden", "logits", "to eager", "KL, nats", "same bits", "flips", "> floor", "> 4 floors")
TAIL = ("perplexity", "less eager's", "accuracy", "95 % interval", "other answers")


def _parity(file: dict[str, Any], key: str) -> str:
    rows = [row for row in measured(file) if row["key"] == key]
    if not rows:
        return f"{key}: nothing was measured"
    first = rows[0]
    lines = [list(HEAD + TAIL)]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            [
                row["provider"],
                f"{row['layers_to_exact'][-1]:.2e}",
                f"{row['logits_to_exact']:.2e} ±{row['logits_to_exact_error']:.0e}",
                *(f"{row[name]:.2e}" for name in ("logits_to_eager", "kl_to_exact")),
                f"{100 * row['equal_positions_to_exact'] / row['positions']:.1f} %",
                *(str(row[name]) for name in ("flips", "flips_beyond_1", "flips_beyond_4")),
                *(f"{row['perplexity']:.4f}", f"{row['perplexity_less_eager']:+.4f}", f"{100 * row['accuracy']:.2f} %"),
                *(f"{100 * low:.1f}-{100 * high:.1f} %", str(row["answers_not_exact"])),
            ]
        )
    beyond = ", ".join(f"{first[f'positions_beyond_{times}']} beyond {times}" for times in (1, 4))
    title = (
        f"{key}: {first['positions']} positions, {first['questions']} questions. Distances (RMS, relative), KL, flips "
        f"of the likeliest token and other answers are to {EXACT}.\nFloor: {first['floor_logit']:.2e}, the RMS "
        f"distance of a logit of {EAGER}; top-2 margins {beyond}."
    )
    return f"{title}\n{_grid(lines)}"


def _speeds(file: dict[str, Any]) -> str:
    names = list(dict.fromkeys(row["provider"] for row in file["rows"]))
    keys = list(dict.fromkeys(row["key"] for row in file["rows"]))
    cells = {(row["key"], row["provider"]): row for row in measured(file)}
    lines = [["tokens per second", *names]]
    for key in keys:
        lines.append([key, *(_speed(cells.get((key, name)), cells.get((key, EAGER))) for name in names)])
    return f"In brackets: over {EAGER}.\n{_grid(lines)}"


def _speed(row: dict[str, Any] | None, eager: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    rate, spread = row["tokens_per_s"], row["spread"]
    return f"{rate:.0f} ±{spread:.0f}" + (f" ({rate / eager['tokens_per_s']:.3f})" if eager else "")


def table(file: dict[str, Any]) -> str:
    keys = dict.fromkeys(row["key"] for row in file["rows"])
    parts = [_speeds(file)] if file["command"] == "model" else [_parity(file, key) for key in keys]
    missing = [
        f"{row['key']} {row['provider']} {row['status']}: {row['reason']}"
        for row in file["rows"]
        if row["status"] != "measured"
    ]
    return "\n\n".join([*parts, *(["\n".join(missing)] if missing else [])])


def draw(file: dict[str, Any], path: Path) -> Path:
    """Distance of the hidden states to HF exact by layer, a line for each provider, below HF eager's shaded."""
    pyplot = plot_style.pyplot()
    rows = [row for row in measured(file) if row["provider"] != EXACT]
    keys = list(dict.fromkeys(row["key"] for row in rows))
    if file["command"] != "parity" or not keys:
        raise ValueError("the record has no measured row of parity; needed some to draw")
    figure, axes = pyplot.subplots(
        1, len(keys), figsize=(4.6 * len(keys) + 1.6, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for panel, key in zip(axes[0], keys, strict=True):
        for row in sorted((row for row in rows if row["key"] == key), key=lambda row: row["provider"] == OURS):
            name = row["provider"]
            colour, marker, dashes = plot_style.STYLES[NAMES.get(name, name)]
            values = [value or math.nan for value in row["layers_to_exact"]]  # 0 has no place on a log axis
            below = {"ms": 9, "lw": 4, "alpha": 0.5} if name == FUSED else {"ms": 4, "lw": 1.4}  # ours lies on it
            (handles[name],) = panel.plot(values, marker, ls=dashes, color=colour, label=name, **below)
            if name == EAGER:
                panel.fill_between(range(len(values)), 0, values, color="#000000", alpha=0.1, lw=0)
        panel.set(yscale="log", title=key, xlabel="hidden state after layer (the last one normalised)")
        panel.grid(visible=True, alpha=0.3)
    axes[0][0].set_ylabel(f"RMS distance to {EXACT}, relative")
    figure.legend(handles.values(), handles, frameon=False, loc="outside right center", fontsize=9)
    figure.suptitle(f"Distance to exact statistics by layer, {file['device']}. Shaded: noise floor.", fontsize=11)
    return plot_style.save(figure, [path], file)[0]
