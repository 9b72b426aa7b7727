"""What the operating system lets this process have of the machine: containers and Slurm jobs get a part of it.

Linux writes limits to control groups, which lie within each other: the least of a group's and its parents' holds. Two
versions are in use, with other files; <https://docs.kernel.org/admin-guide/cgroup-v2.html> and ``cgroup-v1/``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_bytes() -> int:
    """Bytes of memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for text in _limits("memory", "memory.max", "memory.limit_in_bytes") if text.isdigit()]
    return min([total, *limits])


def cpu_cores() -> int:
    """Cores, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [text.split() for text in _limits("cpu", "cpu.max")]  # "200000 100000": µs of computing in so many µs
    quotas, periods = (_limits("cpu", "", f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    shares += [list(pair) for pair in zip(quotas, periods, strict=False)]
    allowed = [int(quota) / int(period) for quota, period in shares if quota.isdigit()]
    return max(1, min([cores, *map(math.ceil, allowed)]))


def _limits(controller: str, unified: str, split: str = "") -> Iterator[str]:
    """What a controller's files say, of this process's group and of all that it lies in.

    Args:
        controller: "memory" or "cpu".
        unified: the file's name in version 2, if it is asked for.
        split: in version 1.
    """
    try:
        lines = _OWN.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in (*lines, "0::/", f"1:{controller}:/"):  # in a container the own path may be that outside of it
        _, controllers, path = line.split(":", 2)
        folder, name = (_GROUPS, unified) if not controllers else (_GROUPS / controller, split)
        if not name or (controllers and controller not in controllers.split(",")):
            continue
        group = PurePosixPath(path.lstrip("/"))
        for part in (group, *group.parents) if path != "/" else (PurePosixPath(),):
            try:
                yield (folder / part / name).read_text("utf-8").strip()
            except OSError:
                continue
