"""python -m bench plot: the pictures of a record, as SVG.

roofline    share of the copy kernel's throughput against the bytes of a case, a line for each provider
speedup     a provider's time over ours, cases x providers
overhead    host time of one call, a bar for each way to call
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import record
from .baselines import BASELINES, COPY, OURS
from .results import FOLDER
from .table import by_case, share_of_copy
from .timing import geometric_mean

DOCS = FOLDER.parent.parent / "docs"

# Colours that colour-blind readers can tell apart; no two providers of one hue share a marker.
STYLES = {
    OURS: ("#0072B2", "s", "-"),
    "pallas-norm torch": ("#56B4E9", "P", "-"),
    "XLA": ("#009E73", "^", "-"),
    "plain jit": ("#009E73", "v", "--"),
    "HF eager": ("#000000", "o", "-"),
    "torch.compile": ("#7F7F7F", "X", "--"),
    "F.rms_norm": ("#D55E00", "D", "-"),
    "Liger": ("#CC79A7", "h", "-"),
    "Quack": ("#E69F00", "*", "-"),
    "tokamax": ("#B8A800", "<", "--"),
    "SGLang": ("#7E2F8E", ">", "--"),
}
CUT = 5  # medians of the bars, at most
ROUNDING = {"HF": "", "float32": "", "single": " s", "other": " ?", "none": ""}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "pictures need matplotlib, which is not installed: pip install 'pallas-norm[bench]'"
        ) from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pallas-norm"  # the same file from the same figures
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, paths: Sequence[Path]) -> list[Path]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=100)
    _pyplot().close(figure)
    return list(paths)


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:g} {unit}"
    return f"{count:g} B"


def _line(cases: Sequence[dict[str, Any]], provider: str) -> tuple[list[float], list[float]]:
    """(bytes, share): the geometric mean of the cases in each factor of 4 of bytes."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for case in cases:
        share = share_of_copy(case, provider)
        if share is not None:
            size = case[provider]["bytes"]
            groups.setdefault(round(math.log(size, 4)), []).append((size, share))
    found = [
        (geometric_mean([size for size, _ in group]), geometric_mean([share for _, share in group]))
        for _, group in sorted(groups.items())
    ]
    return [size for size, _ in found], [share for _, share in found]


def roofline(file: dict[str, Any], paths: Sequence[Path]) -> list[Path]:
    pyplot = _pyplot()
    rows = record.measured(file)
    cases = list(by_case(rows).values())
    operations = [name for name in ("forward", "add", "backward") if any(row["operation"] == name for row in rows)]
    figure, axes = pyplot.subplots(
        1, len(operations), figsize=(4.2 * len(operations) + 1.6, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for panel, operation in zip(axes[0], operations, strict=True):
        own = [case for case in cases if next(iter(case.values()))["operation"] == operation]
        for provider in reversed(STYLES):  # ours is drawn last, on top
            sizes, shares = _line(own, provider)
            if not sizes:
                continue
            colour, marker, dashes = STYLES[provider]
            width = 2.2 if provider == OURS else 1.1
            (handles[provider],) = panel.plot(
                sizes, shares, marker, ls=dashes, color=colour, lw=width, ms=5, alpha=0.9, label=provider
            )
        panel.axhline(1, color="#444444", lw=0.8, ls=":")
        panel.set(xscale="log", title=operation, xlabel="bytes of the rows read and written")
        ticks = [10**power for power in range(4, 10)]
        low, high = panel.get_xlim()
        panel.set_xticks(shown := [tick for tick in ticks if low <= tick <= high], [_size(tick) for tick in shown])
        panel.minorticks_off()
        panel.grid(visible=True, alpha=0.3)
    axes[0][0].set_ylim(0, None)
    axes[0][0].set_ylabel("time of the copy kernel / time of the provider")
    names = [name for name in STYLES if name in handles]
    figure.legend([handles[name] for name in names], names, frameon=False, loc="outside right center", fontsize=9)
    figure.suptitle(f"Throughput as a share of a copy kernel of the same bytes, {file['device']}, L2 cold", fontsize=11)
    return _save(figure, paths)


def _short(row: dict[str, Any]) -> str:
    dtype = {"bfloat16": "", "float16": " fp16", "float32": " fp32"}[row["dtype"]]
    slices = f" q of {row['heads']}" if row["heads"] else ""
    return f"{row['operation']} {row['rows']} x {row['n']}{dtype}{slices}"


def speedup(file: dict[str, Any], paths: Sequence[Path]) -> list[Path]:
    pyplot = _pyplot()
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
    figure.suptitle(
        f"Time over that of {OURS}, {file['device']}, L2 cold: blue is slower than {OURS}.\n"
        "s: rounds once, ?: rounds as neither; -: not measured. Slices: over pallas-norm torch.",
        fontsize=10,
    )
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # as outlines, a thousand numbers are most of a megabyte
        return _save(figure, paths)


def _order(row: dict[str, Any], order: dict[str, int]) -> tuple[Any, ...]:
    return order[row["operation"]], row["heads"] > 0, row["dtype"], row["n"], row["heads"], row["rows"]


def ours_of(case: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Our row: from JAX, or where rows are slices from torch."""
    return case.get(OURS) or case.get("pallas-norm torch")


def overhead(file: dict[str, Any], paths: Sequence[Path]) -> list[Path]:
    pyplot = _pyplot()
    rows = sorted(record.measured(file), key=lambda row: row["median_us"])
    figure, panel = pyplot.subplots(figsize=(7.5, 1.3 + 0.3 * len(rows)), layout="constrained")
    colours = ["#0072B2" if row["provider"].startswith(OURS) else "#999999" for row in rows]
    times = [row["median_us"] for row in rows]
    limit = min(times[-1], CUT * statistics.median(times))  # one slow way would flatten all others
    panel.barh(range(len(rows)), [min(time, limit) for time in times], color=colours, height=0.7)
    for y, row in enumerate(rows):
        cut = row["median_us"] > limit
        end = limit if cut else min(limit, row["median_us"] + row["spread_us"])
        if not cut:
            panel.plot([row["median_us"] - row["spread_us"], end], [y, y], color="#444444", lw=1)
        text = f" {row['median_us']:.1f}" + (" (cut off)" if cut else "")
        panel.text(end + 0.01 * limit, y, text, va="center")
    panel.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    panel.invert_yaxis()
    panel.set_xlim(0, (1.35 if times[-1] > limit else 1.15) * limit)
    panel.set_xlabel("host time of one call, us")
    panel.set_title(f"{file['options']['case']}, {file['device']}", fontsize=10)
    panel.grid(visible=True, axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    return _save(figure, paths)


def draw(file: dict[str, Any], folder: Path, *, suffixes: Sequence[str] = (".svg",)) -> list[Path]:
    """Every picture that this record has the rows for."""

    def named(name: str) -> list[Path]:
        return [folder / f"{name}{suffix}" for suffix in suffixes]

    if not record.measured(file):
        raise ValueError("the record has no measured row; needed some to draw: see the reasons in its rows")
    if file["command"] == "overhead":
        return overhead(file, named("overhead"))
    if file["command"] != "run":
        raise ValueError(f"a record of {file['command']} has no picture; needed one of run or overhead")
    drawn = speedup(file, named("speedup"))
    if any(row["provider"] == COPY for row in record.measured(file)):
        drawn += roofline(file, named("roofline"))
    else:
        print("no roofline: the record has no time of the copy kernel, which needs a CUDA device")
    return drawn


def run(files: Sequence[Path], folder: Path, *, png: bool) -> None:
    """Draws each file."""
    for path in files:
        for picture in draw(record.read(path), folder, suffixes=(".svg", ".png") if png else (".svg",)):
            print(f"drew {picture}")
