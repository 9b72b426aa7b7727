"""Workers start, return, fail and die with a clear word, and never hang."""

import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from lamp3d import launch
from lamp3d.errors import ConfigError, DeviceMemoryError, WorkerError
from lamp3d.parallel import worker
from tests.distributed import workers

ROOT = Path(__file__).parents[2]


def test_results_come_back_by_rank() -> None:
    results = launch(workers.describe, 2, ("a", {"b": 3}))
    for rank, (found, args, threads, tensor) in enumerate(results):
        assert found == rank
        assert args == ("a", {"b": 3})
        assert threads == max(1, len(os.sched_getaffinity(0)) // 2)
        assert torch.equal(tensor, torch.full((3,), float(rank)))


def test_one_device_needs_no_process_and_no_group() -> None:
    [(rank, args, _, _)] = launch(workers.describe, 1, ("here",))
    assert (rank, args) == (0, ("here",))
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="case_0042"):
        launch(workers.raise_an_error, 1)


def test_what_workers_cannot_import_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"move .*<lambda> to the top level"):
        launch(lambda: 1, 2)
    program = "from lamp3d import launch\ndef work(): return 1\nlaunch(work, 2)\n"
    piped = subprocess.run([sys.executable], input=program, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert piped.returncode != 0
    assert "save it to one and run that" in piped.stderr.splitlines()[-1]


def run_program(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program, "utf-8")
    command = [sys.executable, str(folder / "program.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, check=False)


def test_the_readmes_program_runs(tmp_path: Path) -> None:
    block = (ROOT / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    assert block.count("(8, 1, 64, 64, 64)") == 1
    given = "import torch\nimages, targets = torch.ones(2, 1, 32, 32, 32), torch.ones(2)\n"
    given += "def loss_fn(logits, targets): return logits.square().mean()\n"
    small = block.replace("(8, 1, 64, 64, 64)", "(2, 1, 32, 32, 32)").replace("filters=16", "filters=2")
    done = run_program(given + small, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_worker_that_never_began_is_told_with_its_exit_status(tmp_path: Path) -> None:
    done = run_program("import os\nfrom lamp3d import launch\nlaunch(os.getpid, 2)\n", tmp_path)
    assert "__name__ == '__main__'" in done.stderr
    assert "none; it ended with exit status 1, and what it wrote is above." in done.stderr.splitlines()[-1]


def test_an_error_ends_all_workers_and_is_the_one_reported() -> None:
    begin = time.perf_counter()
    with pytest.raises(WorkerError) as caught:
        launch(workers.fail_in_rank_1, 2)
    assert time.perf_counter() - begin < 30
    message = str(caught.value)
    assert message.startswith("worker 1 failed; all other workers have been ended.")
    assert "ValueError: case_0042 has a label of 99" in message
    assert "in raise_an_error" in message  # its own traceback
    assert "onnection" not in message


@pytest.mark.parametrize("devices", [1, 2])
def test_memory_that_runs_out_is_said_in_words(devices: int) -> None:
    with pytest.raises(DeviceMemoryError, match=r"device [01] ran out of memory: .*Set a lower limit"):
        launch(workers.take_too_much_memory, devices)


class Activations:
    """What a step has made; tells when it is gone."""


def test_memory_that_ran_out_is_free_again_while_its_error_is_at_hand() -> None:
    made: list[weakref.ref[Activations]] = []

    def run_out() -> None:
        activations = Activations()
        made.append(weakref.ref(activations))
        torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(DeviceMemoryError) as caught:
        launch(run_out, 1)
    assert made[0]() is None
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(("victim", "devices"), [(0, 2), (1, 3)])
def test_a_killed_worker_is_named(victim: int, devices: int, tmp_path: Path) -> None:
    note = tmp_path / "killed at"
    with pytest.raises(WorkerError) as caught:
        launch(workers.be_killed_in_mid_step, devices, (victim, note))
    assert time.time() - float(note.read_text()) < 15
    assert f"worker {victim} was killed by SIGKILL" in str(caught.value)
    assert "--resume (a study: by starting it again)" in str(caught.value)
    assert "onnection" not in str(caught.value)


def test_a_lost_peer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOST_PEER_SECONDS", 0)
    told = r"lost another one, .* \(Read error: Connection reset by peer\).*--resume"
    with pytest.raises(WorkerError, match=told), worker.telling_lost_peers():
        raise RuntimeError("Read error: Connection reset by peer\nframe #0")
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), worker.telling_lost_peers():
        raise RuntimeError("shapes differ")


def test_the_same_script_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from lamp3d import launch\n"
        "from tests.distributed.workers import describe, run_checks\n"
        "if __name__ == '__main__':\n"
        "    [(rank, args, _, _)] = launch(describe, 2, ('x', os.environ['RANK']))\n"
        "    [checks] = launch(run_checks, 2, (['dropout', 'frozen'],))\n"
        "    errors = [e for f in checks['frozen'].values() for e in f.errors.values()]\n"
        "    found = args, checks['dropout']['dropout'].facts, len(errors) > 0, max(errors) < 1e-10\n"
        "    Path(sys.argv[1], f'rank{rank}').write_text(str(found))\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == "(('x', '0'), {'same': True}, True, True)"
