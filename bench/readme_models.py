"""The tables of whole models in docs/huggingface.md, from the committed files of parity and model."""

from __future__ import annotations

from typing import Any

from .parity_report import EAGER, EXACT
from .record import measured
from .table import markdown, measured_on

WEIGHTS = {"bf16": "bfloat16", "int4": "int4 weights"}


def parity(file: dict[str, Any]) -> str:
    header = ["weights", "norms", "logits from exact", "KL, nats", "flips", "perplexity", "right answers, %", "95 %"]
    rows = []
    for row in measured(file):
        low, high = (f"{100 * bound:.1f}" for bound in row["interval"])
        rows.append(
            [
                WEIGHTS.get(row["key"], row["key"]),
                row["provider"],
                f"{row['logits_to_exact']:.2e} ± {row['logits_to_exact_error']:.0e}",
                f"{row['kl_to_exact']:.2e}",
                str(row["flips"]),
                f"{row['perplexity']:.4f}",
                f"{100 * row['accuracy']:.2f}",
                f"{low} to {high}",
            ]
        )
    first = measured(file)[0]
    return (
        f"A small byte-level Llama, trained on the text that Python ships, {first['positions']} positions and "
        f"{first['questions']} questions of held-out text. *{EXACT}* has Hugging Face's rounding and float64 "
        f"statistics; the distance of {EAGER} to it, the RMS of the logits' differences over that of the logits, is "
        "the noise floor. *Flips* are positions with another likeliest token.\n\n"
        + markdown(header, rows)
        + "\n\n![Distance to exact statistics, layer by layer](parity.svg)\n\n"
        + f"{measured_on(file)} Every layer: `{file['path']}`.\n"
    )


def speeds(*files: dict[str, Any]) -> str:
    return "\n".join(map(_of_one_shape, files))


def _of_one_shape(file: dict[str, Any]) -> str:
    rows = measured(file)
    names = list(dict.fromkeys(row["provider"] for row in rows))
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["key"], {})[row["provider"]] = row

    def shown(row: dict[str, Any]) -> str:
        return f"{row['tokens_per_s']:.1f} ± {row['spread']:.1f}"

    table = ([key, *(shown(case[name]) if name in case else "" for name in names)] for key, case in cases.items())
    return (
        f"Tokens per second of a model of the shape of {file['options']['shape']} with random bfloat16 weights, "
        f"medians and spreads of {file['options']['repetitions']} interleaved samples.\n\n"
        + markdown(["case", *names], table)
        + f"\n\n{measured_on(file)} All samples: `{file['path']}`.\n"
    )
