"""What installing and importing pallas_norm does and does not do."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pallas_norm

ROOT = Path(__file__).parents[1]
SIDE_EFFECTS = """
import sys
{statements}
import jax._src.xla_bridge as bridge
if "torch" in sys.modules:
    print("torch was imported")
if bridge.backends_are_initialized():
    print("a JAX backend was started")
"""


def side_effects_of(statements: str, *paths: Path) -> list[str]:
    """In a process of its own that sees no GPU, with `paths` first on its import path."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    command = [sys.executable, "-c", SIDE_EFFECTS.format(statements=statements)]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=120
    ).stdout.splitlines()


def test_importing_neither_imports_torch_nor_starts_a_backend() -> None:
    assert side_effects_of("import pallas_norm") == []


@pytest.mark.slow
def test_the_test_above_can_fail(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()  # a stand-in, so that this also runs where there is no torch
    assert side_effects_of("import pallas_norm, torch", tmp_path) == ["torch was imported"]
    assert side_effects_of("import jax, pallas_norm; jax.devices()") == ["a JAX backend was started"]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_that_of_the_distribution() -> None:
    assert pallas_norm.__version__ == project()["version"]


def test_the_citation_has_this_version_and_this_address() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {pallas_norm.__version__}\n" in text
    assert f"repository-code: {project()['urls']['Source']}\n" in text
    assert f"repo_url: {project()['urls']['Source']}\n" in (ROOT / "mkdocs.yml").read_text()


def test_the_changelog_begins_with_this_version_and_the_citation_s_date() -> None:
    heads = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    (released,) = re.findall(r"^date-released: (\d{4}-\d\d-\d\d)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert (pallas_norm.__version__, released) in heads[:2]  # the first may be Unreleased


def test_the_tools_are_pinned() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert [tool for name in ("lint", "docs") for tool in groups[name] if "==" not in tool] == []


def test_the_check_of_extras_asks_for_each_and_for_every_pair_of_the_page() -> None:
    asked = re.findall(r"^ +for extra in '' (.+); do$", (ROOT / "scripts" / "resolve-extras").read_text(), re.MULTILINE)
    pairs = set(asked[0].split())
    assert set(project()["optional-dependencies"]) - {"test-torch"} <= pairs
    page = (ROOT / "docs" / "compatibility.md").read_text()
    table = set(re.findall(r"^\| `(cuda\S+)` \| jax", page, re.MULTILINE))
    assert {"cuda12", "cuda13", "cuda13,hf"} <= table <= pairs
    refused = set(re.findall(r"^\| `(cuda\S+)` \| does not resolve", page, re.MULTILINE))
    assert refused == {pair for pair in pairs if pair.startswith("cuda12,")}


def test_the_core_depends_on_neither_torch_nor_transformers() -> None:
    names = {re.split(r"[^A-Za-z0-9_-]", requirement)[0] for requirement in project()["dependencies"]}
    assert names == {"absl-py", "jax", "jaxlib", "ml_dtypes", "numpy"}
