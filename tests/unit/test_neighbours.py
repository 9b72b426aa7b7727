"""Cells are timed beside other workers' work, which ends with the timing."""

import threading
import time

import pytest

from lamp3d.plan.neighbours import neighbours_at_work


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_others_compute_while_one_waits(precision: str) -> None:
    before = threading.active_count()
    with neighbours_at_work(2, precision):
        began = time.process_time()
        time.sleep(0.5)
        computed = time.process_time() - began
    assert computed > 0.1
    assert threading.active_count() == before


def test_a_worker_alone_has_no_neighbours() -> None:
    before = threading.active_count()
    with neighbours_at_work(0, "fp32"):
        assert threading.active_count() == before


def test_what_goes_wrong_while_timing_is_told_and_ends_the_neighbours() -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="wrong"), neighbours_at_work(1, "fp32"):
        raise ValueError("wrong")
    assert threading.active_count() == before
