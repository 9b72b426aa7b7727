"""A tiny dataset, the command line, and one run that many tests look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from lamp3d.data import make_phantom
from lamp3d.data.anatomy import ORGANS
from lamp3d.train import Checkpoint
from lamp3d.volume import write_nifti

LIMIT_SECONDS = 300  # a guard against what hangs, not a claim: other tests share the cores
TRAINING, VALIDATION = ("p0", "p1", "p2"), ("p3",)

CHANGED = ("loss.class_weights=annotation_counts", "network.deep_supervision=1")
"""Of `CONFIG`, in the run that `trained` gives."""

CONFIG = """\
network: {kind: unet, filters: 2}
preprocess: {window: [-200, 600]}
train:
  precision: fp32
  optimizer: adamw
  curriculum:
    - {patch: [16, 16, 32], batch: 2, epochs: 2, patches_per_case: 16}
    - {patch: whole, epochs: 1}
"""

# To import lamp3d takes seconds, so one process does it and every command is a fork of that one. `multiprocessing`
# starts workers from scratch nevertheless, since the command line spawns them.
_SERVER = """
import json, os, signal, sys, time, traceback
import lamp3d.cli, monai.transforms, monai.metrics, torch._dynamo  # the last is what a first trace imports

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(job["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["lamp3d", *job["arguments"]]
        code = 1
        try:
            lamp3d.cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    end, status = time.monotonic() + job["limit"], None
    while status is None:
        time.sleep(0.02)
        ended, state = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(state)
        elif time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
    print(json.dumps(status), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def complaint(self) -> str:
        """The message of a command that refused: in whole lines, without Python's traceback."""
        assert self.code not in (0, -9), f"exit {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err, self.err
        assert self.err.strip()
        return " ".join(self.err.replace("│", " ").split())


class CommandLine:
    """Runs ``lamp3d`` commands, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def __call__(self, *arguments: object) -> Outcome:
        """Run one command; it is killed (code -9) when it hangs."""
        files = {name: str(self.folder / name) for name in ("out", "err")}
        job = {"folder": str(self.folder), "arguments": list(map(str, arguments)), "limit": LIMIT_SECONDS, **files}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        code = json.loads(self._server.stdout.readline())
        return Outcome(code, *(Path(file).read_text(encoding="utf-8") for file in files.values()))

    def close(self) -> None:
        """End the process behind it."""
        self._server.communicate()


def environment() -> dict[str, str]:
    """One thread a process, and messages that are not wrapped to a terminal."""
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERMINAL_WIDTH": "200"}


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until something has happened; fails when the process ends before that, or two minutes are over."""
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < end, "the run does not get anywhere"
        time.sleep(0.01)


def first_epoch_is_saved(run: Path) -> bool:
    """Whether a training has come so far that it could go on after it."""
    history = run / "history.jsonl"
    return (
        history.exists() and bool(history.read_text()) and Checkpoint(run / "last.safetensors").progress["epochs"] > 0
    )


def write_dataset(root: Path) -> Path:
    """Four phantoms of 32³ voxels; the second one's chiasm was not contoured."""
    entries = []
    for seed, name in enumerate((*TRAINING, *VALIDATION)):
        image, label = make_phantom(seed, (32, 32, 32), (7.0, 7.0, 7.0))
        annotated = [organ for organ in ORGANS if (organ, name) != ("Chiasm", "p1")]
        entry = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        for volume, file in zip((image, label), entry.values(), strict=True):
            write_nifti(volume, root / file)
        entries.append({**entry, "annotated": annotated})
    content = {
        "name": "tiny phantoms",
        "labels": {str(value): name for value, name in enumerate(("background", *ORGANS))},
        "training": entries,
        "splits": {"train": TRAINING, "validation": VALIDATION},
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def _once(path: Path, make: Callable[[], object]) -> Path:
    """Have one of the test processes make a folder for all of them."""
    done = path.with_name(f"{path.name}.done")
    with FileLock(f"{path}.lock"):
        if not done.exists():
            make()
            done.touch()
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this session see."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def lamp3d(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path_factory.mktemp("command"))
    yield command_line
    command_line.close()


@pytest.fixture(scope="session")
def dataset(shared: Path) -> Path:
    """Not to be changed; `write_dataset` makes another."""
    return _once(shared / "dataset", lambda: write_dataset(shared / "dataset"))


@pytest.fixture(scope="session")
def config(shared: Path) -> Path:
    """Two stages, three epochs in all, prepared scans in a cache that all tests share."""
    path = shared / "tiny.yaml"
    text = CONFIG + f"cache: {json.dumps(str(shared / 'cache'))}\n"
    return _once(path, lambda: path.write_text(text, encoding="utf-8"))


@pytest.fixture(scope="session")
def trained(shared: Path, lamp3d: CommandLine, dataset: Path, config: Path) -> Path:
    """A run trained on two devices. Not to be changed, but for predictions, results and report."""

    def train() -> None:
        done = lamp3d("train", dataset, *CHANGED, "--config", config, "--out", shared / "a run", "--devices", 2,
                      "--timeline", shared / "steps.png")  # fmt: skip
        assert done.code == 0, done.err
        (shared / "train.out").write_text(done.out, encoding="utf-8")
        (shared / "train.err").write_text(done.err, encoding="utf-8")

    return _once(shared / "a run", train)
