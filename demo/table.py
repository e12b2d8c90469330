"""The comparisons as text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import torch

from demo.compare import Result, share


def _count(difference: torch.Tensor) -> str:
    return f"{torch.count_nonzero(difference).item():,}"


def _percent(difference: torch.Tensor) -> str:
    if not difference.any():
        return "0"
    value = share(difference)
    return f"{value:.1%}" if value >= 0.001 else f"{value:.4%}"


# heading, cell, meaning
COLUMNS: tuple[tuple[str, Callable[[Result], str], str], ...] = (
    (
        "ours-replay",
        lambda r: _count(r.from_replay),
        "outputs of pallas_norm.rms_norm that differ from the specified roundings, done again on the host with NumPy "
        "from the rstd that rms_norm returned; has to be 0.",
    ),
    (
        "torch-JAX",
        lambda r: _count(r.torch_from_jax),
        "outputs of ours that differ between torch tensors, through DLPack, and JAX arrays, in the same jitted "
        "program; has to be 0.",
    ),
    (
        "ours-exact",
        lambda r: _percent(r.from_exact),
        "outputs of ours that differ from the model's rounding after a row sum in float64. Float32 sums round, so this "
        "is not 0: rstd is at times off in its last bits, and an x * rstd next to a rounding boundary then falls on "
        "the other side.",
    ),
    (
        "ours-HF",
        lambda r: _percent(r.from_hugging_face),
        "outputs of ours that differ from the class in transformers that the model itself uses (LlamaRMSNorm; "
        "Gemma2RMSNorm for Gemma), for the same reason: its float32 sum adds up in another order.",
    ),
    (
        "F.rms_norm-HF",
        lambda r: _percent(r.single_from_hugging_face),
        "outputs of torch.nn.functional.rms_norm, which rounds once, that differ from the same class. Right for Gemma, "
        "which rounds once as well.",
    ),
    (
        "jit-HF",
        lambda r: _percent(r.plain_from_hugging_face),
        "outputs of the plain formula under jax.jit that differ from the same class: XLA keeps the rounding before the "
        "weight in some programs and drops it in others.",
    ),
    ("path", lambda r: r.path, "what computed ours on this machine; see below for the rule."),
)
CASE_WIDTH, SHAPE_WIDTH = 18, 12


def _line(case: str, shape: str, cells: list[str]) -> str:
    widths = [len(heading) for heading, _, _ in COLUMNS]
    padded = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return f"{case:{CASE_WIDTH}} {shape:>{SHAPE_WIDTH}}  {padded}"


def header() -> str:
    line = _line("", "rows x n", [heading for heading, _, _ in COLUMNS])
    return f"{line}\n{'-' * len(line)}"


def row(result: Result) -> str:
    case = result.case
    return _line(case.label, f"{case.rows} x {case.n}", [cell(result) for _, cell, _ in COLUMNS])


def legend() -> str:
    return "\n".join(
        textwrap.fill(f"{heading:13} {meaning}", width=110, subsequent_indent=" " * 14)
        for heading, _, meaning in COLUMNS
    )
