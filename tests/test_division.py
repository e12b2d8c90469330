"""`make test` and `make test-all` divide the tests as docs/testing.md says, and nothing is in neither."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from tests import conftest, division

ROOT = Path(__file__).parents[1]


def test_the_page_says_what_runs_where() -> None:
    """Else: python -m tests.division > docs/testing.md."""
    assert (ROOT / "docs" / "testing.md").read_text() == division.page()


class Item:
    """As much of a pytest.Item as is asked of one."""

    def __init__(self, nodeid: str, *marks: Any) -> None:
        self.nodeid, self.marks = nodeid, list(marks)

    def get_closest_marker(self, name: str) -> Any:
        return next((mark.mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark: Any) -> None:
        self.marks.append(mark)

    @property
    def slow(self) -> bool:
        return self.get_closest_marker("slow") is not None


def test_of_a_sampled_test_one_case_in_k_stays_whatever_the_period_of_its_parameters() -> None:
    sampled = pytest.mark.sampled(3)
    items: list[Any] = [Item(f"a.py::f[{n}-{dtype}]", sampled) for n in range(10) for dtype in ("bf16", "f16", "f32")]
    elsewhere = [Item(f"a.py::f[{n}-night]", sampled, pytest.mark.nightly) for n in range(40)]
    elsewhere += [Item("a.py::f[gpu]", sampled, pytest.mark.gpu), Item("a.py::g[1]")]
    items += elsewhere  # they count for nothing: of four cases for the night among five, the fifth might be left out
    division.thin(items)
    kept = [item.nodeid for item in items if not item.slow]
    assert kept[10:] == [item.nodeid for item in elsewhere]
    assert {re.split(r"[-\]]", name)[1] for name in kept[:10]} == {"bf16", "f16", "f32"}


def test_a_sampled_test_with_one_case_keeps_it() -> None:
    items: list[Any] = [Item("a.py::f", pytest.mark.sampled(7))]
    division.thin(items)
    assert not items[0].slow


def test_a_case_that_is_marked_slow_itself_is_not_the_one_that_stays() -> None:
    """The longest case of a test was drawn: 17 s of the 583 that all took."""
    for name in "abcdefgh":
        items: list[Any] = [Item(f"a.py::{name}[{n}]", pytest.mark.sampled(2)) for n in (1, 2)]
        items += [Item(f"a.py::{name}[{n}]", pytest.mark.sampled(2), pytest.mark.slow) for n in (3, 4)]
        division.thin(items)
        assert sum(not item.slow for item in items[:2]) == 1


def commands() -> dict[str, str]:
    text = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^(\w+) := (.*pytest.*)$", text, re.MULTILINE))


def test_the_two_commands_leave_out_what_the_page_says() -> None:
    assert commands()["TESTS"].endswith("-m 'not gpu and not nightly and not slow' --profile quick")
    assert commands()["ALL_TESTS"].endswith("-m 'not gpu and not nightly'")
    makefile = (ROOT / "Makefile").read_text()
    assert "\nCASES := not gpu and not nightly and not slow\n" in makefile
    assert makefile.count("-m '$(CASES)'") == 1


def test_compiled_programs_are_kept_by_make_test_alone(pytestconfig: pytest.Config) -> None:
    folder = jax.config.jax_compilation_cache_dir
    if pytestconfig.getoption("--profile") == "quick" and getattr(pytestconfig, "cache", None) is not None:
        assert Path(folder).is_relative_to(ROOT / ".pytest_cache")
    else:
        assert folder == os.environ.get("JAX_COMPILATION_CACHE_DIR")


def test_a_worker_finds_what_another_compiled_before(tmp_path: Path) -> None:
    for worker, names in {"gw0": ("a", "both"), "gw1": ("b", "both"), "alone": ()}.items():
        (tmp_path / worker).mkdir()
        for name in names:
            (tmp_path / worker / f"{name}-cache").write_text(f"{worker} {name}")
    conftest.share_compiled(tmp_path)
    for worker in ("alone", "gw0", "gw1"):
        found = sorted(entry.name for entry in (tmp_path / worker).iterdir())
        assert found == ["a-cache", "b-cache", "both-cache"]
    assert (tmp_path / "gw0" / "b-cache").read_text() == "gw1 b"
    assert (tmp_path / "gw0" / "both-cache").read_text() == "gw0 both"  # its own


def test_the_quick_profile_draws_fewer_examples_of_the_same_and_the_same_every_time() -> None:
    quick, ci = conftest.PROFILES["quick"], conftest.PROFILES["ci"]
    assert 1 < quick["max_examples"] < ci["max_examples"]
    assert {**quick, "max_examples": ci["max_examples"]} == ci
