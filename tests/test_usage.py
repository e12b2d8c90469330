"""The examples for other libraries run, where the library is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
LIBRARIES = {"flax_nnx": "flax", "equinox": "equinox"}  # page -> the package that it needs


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", LIBRARIES)
def test_the_page_has_an_example(page: str) -> None:
    assert len(blocks(page)) >= 1
    assert "assert" in "".join(blocks(page))  # an example that checks nothing can rot unseen


@pytest.mark.parametrize("page", LIBRARIES)
@pytest.mark.filterwarnings("default")  # a library may warn of its own affairs
def test_the_examples_of_the_page_run_in_order(page: str) -> None:
    pytest.importorskip(LIBRARIES[page], reason=f"{LIBRARIES[page]} is not installed")
    names = {"__name__": page}
    for block in blocks(page):
        exec(compile(block, f"docs/{page}.md", "exec"), names)
