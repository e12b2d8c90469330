"""Fills the marked sections of README.md, and draws the figure, from the committed result files.

The times are those of bench/results/run.json, which `python -m bench run --out` wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import parity_report, readme_models, record, results
from .suite import README as CASES
from .table import by_case, cell, markdown, measured_on, share_of_copy

README = Path(__file__).parent.parent / "README.md"
FIGURE = Path(__file__).parent.parent / "docs" / "accuracy.svg"


RUN = "run"  # bench/results/run.json
MARKS_EXPLAINED = (
    "*h*, *s* and *?* say where a provider rounded in that very program: as Hugging Face, once, or as neither."
)


def performance_of_run(file: dict[str, Any]) -> str:
    """The cases of suite.README, and every provider that was measured in any of them."""
    found = by_case(file["rows"])
    cases = {case.label: found[case.label] for case in CASES if case.label in found}
    measured = {name for case in cases.values() for name, row in case.items() if row["status"] == "measured"}
    providers = [name for name in file["options"]["providers"] if name in measured]

    def cells(key: str, case: dict[str, dict[str, Any]]) -> list[str]:
        share = share_of_copy(case)
        return [key, *(cell(case.get(name)) for name in providers), "" if share is None else f"{share:.2f}"]

    return (
        "Kernel times in microseconds, L2 cold, medians of one interleaved run; *copy* is a kernel that moves the same "
        "bytes and does nothing else, and *share* its time over that of pallas-norm. *XLA* is this library's reference "
        f"compiled by XLA, *plain jit* the formula as a JAX program writes it. {MARKS_EXPLAINED}\n\n"
        + markdown(["case", *providers, "share"], (cells(key, case) for key, case in cases.items()))
        + "\n\n![Share of the copy kernel's throughput](docs/roofline.svg)\n\n"
        + f"{measured_on(file)} All {len(found)} cases with all samples: `bench/results/{RUN}.json`; "
        + "[speed-up over every provider](docs/speedup.svg)."
        + (f" {len(file['left'])} cases of the suite were not reached." if file["left"] else "")
        + "\n"
    )


def overhead(file: dict[str, Any]) -> str:
    rows = (
        [
            row["provider"],
            f"{row['median_us']:.1f}",
            f"{row['spread_us']:.1f}",
            row.get("note", row.get("rounding", "")),
        ]
        for row in record.measured(file)
    )
    first = {cache: sorted(times)[len(times) // 2] for cache, times in file["first_call_of_a_process_ms"].items()}
    return (
        f"Host time of one call, {file['options']['case']}, in microseconds: medians and spreads of interleaved "
        "batches.\n\n"
        + markdown(["provider", "median", "spread", "rounding, or what the call is"], rows)
        + "\n\n![Host time of one call](docs/overhead.svg)\n\n"
        + f"The first call of a process takes {first['empty']:.0f} ms, and {first['filled']:.0f} ms with the kernel in "
        f"the disk cache (medians of {len(file['first_call_of_a_process_ms']['empty'])}). "
        + f"{measured_on(file)} All samples: `bench/results/overhead_h200.json`.\n"
    )


def accuracy(file: dict[str, Any]) -> str:
    def percent(row: dict[str, Any], key: str) -> str:
        return f"{100 * row[key] / row['elements']:.4f}"

    header = [
        "dtype",
        "n",
        "provider",
        "from exact, %",
        "from HF eager, %",
        "max ULP",
        "mean signed ULP",
        "from replay",
    ]
    rows = (
        [
            row["dtype"],
            str(row["n"]),
            row["provider"],
            percent(row, "differ_from_exact"),
            percent(row, "differ_from_hf_eager"),
            str(row["max_ulp_from_exact"]),
            f"{row['mean_signed_ulp_from_exact']:+.1e}",
            str(row.get("differ_from_replay", "")),
        ]
        for row in file["rows"]
        if row["dtype"] != "float32" and row["n"] in (128, 4096, 16384)
    )
    return (
        "Share of outputs that differ from Hugging Face's rounding with exact (float64) statistics, and from Hugging "
        "Face eager on the same GPU. *Replay* counts outputs that differ from Hugging Face's steps applied to the "
        "provider's own rstd.\n\n"
        + markdown(header, rows)
        + "\n\n![Outputs that differ from Hugging Face's rounding](docs/accuracy.svg)\n\n"
        + f"{measured_on(file)} Every width and float32: `bench/results/accuracy.json`.\n"
    )


def draw(file: dict[str, Any], path: Path = FIGURE) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "pallas-norm"  # the same file from the same figures
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
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def fill(text: str, section: str, content: str) -> str:
    opening, closing = f"<!-- generated:{section} -->", f"<!-- /generated:{section} -->"
    before, rest = text.split(opening)
    _, after = rest.split(closing)
    return f"{before}{opening}\n{content}{closing}{after}"


def rendered(text: str) -> str:
    text = fill(text, "performance", performance_of_run(record.read(results.FOLDER / f"{RUN}.json")))
    text = fill(text, "overhead", overhead(results.read("overhead_h200")))
    text = fill(text, "parity", readme_models.parity(parity_report.read(results.FOLDER / "parity.json")))
    text = fill(text, "model", readme_models.speeds(parity_report.read(results.FOLDER / "model.json")))
    return fill(text, "accuracy", accuracy(results.read("accuracy")))


def run() -> None:
    draw(results.read("accuracy"))
    fill_readme()


def follow(drawn: Iterable[Path]) -> None:
    """README.md's section of times follows where bench/results/run.json is among the files that were drawn."""
    if (results.FOLDER / f"{RUN}.json").resolve() in [path.resolve() for path in drawn]:
        fill_readme()
        print(f"filled {README}")


def fill_readme() -> None:
    README.write_text(rendered(README.read_text()))
