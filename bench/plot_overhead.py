"""Host time of one call, on a logarithmic axis, the ways to call in groups of those that do the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plot_style, record
from .baselines import OURS

# Group -> how the names of overhead.WAYS end that belong to it.
ENDINGS = {
    "forward, gradients recorded": ", grad",
    "forward and backward": ", forward and backward",
    "rows at strides": ", strided",
}
GROUPS = ("forward", *ENDINGS, "from JAX")


def group(provider: str) -> str:
    for name, ending in ENDINGS.items():
        if provider.endswith(ending):
            return name
    return "from JAX" if "jit" in provider or "DLPack" in provider else "forward"


def draw(file: dict[str, Any], paths: Sequence[Path]) -> list[Path]:
    pyplot = plot_style.pyplot()
    rows = record.measured(file)
    groups = {name: [row for row in rows if group(row["provider"]) == name] for name in GROUPS}
    groups = {name: sorted(found, key=lambda row: row["median_us"]) for name, found in groups.items() if found}
    figure, axes = pyplot.subplots(
        len(groups),
        1,
        figsize=(7.5, 1.2 + 0.3 * len(rows) + 0.4 * len(groups)),
        sharex=True,
        squeeze=False,
        layout="constrained",
        height_ratios=[len(found) + 0.5 for found in groups.values()],
    )
    shortest = min(row["median_us"] for row in rows)
    longest = max(row["median_us"] for row in rows)
    for (panel,), (name, found) in zip(axes, groups.items(), strict=True):
        times = [row["median_us"] for row in found]
        colours = ["#0072B2" if row["provider"].startswith(OURS) else "#999999" for row in found]
        panel.barh(range(len(found)), times, color=colours, height=0.7)
        for y, row in enumerate(found):
            least, most = max(row["median_us"] - row["spread_us"], 1e-3), row["median_us"] + row["spread_us"]
            panel.plot([least, most], [y, y], color="#444444", lw=1)
            panel.text(1.04 * most, y, f"{row['median_us']:.1f}", va="center", fontsize=9)
        panel.set(xscale="log", xlim=(shortest / 2, 2 * longest), ylim=(len(found) - 0.4, -0.6))
        labels = [row["provider"].removesuffix(ENDINGS.get(name, "")) for row in found]
        panel.set_yticks(range(len(found)), labels, fontsize=9)
        panel.set_title(name, fontsize=9, loc="left")
        panel.grid(visible=True, axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1][0].set_xlabel("host time of one call, us (logarithmic axis)")
    axes[-1][0].set_xticks(
        ticks := [tick for tick in (0.1, 1, 10, 100, 1000, 10000) if shortest / 2 <= tick <= 2 * longest],
        [f"{tick:g}" for tick in ticks],
    )
    figure.suptitle(f"{file['options']['case']}, {file['device']}", fontsize=11)
    return plot_style.save(figure, paths, file)
