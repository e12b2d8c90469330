"""The largest of a row that warpgroups share, in the interpreter with its race detector: no races, and its barrier is
needed."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_norm._spec import Spec
from pallas_norm.plans.plan import Source
from pallas_norm.regimes import plan_for
from tests import rewrites
from tests.race_detection import race_detection
from tests.rewrites import Rewrite
from tests.test_interpreter import PIPED, SHARED, has_races
from tests.test_interpreter import fenced_copies as fenced_copies

PIPELINE: dict[str, Any] = {"source": Source.PIPELINE, "stages": 2, "rows_in_registers": True, "programs": 1}


def kernel(**changes: Any) -> None:
    """Several rows in one program, so that the next row's sums follow at once."""
    quantized = sys.modules["pallas_norm.kernels.quantized"].quantized  # of a mutant
    plan = dataclasses.replace(plan_for(PIPED, "bfloat16"), **SHARED, **changes)
    operands = {"x": jnp.ones((6, PIPED), jnp.bfloat16), "weight": jnp.ones((PIPED,), jnp.bfloat16)}
    options: dict[str, Any] = {"spec": Spec(), "dtype": "int8", "group": PIPED, "with_y": False, "interpret": True}
    jax.block_until_ready(quantized(operands, plan=plan, **options))


KINDS = {"kept": {}, "pipeline": PIPELINE}
MEET = Rewrite("cta", "mosaic.arrive_and_wait(exchange.barrier)", "pass")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_no_races(kind: str) -> None:
    with race_detection() as races_found:
        assert not has_races(lambda: kernel(**KINDS[kind]), races_found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_without_its_barrier_it_has(kind: str) -> None:
    with rewrites.rewritten(MEET), race_detection() as races_found:
        assert has_races(lambda: kernel(**KINDS[kind]), races_found)
