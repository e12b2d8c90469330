"""One picture: which outputs differ from Hugging Face's, where they lie, and how many they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from demo.compare import Result, share

matplotlib.use("Agg")  # needs no screen

# Okabe and Ito's colours, told apart by readers with any colour vision.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # which norm
ABOVE, EQUAL, BELOW = "#CC79A7", "#ECECEC", "#303030"  # which way; other colours, so that none means two things
WINDOW_ROWS, WINDOW_COLUMNS = 64, 128
ZERO = 1e-5  # per cent; where "none at all" is drawn on the logarithmic axis


def _window(difference: torch.Tensor) -> tuple[int, int]:
    """The corner of the window with the most differences: the map of ours shows its worst place, not a lucky one."""
    rows, n = difference.shape
    height, width = min(WINDOW_ROWS, rows), min(WINDOW_COLUMNS, n)
    whole = (difference != 0)[: rows // height * height, : n // width * width]
    counts = whole.reshape(rows // height, height, n // width, width).sum((1, 3))
    row, column = divmod(int(counts.argmax()), counts.shape[1])
    return row * height, column * width


def _map(axes: Axes, difference: torch.Tensor, corner: tuple[int, int], title: str) -> None:
    top, left = corner
    part = difference[top : top + WINDOW_ROWS, left : left + WINDOW_COLUMNS].clamp(-1, 1).numpy()
    height, width = part.shape
    axes.imshow(
        part,
        cmap=ListedColormap([BELOW, EQUAL, ABOVE]),
        norm=BoundaryNorm([-1.5, -0.5, 0.5, 1.5], 3),
        interpolation="nearest",
        extent=(left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5),
    )
    axes.set_title(f"{title}\nhere {np.count_nonzero(part):,} of {part.size:,} outputs differ", fontsize=11)
    axes.set_xlabel("column of the row (channel)")


def _label(percent: float) -> str:
    if percent == 0:
        return "0"
    return f"{percent:.1f} %" if percent >= 0.1 else f"{percent:.4f} %"


def _shares(axes: Axes, results: Sequence[Result]) -> None:
    series = (
        ("pallas_norm.rms_norm", BLUE, "o", [r.from_hugging_face for r in results]),
        ("plain formula under jax.jit", GREEN, "D", [r.plain_from_hugging_face for r in results]),
        ("torch.nn.functional.rms_norm", ORANGE, "s", [r.single_from_hugging_face for r in results]),
    )
    for (name, colour, marker, differences), offset in zip(series, (-0.24, 0, 0.24), strict=True):
        percents = [100 * share(difference) for difference in differences]
        places = [(max(percent, ZERO), position + offset) for position, percent in enumerate(percents)]
        axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=7, label=name)
        for place, percent in zip(places, percents, strict=True):
            axes.annotate(
                _label(percent), place, xytext=(9, 0), textcoords="offset points", va="center", fontsize=9, color=colour
            )
    axes.set_xscale("log")
    axes.set_xlim(ZERO / 1.6, 300)
    axes.set_xticks(
        [ZERO, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100], ["none", "0.0001", "0.001", "0.01", "0.1", "1", "10", "100"]
    )
    axes.minorticks_off()
    axes.axvline(ZERO * 3.2, color="0.6", linewidth=0.8, linestyle=(0, (2, 3)))
    names = [f"{r.case.label}\n{r.case.rows} x {r.case.n}{', rounds once' if r.case.gemma else ''}" for r in results]
    axes.set_yticks(range(len(results)), names, fontsize=9)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(axis="x", color="0.88")
    for edge in range(1, len(results)):
        axes.axhline(edge - 0.5, color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        "outputs that differ from the model's own class in transformers, per cent of all outputs (logarithmic axis)"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.42, 1.1), ncols=3, frameon=False, fontsize=10)


def draw(results: Sequence[Result], folder: Path) -> Path:
    """Writes bits.png into `folder` and returns its path. The maps show the first result."""
    first = results[0]
    corner = _window(first.from_hugging_face)
    figure = plt.figure(figsize=(12, 10), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1))
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 1.75])
    ours, single = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _map(ours, first.from_hugging_face, corner, "pallas_norm.rms_norm against Hugging Face")
    _map(single, first.single_from_hugging_face, corner, "torch.nn.functional.rms_norm against Hugging Face")
    ours.set_ylabel("row (token)")
    single.legend(
        handles=[
            Patch(color=ABOVE, label="above Hugging Face"),
            Patch(facecolor=EQUAL, edgecolor="0.6", label="every bit equal"),
            Patch(color=BELOW, label="below Hugging Face"),
        ],
        loc="upper right",
        bbox_to_anchor=(1.01, -0.22),
        ncols=3,
        frameon=False,
        fontsize=9,
        columnspacing=1.2,
        handlelength=1.5,
    )
    _shares(figure.add_subplot(grid[1, :]), results)
    figure.suptitle(
        "Outputs that differ from Hugging Face's RMSNorm. "
        f"Maps: {first.case.label}, the {WINDOW_ROWS} x {WINDOW_COLUMNS} window where pallas_norm differs most",
        fontsize=12,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bits.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
