"""README.md and docs/: every example runs, every link leads somewhere, and README.md stays short."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_docstrings import PUBLIC

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CHAINED = ("flax", "equinox")  # pages whose examples go on with what the ones before defined
SKETCH = "<!-- a sketch -->\n"  # before a block that is not a program
PACKAGES = ("torch", "transformers", "flax", "equinox")  # that may be missing


class Example(NamedTuple):
    page: str
    line: int
    code: str


def examples(page: Path) -> list[Example]:
    text = page.read_text()
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if not text[: match.start()].endswith(SKETCH):
            line = text.count("\n", 0, match.start(1)) + 1
            found.append(Example(page.stem, line, match[1]))
    return found


def run(blocks: list[Example]) -> None:
    for package in PACKAGES:
        if any(
            re.search(rf"^(?:import|from) (?:pallas_norm_)?{package}\b", block.code, re.MULTILINE) for block in blocks
        ):
            pytest.importorskip(package, reason=f"{package} is not installed")
    names = {"__name__": blocks[0].page}
    for block in blocks:
        exec(compile("\n" * (block.line - 1) + block.code, f"{block.page}.md", "exec"), names)


ALONE = [example for page in PAGES if page.stem not in CHAINED for example in examples(page)]


@pytest.mark.usefixtures("implicit_promotion")  # as a reader has it
@pytest.mark.sampled(13)
@pytest.mark.parametrize("example", ALONE, ids=lambda example: f"{example.page}-{example.line}")
def test_the_example_runs(example: Example) -> None:
    run([example])


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize("page", CHAINED)
@pytest.mark.filterwarnings("default")  # a library may warn of its own affairs
def test_the_examples_of_the_page_run_in_order(page: str) -> None:
    blocks = examples(ROOT / "docs" / f"{page}.md")
    assert "assert" in "".join(block.code for block in blocks)  # an example that checks nothing can rot unseen
    run(blocks)


def test_the_pages_that_show_calls_have_examples() -> None:
    assert {"README", "jax", "pytorch", "huggingface"} <= {example.page for example in ALONE}


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_a_file_of_the_checkout(page: Path) -> None:
    """README.md's are absolute, since an index of packages shows it too, where no file is beside it."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    source = urls["Source"]
    raw = source.replace("https://github.com/", "https://raw.githubusercontent.com/")
    for link in links(page):
        if page.stem == "README":
            found = re.fullmatch(rf"(?:{source}/blob/main|{raw}/main)/(.+)", link)
            assert found, f"{link} is not of {source}"
            assert (ROOT / found[1]).is_file(), link
        elif not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_the_links_that_are_checked_are_found() -> None:
    assert len(links(ROOT / "README.md")) > 10
    assert "compatibility.md#which-path-runs" in links(ROOT / "docs" / "numerics.md")


def test_the_api_pages_have_every_public_function() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for module, members in re.findall(r"^::: (\S+)\n    options: \{ members: \[(.*)\] \}$", text, re.MULTILINE):
        entries |= {f"{module}.{name}" for name in members.split(", ")}
    public = {f"{module}.{name}" for module, names in PUBLIC.items() for name in names}
    assert public - entries == set()


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | {"index.md"}  # which is README.md
