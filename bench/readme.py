"""python -m bench readme: fills the marked sections of README.md and docs/ and draws the pictures of docs/, from the
committed result files that shown.py names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import parity_report, plot_accuracy, plots, readme_kernels, readme_models, shown

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/performance.md", "docs/huggingface.md", "docs/numerics.md")

# Section -> what is written there, and the kinds of result files that it takes.
SECTIONS: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "summary": (readme_kernels.summary, ("accuracy", "run", "overhead")),
    "performance": (readme_kernels.performance, ("run",)),
    "behind": (readme_kernels.behind, ("run",)),
    "overhead": (readme_kernels.overhead, ("overhead",)),
    "training": (readme_kernels.training, ("training",)),
    "accuracy": (readme_kernels.accuracy, ("accuracy",)),
    "parity": (readme_models.parity, ("parity",)),
    "model": (readme_models.speeds, ("model",)),
    "shapes": (readme_models.speeds, ("model-qwen3", "model-mamba2")),
}


def sections(text: str) -> list[str]:
    return re.findall(r"^<!-- generated:(\w+) -->$", text, re.MULTILINE)


def fill(text: str, section: str, content: str) -> str:
    opening, closing = f"<!-- generated:{section} -->", f"<!-- /generated:{section} -->"
    before, rest = text.split(opening)
    _, after = rest.split(closing)
    return f"{before}{opening}\n{content}{closing}{after}"


def rendered(text: str) -> str:
    """The page with every marked section written anew."""
    for section in sections(text):
        write, kinds = SECTIONS[section]
        text = fill(text, section, write(*(shown.read(kind) for kind in kinds)))
    return text


def draw(folder: Path) -> list[Path]:
    """The pictures of docs/."""
    files: dict[str, Any] = {kind: shown.read(kind) for kind in ("run", "overhead", "accuracy", "parity")}
    return [
        *plots.draw(files["run"], folder),
        *plots.draw(files["overhead"], folder),
        plot_accuracy.draw(files["accuracy"], folder / "accuracy.svg"),
        parity_report.draw(files["parity"], folder / "parity.svg"),
    ]


def run() -> None:
    for picture in draw(ROOT / "docs"):
        print(f"drew {picture.relative_to(ROOT)}")
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))
        print(f"filled {page}")
