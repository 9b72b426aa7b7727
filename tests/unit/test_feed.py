"""Mini-batches read by several threads come in order, and no more of them are read ahead than there are threads."""

import threading
import time
from typing import Any

import pytest

from lamp3d.train.feed import read_ahead


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("count", [0, 3, 9])
def test_mini_batches_come_in_order_however_long_each_takes(threads: int, count: int) -> None:
    lock, read, taken = threading.Lock(), 0, 0

    def reading(number: int) -> Any:
        nonlocal read
        time.sleep(0.02 * (number % 3 == 0))
        with lock:
            read += 1
            assert read <= taken + 1 + threads  # those that were worked on, the one that is, those that are read
        return number

    found = []
    for number in read_ahead(reading, count, threads):
        found.append(number)
        taken += 1
    assert found == list(range(count))
