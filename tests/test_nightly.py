"""The properties of random cases, thousands of them, on a CPU: no false alarm on the right kernels.

`make test-nightly`. On a GPU the same properties run deep by `pytest -m gpu --profile nightly -n 8 -v`, with
XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import hypothesis
import jax
import pytest

from tests import test_backward_properties, test_forward_properties
from tests.oracle import DTYPES

MODULES = (test_forward_properties, test_backward_properties)


class Property(NamedTuple):
    module: Any
    name: str

    @property
    def source(self) -> str:
        return inspect.getsource(getattr(self.module, self.name))

    @property
    def main(self) -> bool:
        return "SHARE[" in self.source

    def share(self, implementation: str) -> float:
        """Of the profile's examples: what the test itself takes."""
        return (self.module.SHARE if self.main else self.module.FEW)[implementation]


DRAWN = [
    Property(module, name)
    for module in MODULES
    for name in vars(module)
    if name.startswith("test_") and "@given(" in inspect.getsource(getattr(module, name))
]
# For each property, over its dtypes.
EXAMPLES = {("xla", True): 2000, ("xla", False): 400, ("interpret", True): 300, ("interpret", False): 60}


def runs() -> Iterator[Any]:
    for property_ in DRAWN:
        takes_dtype = "dtype" in inspect.signature(getattr(property_.module, property_.name)).parameters
        for implementation in ("xla", "interpret"):
            for dtype in DTYPES if takes_dtype else (None,):
                name = f"{implementation}-{property_.name.removeprefix('test_')}" + (f"-{dtype}" if dtype else "")
                yield pytest.param(property_, implementation, {"dtype": dtype} if dtype else {}, id=name)


@pytest.fixture
def profile() -> Iterator[None]:
    """Back to the profile of before; and thousands of compiled programs are let go."""
    before = hypothesis.settings.get_current_profile_name()
    yield
    hypothesis.settings.load_profile(before)
    jax.clear_caches()


@pytest.mark.nightly
@pytest.mark.usefixtures("profile")
@pytest.mark.parametrize(("property_", "implementation", "options"), list(runs()))
def test_no_random_case_breaks_a_property(property_: Property, implementation: str, options: dict[str, str]) -> None:
    wanted = EXAMPLES[implementation, property_.main] / property_.share(implementation)
    nightly = hypothesis.settings.get_profile("nightly")
    hypothesis.settings.register_profile("deep", parent=nightly, max_examples=round(wanted))
    hypothesis.settings.load_profile("deep")
    getattr(property_.module, property_.name)(implementation, **options)


def test_every_property_of_random_cases_is_among_them() -> None:
    assert len(DRAWN) >= 17
    assert sum(property_.main for property_ in DRAWN) == 4
    # 2,000 random cases at least of each of the four.
    for property_ in DRAWN:
        if property_.main:
            drawn = round(EXAMPLES["xla", True] / property_.share("xla")) * property_.share("xla")
            of_each = sum(run.values[:2] == (property_, "xla") for run in runs())
            assert drawn * of_each >= 2000
