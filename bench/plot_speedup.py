"""Every provider's time over ours, cases x providers: blue is slower than ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plot_style, record
from .baselines import BASELINES, OURS
from .table import by_case

ROUNDING = {"HF": "", "float32": "", "single": " s", "other": " ?", "none": ""}


def _short(row: dict[str, Any]) -> str:
    dtype = {"bfloat16": "", "float16": " fp16", "float32": " fp32"}[row["dtype"]]
    slices = f" q of {row['heads']}" if row["heads"] else ""
    return f"{row['operation']} {row['rows']} x {row['n']}{dtype}{slices}"


def draw(file: dict[str, Any], paths: Sequence[Path]) -> list[Path]:
    pyplot = plot_style.pyplot()
    import matplotlib
    from matplotlib.colors import LogNorm

    rows = record.measured(file)
    cases = [case for case in by_case(rows).values() if ours_of(case)]
    order = {name: place for place, name in enumerate(("forward", "add", "backward"))}
    cases.sort(key=lambda case: _order(next(iter(case.values())), order))
    peers = [name for name in BASELINES if not name.startswith(OURS) and any(name in case for case in cases)]
    half = -(-len(cases) // 2) if len(cases) > 30 else len(cases)
    blocks = [cases[:half], cases[half:]] if half < len(cases) else [cases]
    figure, axes = pyplot.subplots(
        1,
        len(blocks),
        figsize=(len(blocks) * (2.4 + 0.62 * len(peers)) + 0.8, 1.9 + 0.21 * half),
        squeeze=False,
        layout="constrained",
    )
    for panel, block in zip(axes[0], blocks, strict=True):
        values = [
            [case[name]["median_us"] / ours_of(case)["median_us"] if name in case else math.nan for name in peers]
            for case in block
        ]
        image = panel.imshow(values, cmap="RdBu", norm=LogNorm(0.25, 4), aspect="auto")
        panel.set_xticks(range(len(peers)), peers, rotation=40, ha="left", fontsize=8)
        panel.xaxis.tick_top()
        panel.set_yticks(range(len(block)), [_short(next(iter(case.values()))) for case in block], fontsize=7.5)
        panel.tick_params(length=0)
        for y, case in enumerate(block):
            for x, name in enumerate(peers):
                if name in case:
                    ratio = values[y][x]
                    dark = not 0.4 < ratio < 2.5
                    text = (f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}") + ROUNDING[case[name]["rounding"]]
                    panel.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
                else:
                    panel.text(x, y, "-", ha="center", va="center", fontsize=7, color="#777777")
    bar = figure.colorbar(image, ax=axes[0], shrink=0.4, ticks=[0.25, 0.5, 1, 2, 4], format="%g", aspect=30, pad=0.01)
    bar.ax.minorticks_off()
    figure.suptitle(f"Time over that of {OURS}, {file['device']}", fontsize=11)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # as outlines, a thousand numbers are most of a megabyte
        return plot_style.save(figure, paths, file)


def _order(row: dict[str, Any], order: dict[str, int]) -> tuple[Any, ...]:
    return order[row["operation"]], row["heads"] > 0, row["dtype"], row["n"], row["heads"], row["rows"]


def ours_of(case: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Our row: from JAX, or where rows are slices from torch."""
    return case.get(OURS) or case.get("pallas-norm torch")
