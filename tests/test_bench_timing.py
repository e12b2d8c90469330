"""Medians, spreads, and the way from a list of kernels to the times of calls."""

from __future__ import annotations

import re
import time

import pytest

from bench import timing
from bench.progress import bar
from bench.timing import Timing, split

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("implicit_promotion_throughout")]

MARKS = frozenset({"flush"})


def test_median_and_spread_of_samples() -> None:
    timing_ = Timing([4.0, 1.0, 2.0, 3.0, 5.0], kernels=2)
    assert timing_.median_us == 3
    assert timing_.spread_us == 1  # the quartiles are 2 and 4
    assert Timing([7.0]).spread_us == 0
    assert timing_.row() == {
        "median_us": 3.0,
        "spread_us": 1.0,
        "kernels": 2,
        "samples_us": [4.0, 1.0, 2.0, 3.0, 5.0],
    }


def test_one_outlier_moves_neither() -> None:
    steady, disturbed = [10.0] * 20, [10.0] * 20 + [900.0]
    assert timing.spread(disturbed) == timing.spread(steady) == 0
    assert Timing(disturbed).median_us == 10


def test_kernels_between_two_marks_are_one_call() -> None:
    found = [("flush", 90.0), ("a", 1.0), ("flush", 90.0), ("b", 2.0), ("b sum", 0.5)]
    found += [("flush", 90.0), ("a", 1.5), ("flush", 90.0), ("b", 2.0), ("b sum", 1.5)]
    timings = split(found, ["a", "b"], MARKS, 2)
    assert timings["a"] == Timing([1.0, 1.5], 1)
    assert timings["b"] == Timing([2.5, 3.5], 2)


def test_a_record_that_lost_something_is_refused() -> None:
    found = [("flush", 90.0), ("a", 1.0), ("flush", 90.0), ("b", 2.0)]
    with pytest.raises(timing.LostKernelsError, match=r"^2 flushes were recorded, 4 were run$"):
        split(found, ["a", "b"], MARKS, 2)
    with pytest.raises(timing.LostKernelsError, match=re.escape("the kernel a was recorded before any flush")):
        split(found[1:], ["a", "b"], MARKS, 1)


def test_wall_time_is_from_call_to_result() -> None:
    timings = timing.measure_wall({"slow": lambda: time.sleep(0.003), "fast": lambda: None}, repetitions=3)
    assert len(timings["slow"].samples_us) == 3
    assert min(timings["slow"].samples_us) >= 3000
    assert timings["fast"].median_us < 3000


def test_host_time_is_that_of_one_call_and_slow_calls_make_short_batches() -> None:
    made = {"slow": 0, "fast": 0}

    def call(name: str, seconds: float) -> None:
        made[name] += 1
        time.sleep(seconds)

    variants = {"slow": lambda: call("slow", 0.02), "fast": lambda: call("fast", 0)}
    timings = timing.host_times(variants, batches=2, calls=10)
    assert 2e4 <= timings["slow"].median_us < 4e4
    assert made["slow"] <= 2 + 2 * 2
    assert made["fast"] == 2 + 2 * 10


def test_waiting_waits_for_the_arrays_of_a_tuple_and_for_nothing_else() -> None:
    waited = []

    class Array:
        def block_until_ready(self) -> Array:
            waited.append(self)
            return self

    arrays = Array(), Array()
    timing.wait((arrays[0], None, "text", arrays[1]))
    assert waited == list(arrays)


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert timing.geometric_mean([4, 0.25]) == pytest.approx(1)


def test_the_bar_tells_what_is_done_and_what_is_left() -> None:
    assert bar(0, 4, 0, "a") == "[........................] 0/4 0 s  a"
    assert bar(1, 4, 10, "b") == "[######..................] 1/4 10 s, about 30 s left  b"
    assert bar(4, 4, 40, "c") == "[########################] 4/4 40 s  c"
