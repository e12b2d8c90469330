"""Outputs that differ from Hugging Face's rounding with exact statistics, by row length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import plot_style


def draw(file: dict[str, Any], path: Path) -> Path:
    pyplot = plot_style.pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    styles = {
        "HF eager": ("#000000", "o"),
        "pallas-norm": ("#0072B2", "s"),
        "XLA": ("#009E73", "^"),
        "F.rms_norm": ("#D55E00", "D"),
    }
    for panel, dtype in zip(panels, ("bfloat16", "float16"), strict=True):
        for provider, (colour, marker) in styles.items():
            rows = [row for row in file["rows"] if row["dtype"] == dtype and row["provider"] == provider]
            shares = [100 * row["differ_from_exact"] / row["elements"] for row in rows]
            panel.plot(
                [row["n"] for row in rows], shares, marker, ls="-", color=colour, label=provider, ms=5, lw=1, alpha=0.8
            )
        panel.set(xscale="log", title=dtype, xlabel="row length n")
        panel.set_yscale("symlog", linthresh=1e-4)  # zero is a result too
        panel.set_ylim(-2e-5, 100)
        panel.set_xticks([64, 256, 1024, 4096, 16384], ["64", "256", "1024", "4096", "16384"])
        panel.minorticks_off()
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("outputs that differ from HF's rounding\nwith exact statistics, %")
    panels[1].legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
    figure.suptitle(file["device"], fontsize=11)
    return plot_style.save(figure, [path], file)[0]
