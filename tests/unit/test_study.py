"""Studies on paper: what a file says, statistics against known cases, tables and the figure."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lamp3d.errors import ConfigError
from lamp3d.evaluate import CaseResult, OrganScore
from lamp3d.intervals import difference, estimate
from lamp3d.study import RunResult, driver, load_study, write_study_report
from lamp3d.study.report import accuracy, controls, figure
from lamp3d.study.result import PredictionTimes, RowTimings, scores_of
from tests.unit.tiny_dataset import write_tiny_dataset

BASE = {"network": {"filters": 4}, "train": {"curriculum": [{"patch": 32, "epochs": 1}]}}


def write_study(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE), "utf-8")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"title": "A study", "base": "base.yaml", "rows": rows, **settings}), "utf-8")
    return path


def row(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "network": "U-Net-4", "input": "32³", **settings}


def result(name: str, seed: int, dice: list[dict[str, float | None]], **settings: Any) -> RunResult:
    """A run with such Dice scores by patient and organ."""
    cases = tuple(
        CaseResult(
            name=f"p{i}",
            organs={organ: OrganScore(dice=d, hd95_mm=5.0, surface_dice=d) for organ, d in of_case.items()},
        )
        for i, of_case in enumerate(dice)
    )
    defaults: dict[str, Any] = {
        "network": "U-Net-4", "input": "32³", "control_of": None, "split": "validation", "config": {}, "versions": {},
        "commit": None, "parameters": 10, "steps": 5, "bad_steps": 0, "voxels": 1000, "train_seconds": 60.0,
        "best_epoch": 1, "best_dice": 0.5, "organs": ("A", "B"),
    }  # fmt: skip
    return RunResult(row=name, seed=seed, cases=cases, **(defaults | settings))


def test_rows_change_the_base(tmp_path: Path) -> None:
    wider = {"network.filters": 8, "train.curriculum": [{"patch": "whole", "epochs": 2}]}
    path = write_study(tmp_path, [row("a"), row("b", settings=wider, seeds=[3, 4])], seeds=[0, 1, 2])
    study, configs = load_study(path)
    assert configs["a"].network.filters == 4
    assert configs["b"].network.filters == 8
    assert configs["b"].train.curriculum[0].patch == "whole"
    assert [(r.name, seed) for r, seed in study.runs()] == [("a", 0), ("b", 3), ("a", 1), ("b", 4), ("a", 2)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a"), row("a")], "two rows have one name"),
        ([row("a", control_of="b")], "a is a control of 'b'"),
        ([row("a", control_of="a")], "a is a control of 'a'"),
        ([row("a/b")], "study.yaml: rows.0.name: files are named by 'a/b'; take letters, digits"),
        ([{**row("a"), "netwrok": "x"}], "study.yaml: unknown key 'rows.0.netwrok'; did you mean 'network'"),
        ([row("a", settings={"network.filtres": 3})], "row a: unknown key 'network.filtres'; did you mean 'filters'"),
        ([], "study.yaml: rows: should have at least 1 item"),
    ],
)
def test_a_bad_study_is_refused_by_name(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write_study(tmp_path, rows))


def test_an_absent_study_and_an_absent_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no study at"):
        load_study(tmp_path / "none.yaml")
    path = write_study(tmp_path, [row("a")], base="elsewhere.yaml")
    with pytest.raises(ConfigError, match="no configuration at"):
        load_study(path)


@pytest.mark.parametrize("text", [None, "a: [", "a text", "{study: {}, configs: {}}"])
def test_a_folder_with_another_file_of_that_name_holds_no_study(tmp_path: Path, text: str | None) -> None:
    path = write_study(tmp_path, [row("a")])
    written = path.read_text("utf-8")
    with pytest.raises(ConfigError, match=r"study\.yaml is not what `lamp3d study run` leaves"):
        driver.run_study(path, tmp_path, tmp_path, 1)
    assert path.read_text("utf-8") == written
    if text is not None:
        path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"study\.yaml is not what `lamp3d study run` leaves"):
        write_study_report(tmp_path)


def test_a_run_that_another_process_has_just_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_dataset(tmp_path / "data", cases=2)
    out = tmp_path / "out"

    @contextmanager
    def claimed(path: Path) -> Iterator[bool]:
        result("a", 0, []).save(out / "results" / "a-0.json")
        yield True

    monkeypatch.setattr(driver, "claimed", claimed)
    monkeypatch.setattr(driver, "_run", lambda *_: pytest.fail("done twice"))
    driver.run_study(write_study(tmp_path, [row("a")]), tmp_path / "data", out, 1)


def test_a_score_is_the_mean_over_organs_of_patients_means() -> None:
    runs = [result("a", 0, [{"A": 0.2, "B": 0.9}, {"A": 0.4}]), result("a", 1, [{"A": 0.4, "B": 0.7}, {"A": 0.6}])]
    table = scores_of(runs, "dice")
    assert table.shape == (2, 2, 2)
    assert math.isnan(table[0, 1, 1])
    found = estimate(table)
    assert found.mean == pytest.approx((0.6 + 0.6) / 2)  # (0.3 + 0.9) / 2, and (0.5 + 0.7) / 2
    assert found.deviation == pytest.approx(0.0, abs=1e-12)
    assert estimate(scores_of([result("a", 0, [{"A": None}, {}])], "dice")).mean is None


def test_the_interval_is_that_of_a_mean_over_patients() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.7, 0.1, 200)
    found = estimate(values[None, :, None])
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert found.deviation is None  # one seed


@pytest.mark.parametrize("others", [[], [{"A": None}]])
def test_one_patient_gives_no_interval(others: list[dict[str, float | None]]) -> None:
    runs = [result("a", 0, [{"A": 0.5}, *others])]
    of_a = scores_of(runs, "dice")[:, :, [0]]
    for found in (estimate(of_a), difference(of_a, of_a)):
        assert (found.low, found.high) == (None, None)
    assert accuracy(runs, "dice")[1][-1] == "0.500"
    assert figure(runs, []).axes[0].lines[0].get_ydata().tolist() == [0.5]


def test_pairs_are_sharper_than_their_parts() -> None:
    rng = np.random.default_rng(2)
    control = rng.normal(0.6, 0.1, (1, 40, 1))
    better = control + 0.02 + rng.normal(0, 0.005, control.shape)
    found = difference(better, control)
    assert found.mean == pytest.approx(0.02, abs=0.003)
    assert found.low is not None
    assert found.low > 0.015
    alone = estimate(better)
    assert alone.low is not None
    assert alone.low < float(control.mean())  # apart, the two could not be told from each other


def test_tables_say_what_is_there() -> None:
    one = [result("large", seed, [{"A": 0.8 + 0.1 * seed, "B": 0.9}, {"A": 0.6}]) for seed in (0, 1)]
    other = [result("control", 0, [{"A": 0.5, "B": 0.5}, {"A": 0.5}], control_of="large", voxels=1010)]
    table = accuracy([*one, *other], "dice")
    assert table[0] == ["network", "input", "seeds", "A", "B", "mean"]
    assert table[1][2:5] == ["2", "0.725 ± 0.035", "0.900 ± 0.000"]
    compared = controls([*one, *other])
    assert compared is not None
    assert compared[1][:3] == ["large", "control", "1.01"]
    assert compared[1][5].startswith("+0.312 [")
    uneven = [other[0].model_copy(update={"voxels": 1300})]
    assert "not even" in (controls([*one, *uneven]) or [[], ["", "", ""]])[1][2]
    assert controls(one) is None


def test_the_report_lists_what_is_not_finished(tmp_path: Path) -> None:
    path = write_study(tmp_path, [row("a", seeds=[0, 1]), row("b", control_of="a")])
    study, _ = load_study(path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.yaml").write_text(yaml.safe_dump({"study": study.model_dump(mode="json"), "configs": {}}), "utf-8")
    timings = tuple(
        PredictionTimes(window=window, devices=devices, seconds=(1.0, 2.0), peak_bytes=10**9)
        for window in ("whole", "32x32x32")
        for devices in (1, 2)
    )
    dice: list[dict[str, float | None]] = [{"A": 0.5, "B": 0.25}, {"A": 0.75}]
    (first := result("a", 0, dice)).save(out / "results" / "a-0.json")
    timed = RowTimings(row="a", network="U-Net-4", input="32³", device="a CPU", timings=timings)
    timed.save(out / "timings" / "a.json")
    seconds = figure([first], [timed]).axes[1]
    labels = [label.get_text() for label in seconds.get_xticklabels()]
    assert not seconds.patches  # bars on a logarithmic axis
    assert [line.get_ydata().tolist() for line in seconds.lines] == [[statistics.fmean(t.seconds)] for t in timings]
    assert labels[:3:2] == ["whole\n1 device", "windows\n32×32×32\n1 device"]
    text = write_study_report(out).read_text("utf-8")
    assert "**Not finished:** a-1, b-0." in text or "**Not finished:** b-0, a-1." in text
    assert "| U-Net-4 | 32³ | windows 32×32×32 | 2 | 1.50 ± 0.71 | 1 GB |" in text
    assert "of seconds a scan over scans" in text
    assert (out / "figure1.png").stat().st_size > 10_000
    assert (out / "dice--validation.csv").read_text("utf-8").startswith("network,input,seeds,A,B,mean\n")
    (out / "results" / "a-1.json").write_text("{}", "utf-8")
    with pytest.raises(ConfigError, match="not a result"):
        write_study_report(out)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_of_a_repository_that_lamp3d_is_only_installed_in_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "another project"]):
        subprocess.run([*git, *command], check=True)
    installed = tmp_path / "driver.py"
    installed.touch()
    monkeypatch.setattr(driver, "__file__", str(installed))
    assert driver._commit() is None
    subprocess.run([*git, "add", installed.name], check=True)
    assert len(driver._commit() or "") == 40
    monkeypatch.setenv("PATH", "")
    assert driver._commit() is None
