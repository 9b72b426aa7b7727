"""Containers and Slurm jobs have a part of a machine, and the planner goes by that part."""

from pathlib import Path

import pytest

from lamp3d.plan import allowance
from lamp3d.plan.hardware import device_memory, worker_threads

GB = 10**9


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the control groups' files lie; this process has 16 cores of its own."""
    monkeypatch.setattr(allowance, "_GROUPS", tmp_path)
    monkeypatch.setattr(allowance, "_OWN", tmp_path / "own")
    monkeypatch.setattr(allowance.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def test_without_limits_all_of_the_machine(groups: Path) -> None:
    assert allowance.cpu_cores() == 16
    whole = allowance.memory_bytes()
    write(groups / "own", "0::/")
    write(groups / "memory.max", "max")
    write(groups / "cpu.max", "max 100000")
    assert allowance.cpu_cores() == 16
    assert allowance.memory_bytes() == whole > GB


def test_the_least_of_a_job_and_what_it_lies_in(groups: Path) -> None:
    """Version 2, as Slurm nests it."""
    write(groups / "own", "0::/system.slice/slurmstepd.scope/job_7/step_0")
    write(groups / "system.slice/slurmstepd.scope/job_7/step_0/memory.max", "max")
    write(groups / "system.slice/slurmstepd.scope/job_7/memory.max", str(GB))
    write(groups / "system.slice/slurmstepd.scope/job_7/cpu.max", "350000 100000")
    write(groups / "system.slice/cpu.max", "max 100000")
    assert allowance.memory_bytes() == GB
    assert allowance.cpu_cores() == 4
    assert worker_threads(2) == 2
    assert device_memory("cpu", 1) == GB - 500_000_000


def test_version_1_and_a_containers_own_root(groups: Path) -> None:
    write(groups / "own", "5:cpu,cpuacct:/docker/f00\n4:memory:/docker/f00")  # paths outside the container
    write(groups / "memory/memory.limit_in_bytes", str(2 * GB))
    write(groups / "cpu/cpu.cfs_quota_us", "50000")
    write(groups / "cpu/cpu.cfs_period_us", "100000")
    assert allowance.memory_bytes() == 2 * GB
    assert allowance.cpu_cores() == 1
    write(groups / "cpu/cpu.cfs_quota_us", "-1")
    assert allowance.cpu_cores() == 16


def test_workers_on_other_machines_take_nothing_here(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(groups / "memory.max", str(8 * GB))
    assert (worker_threads(8), device_memory("cpu", 8)) == (2, GB - 500_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (worker_threads(8), device_memory("cpu", 8)) == (8, 4 * GB - 500_000_000)
