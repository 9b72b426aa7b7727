"""Training as one call: prepare the scans, plan every curriculum stage, start the workers."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from lamp3d.data import Batches, Case, CaseStore, Dataset, UnusualContour, read_dataset, unseen_organs, unusual_contours
from lamp3d.errors import ConfigError, DatasetError, DeviceMemoryError, LampError, PlanError, WorkerKilledError
from lamp3d.evaluate import dice_per_organ
from lamp3d.experiment.config import ExperimentConfig
from lamp3d.experiment.initial import initial_weights
from lamp3d.experiment.planning import plan_stages, stage_batches, stage_plan
from lamp3d.experiment.run import WRITTEN, Run, cache_folder
from lamp3d.files import claimed
from lamp3d.graph.inputs import title_of
from lamp3d.parallel import Engine, launch
from lamp3d.plan import Plan, format_bytes
from lamp3d.plan.hardware import device_type
from lamp3d.predict import Predictor, check_window, single_parts
from lamp3d.sides import largest_padded
from lamp3d.train import Checkpoint, CurriculumStage, HybridLoss, Trainer, copy_tensors, network_tensors, resumable

MOST_NAMED = 8
"""Of the contours that a training points out before it begins."""

PLANNED_FROM = {"patch", "batch", "micro_batches", "schedule", "data", "space", "recompute"}
"""Settings of a curriculum stage that decide about its plan."""

SAFER = 0.8
"""Of the memory that was not enough: what the next plan may need."""


def train(
    dataset_root: Path,
    config: ExperimentConfig,
    devices: int,
    out: Path,
    *,
    resume: bool = False,
    auto_replan: bool = False,
) -> Run:
    """Train through the curriculum and leave a run folder.

    Args:
        dataset_root: folder in Decathlon layout with the splits "train" and "validation".
        config: the experiment.
        devices: worker processes, one a device.
        out: the run folder.
        resume: go on with the run in ``out``; a new one must not overwrite an old one.
        auto_replan: where a device runs out of memory in spite of its plan, go on from the last checkpoint with the
            next safer one.

    Raises:
        LampError: bad input, a plan that does not fit, a worker that failed; the run folder stays resumable.
    """
    console = Console()
    dataset = read_dataset(dataset_root, config.split)
    last = out / "last.safetensors"
    begun = last.exists()
    if begun and not resume:
        raise ConfigError(f"{out} already holds a run; add --resume to go on with it, or choose another --out.")
    if not (out / "run.json").exists():
        if not begun and (others := [name for name in WRITTEN if (out / name).exists()]):
            raise ConfigError(
                f"{out} is no run folder (no run.json), but holds {', '.join(others)}, which training writes over; "
                "choose another --out."
            )
    elif resume:
        before = Run.open(out)
        if begun:
            _check_same_labels(before, dataset)
        if before.splits is not None:
            dataset = dataset.with_splits(before.splits)
    train_cases, validation_cases = dataset.split("train"), _validation_cases(dataset)
    if train_cases and not any(case.annotated for case in train_cases):
        raise _nothing_to_learn(dataset)
    loss = config.loss.resolved_for([case.annotated for case in train_cases], dataset.organs)
    config = config.model_copy(update={"loss": loss})
    single_parts(config.predict, dataset.organs)  # or it says which organ is not there
    check_window(config.predict.window_shape, config.network.outline(dataset.n_classes, len(dataset.channels)))
    store = CaseStore(dataset, config.preprocess, cache_folder(config))
    config = config.model_copy(update={"preprocess": store.config})
    run = Run(out, config, dataset.root.resolve(), dataset.organs, dataset.channels)
    if begun:  # before anything in its folder is written over
        resumable(Checkpoint(last), run.outline(), config.train, config.beside_training)
    elif config.initial_weights is not None:
        taken, every = initial_weights(run), network_tensors(run.outline())
        fresh = ", ".join(name for name in every if name not in taken) or "none"
        console.print(f"{len(taken)} tensors begin as in {config.initial_weights}; afresh: {fresh}.")

    def show(index: int, stage: CurriculumStage, plan: Plan) -> None:
        console.print(f"[bold]Stage {index + 1}[/]: {stage}")
        console.print(plan.table())

    plans = plan_stages(
        run, store, train_cases, (*train_cases, *validation_cases), devices,
        kept=_kept_plans(run, devices) if resume else {}, show=show,
    )  # fmt: skip
    _check_validation(run, store, validation_cases)
    if not begun:
        _point_out(unusual_contours(store, (*train_cases, *validation_cases)), console)
        if unseen := unseen_organs(store, train_cases):
            if len(unseen) == len(dataset.organs):
                raise _nothing_to_learn(dataset)
            console.print(
                f"No training case shows {', '.join(unseen)}: are its contours there? The network cannot learn it.",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
    with claimed(out / ".lock") as mine:
        if not mine:
            raise ConfigError(f"{out} is being trained by another process; wait for it, or choose another --out.")
        if last.exists() and not begun:
            raise ConfigError(f"{out} was trained by another process meanwhile; start again with --resume to go on.")
        run = Run.create(out, config, dataset, devices)
        (out / "plans").mkdir(exist_ok=True)
        for index, plan in plans.items():
            plan.save(run.plan_path(index))
        _train(run, store, train_cases, devices, resume, auto_replan, console)
    return run


def _nothing_to_learn(dataset: Dataset) -> DatasetError:
    return DatasetError(
        f"{dataset.root}: no training case shows any organ, so that there is nothing to learn; are the label maps "
        "empty, or does `annotated` leave everything out?"
    )


def _check_same_labels(before: Run, dataset: Dataset) -> None:
    """Whether the weights of a run mean the same in a dataset."""
    pairs = {"organs": (before.organs, dataset.organs), "channels": (before.channels, dataset.channels)}
    for what, (own, others) in pairs.items():
        if own != others:
            raise DatasetError(
                f"{dataset.root} has the {what} {', '.join(others)}, but the run in {before.folder} was trained on "
                f"{', '.join(own)}: go on with the same, in the same order, or choose another --out."
            )


def _check_validation(run: Run, store: CaseStore, cases: tuple[Case, ...]) -> None:
    """Whether the network takes the whole volumes that validation predicts; networks of one fixed size do not."""
    if not cases or run.config.predict.window_shape is not None or run.config.network.name is None:  # lamp3d's own do
        return
    network = run.outline()
    sides = largest_padded((store.shape(case) for case in cases), network.divisor)
    try:
        check_window(sides, network)
    except ConfigError as error:
        raise ConfigError(
            f"validation predicts whole volumes, and {title_of(network)} does not take the largest: {error}. Give the "
            "size that it takes as predict.window, for sliding windows, or choose a network that takes any."
        ) from error


def _train(
    run: Run,
    store: CaseStore,
    cases: tuple[Case, ...],
    devices: int,
    resume: bool,
    auto_replan: bool,
    console: Console,
) -> None:
    """As planned, or where memory runs out and it is wished, as the next safer plan says."""
    last = run.folder / "last.safetensors"
    while True:
        try:
            launch(_train_worker, devices, (run.folder, resume))
            return
        except (DeviceMemoryError, WorkerKilledError) as error:
            if not last.exists() or (not auto_replan and isinstance(error, WorkerKilledError)):
                raise  # who knows by whom it was killed
            index, resume = Checkpoint(last).progress["stage"], True
            plan = _safer_plan(run, index, store, cases, devices, error)
            if not auto_replan:
                own = shlex.join([str(run.dataset), "--out", str(run.folder), f"--devices={devices}"])
                raise DeviceMemoryError(
                    f"{error} The next safer plan for stage {index + 1} takes {_cost(plan)}; go on with it by: "
                    f"lamp3d train {own} --resume --auto-replan"
                ) from error
            plan.save(run.plan_path(index))
            console.print(f"[bold]Stage {index + 1}[/] ran out of memory; it goes on with a safer plan, {_cost(plan)}:")
            console.print(plan.table())


def _point_out(contours: Sequence[UnusualContour], console: Console) -> None:
    if contours:
        more = f"; and {len(contours) - MOST_NAMED} more" if len(contours) > MOST_NAMED else ""
        console.print(
            f"Look at these contours: {'; '.join(map(str, contours[:MOST_NAMED]))}{more}. Where one is wrong, leave "
            "its organ out of the case's `annotated`.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _safer_plan(
    run: Run, index: int, store: CaseStore, cases: tuple[Case, ...], devices: int, error: LampError
) -> Plan:
    """A plan that needs a fifth less memory than the one that failed.

    Raises:
        DeviceMemoryError: there is none.
    """
    failed = Plan.load(run.plan_path(index))
    limit = round(SAFER * min(failed.peak_bytes, failed.memory_limit_bytes or failed.peak_bytes))
    try:
        return stage_plan(run, index, store, cases, devices, memory=limit)
    except PlanError as impossible:
        raise DeviceMemoryError(f"{error} No plan needs much less: {impossible}") from error


def _cost(plan: Plan) -> str:
    return f"{format_bytes(plan.peak_bytes)} a device and {plan.step_seconds:.2f} s a step"


def _validation_cases(dataset: Dataset) -> tuple[Case, ...]:
    return dataset.split("validation") if "validation" in dataset.splits else ()


def _kept_plans(run: Run, devices: int) -> dict[int, Plan]:
    """A resumed run keeps its plans where the devices are as many, of the same type, and the settings are the same."""
    if not (run.folder / "run.json").exists():
        return {}
    before, kept = Run.open(run.folder).config, {}
    for index in range(min(len(config.train.curriculum) for config in (before, run.config))):
        path = run.plan_path(index)
        if path.exists() and _planned_from(before, index) == _planned_from(run.config, index):
            plan = Plan.load(path)
            if (plan.devices, plan.device_type) == (devices, device_type()):
                kept[index] = plan
    return kept


def _planned_from(config: ExperimentConfig, index: int) -> tuple[object, ...]:
    stage = config.train.curriculum[index].model_dump(include=PLANNED_FROM)
    return config.network, config.preprocess, config.memory, config.across, config.train.precision, stage


def _train_worker(out: Path, resume: bool) -> None:
    """One worker's part of a training run; everything it needs is in the run folder."""
    run = Run.open(out)
    config = run.config
    dataset = run.read_dataset()
    store = run.store(dataset)
    torch.manual_seed(config.train.seed)
    network = run.network()
    if not (out / "last.safetensors").exists():
        own, begun = network_tensors(network), initial_weights(run)
        copy_tensors({name: own[name] for name in begun}, begun)

    def batches(stage: int, epoch: int) -> Batches:
        return stage_batches(config, stage, store, dataset.split("train"), network.divisor, epoch)

    cases = _validation_cases(dataset)
    window, classes = config.predict.window_shape, dataset.n_classes
    predictor = partial(Predictor, preprocess=store.config, divisor=network.divisor, window=window, classes=classes)
    validate = partial(_validate, store=store, cases=cases, make_predictor=predictor) if cases else None
    loss = HybridLoss(config.loss, dataset.organs, network.heads)
    Trainer(network, run.plans(), config.train, loss, batches, validate, out, config.beside_training).fit(resume)


def _validate(
    engine: Engine, *, store: CaseStore, cases: tuple[Case, ...], make_predictor: Callable[[Engine], Predictor]
) -> dict[str, float]:
    """Mean Dice of each organ over the cases where it is annotated, predicted by the engine (all ranks)."""

    def image(case: Case) -> Tensor:
        if not engine.reads_input:
            return torch.empty((1, *store.shape(case)), device="meta")
        pixels, _ = store.read(case, label=False)
        assert pixels is not None
        return pixels

    predictor = make_predictor(engine)
    own = cases[engine.replica :: engine.plan.data]  # replicas share the cases
    scores: dict[str, Tensor] = {}
    for case, logits in zip(own, predictor.predict_prepared(image(case) for case in own), strict=True):
        if logits is not None:
            _, label = store.read(case, image=False)
            assert label is not None
            scores[case.name] = dice_per_organ(logits, label, store.annotated(case))
    if engine.world_size > 1:
        every: list[dict[str, Tensor]] = [{}] * engine.world_size
        dist.all_gather_object(every, scores)
        scores = {name: score for of_rank in every for name, score in of_rank.items()}
    mean = torch.stack([scores[case.name].double() for case in cases]).nanmean(dim=0)
    return dict(zip(store.dataset.organs, mean.tolist(), strict=True))
