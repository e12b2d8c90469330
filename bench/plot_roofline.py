"""How near each provider is to a kernel that only copies, by row length: where rows are many, and where few."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plot_style, record
from .baselines import OURS
from .table import by_case, share_of_copy

FEW = 64  # rows; a batch of decoding
MANY_BYTES = 16e6  # what a call moves at least where rows are called many
TICKS = (64, 256, 1024, 4096, 16384, 65536)

Cases = list[dict[str, dict[str, Any]]]


def _by_length(cases: Cases, operation: str, *, many: bool) -> Cases:
    """One case for each row length, of contiguous bfloat16 rows: the largest of many rows, or that of 64."""
    chosen: dict[int, tuple[int, dict[str, dict[str, Any]]]] = {}
    for case in cases:
        row = next(iter(case.values()))
        if row["operation"] != operation or row["dtype"] != "bfloat16" or row["heads"]:
            continue
        if row["bytes"] < MANY_BYTES if many else row["rows"] != FEW:
            continue
        if row["bytes"] > chosen.get(row["n"], (0, case))[0]:
            chosen[row["n"]] = row["bytes"], case
    return [case for _, (_, case) in sorted(chosen.items())]


def _line(cases: Cases, provider: str) -> tuple[list[int], list[float]]:
    points = [(case[provider]["n"], share_of_copy(case, provider)) for case in cases if provider in case]
    found = [(n, share) for n, share in points if share is not None]
    return [n for n, _ in found], [share for _, share in found]


def draw(file: dict[str, Any], paths: Sequence[Path]) -> list[Path]:
    pyplot = plot_style.pyplot()
    cases = list(by_case(record.measured(file)).values())
    panels = {
        "forward, many rows": _by_length(cases, "forward", many=True),
        f"forward, {FEW} rows": _by_length(cases, "forward", many=False),
        "backward, many rows": _by_length(cases, "backward", many=True),
    }
    panels = {title: found for title, found in panels.items() if found}
    if not panels:  # a record of other cases than a suite's
        panels = {"all cases": cases}
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(4.2 * len(panels) + 1.6, 4.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for panel, (title, found) in zip(axes[0], panels.items(), strict=True):
        for provider in reversed(plot_style.STYLES):  # ours is drawn last, on top
            lengths, shares = _line(found, provider)
            if not lengths:
                continue
            colour, marker, dashes = plot_style.STYLES[provider]
            width = 2.2 if provider == OURS else 1.1
            (handles[provider],) = panel.plot(
                lengths, shares, marker, ls=dashes, color=colour, lw=width, ms=5, alpha=0.9, label=provider
            )
        panel.axhline(1, color="#444444", lw=0.8, ls=":")
        panel.set(xscale="log", title=title, xlabel="row length n")
        panel.set_xticks(TICKS, [str(tick) for tick in TICKS])
        panel.minorticks_off()
        panel.grid(visible=True, alpha=0.3)
    axes[0][0].set_ylim(0, None)
    axes[0][0].set_ylabel("throughput over that of a copy")
    names = [name for name in plot_style.STYLES if name in handles]
    figure.legend([handles[name] for name in names], names, frameon=False, loc="outside right center", fontsize=9)
    figure.suptitle(f"How near to a kernel that only copies, bfloat16, {file['device']}", fontsize=11)
    return plot_style.save(figure, paths, file)
