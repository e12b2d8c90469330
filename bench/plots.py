"""python -m bench plot: the pictures of a record, as SVG.

roofline    share of the copy kernel's throughput against the row length, a line for each provider (plot_roofline.py)
speedup     a provider's time over ours, cases x providers (plot_speedup.py)
overhead    host time of one call, the ways to call in groups (plot_overhead.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plot_overhead, plot_roofline, plot_speedup, record
from .baselines import COPY
from .results import FOLDER

DOCS = FOLDER.parent.parent / "docs"


def draw(file: dict[str, Any], folder: Path, *, suffixes: Sequence[str] = (".svg",)) -> list[Path]:
    """Every picture that this record has the rows for."""

    def named(name: str) -> list[Path]:
        return [folder / f"{name}{suffix}" for suffix in suffixes]

    if not record.measured(file):
        raise ValueError("the record has no measured row; needed some to draw: see the reasons in its rows")
    if file["command"] == "overhead":
        return plot_overhead.draw(file, named("overhead"))
    if file["command"] != "run":
        raise ValueError(f"a record of {file['command']} has no picture; needed one of run or overhead")
    drawn = plot_speedup.draw(file, named("speedup"))
    if any(row["provider"] == COPY for row in record.measured(file)):
        drawn += plot_roofline.draw(file, named("roofline"))
    else:
        print("no roofline: the record has no time of the copy kernel, which needs a CUDA device")
    return drawn


def run(files: Sequence[Path], folder: Path, *, png: bool) -> None:
    """Draws each file."""
    for path in files:
        for picture in draw(record.read(path), folder, suffixes=(".svg", ".png") if png else (".svg",)):
            print(f"drew {picture}")
