"""Result files: where they lie, and what each says of the machine it was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).parent / "results"
PACKAGES = (
    *("jax", "jaxlib", "torch", "transformers", "numpy", "ml_dtypes"),
    *("triton", "liger_kernel", "quack-kernels", "tokamax", "sglang", "flashinfer-python"),
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def clocks() -> str | None:
    """Name, driver, clocks and temperature as nvidia-smi tells them now; None where there is none."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    return _command("nvidia-smi", query, "--format=csv,noheader")


def machine(commit: str | None) -> dict[str, Any]:
    """Device, driver, clocks, versions and commit; `commit` where the tree that runs is no checkout."""
    return {
        "device": jax.devices()[0].device_kind,
        "nvidia_smi": clocks(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": commit or _command("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_form(out: str, right: dict[str, bool], times: list[dict[str, Any]], options: Sequence[str]) -> None:
    """Of another form than the norm: which of its cases have the right bits, and its times. options: among them
    --commit=SHA, where the tree is a copy of that commit."""
    commit = next((word.partition("=")[2] for word in options if word.startswith("--commit=")), None)
    Path(out).write_text(json.dumps({**machine(commit), "bits": right, "times": times}, indent=1) + "\n")


def write(name: str, rows: list[dict[str, Any]], folder: Path, commit: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    absent = [row for row in rows if "reason" in row]
    measured = [row for row in rows if "reason" not in row]
    path.write_text(json.dumps({**machine(commit), "absent": absent, "rows": measured}, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def default_path(name: str) -> Path:
    """bench/results/NAME_DEVICE.json, for the device of this process."""
    device = jax.devices()[0].device_kind.lower().replace(" ", "_")
    return FOLDER / f"{name}_{device}.json"
