"""The plans of a training run's stages, and what the run will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lamp3d.data import Batches, Case, CaseStore, read_dataset
from lamp3d.errors import ConfigError, PlanError
from lamp3d.experiment.config import ExperimentConfig
from lamp3d.experiment.run import Run, cache_folder
from lamp3d.graph import trace
from lamp3d.nets import Network, UShape
from lamp3d.plan import Plan, make_plan
from lamp3d.plan.allowance import cpu_cores
from lamp3d.sides import Shape3, largest_padded
from lamp3d.train import CurriculumStage, HybridLoss, with_drawn_targets

Show = Callable[[int, CurriculumStage, Plan], object]
"""Called with every stage's number (from 0), the stage and its plan, once that is known."""


@dataclass(frozen=True)
class Forecast:
    """What a curriculum stage will take.

    Attributes:
        plan: how its steps are done.
        steps: of all its epochs.
        volume_share: voxels of a mini-batch, on average, over those that the plan is made for: the largest volume's.
        voxels: that the network sees in them, without what whole volumes are padded with.
    """

    plan: Plan
    steps: int
    volume_share: float
    voxels: int

    @property
    def seconds(self) -> float:
        """Of all steps, as predicted; without validation, and without what augmentation does not hide."""
        return self.steps * self.volume_share * self.plan.step_seconds


def forecast(dataset_root: Path, config: ExperimentConfig, devices: int) -> list[Forecast]:
    """What every stage of a training run would take on this machine; scans are prepared, nothing is trained.

    Args:
        dataset_root: folder of the dataset.
        config: the experiment.
        devices: worker processes.

    Raises:
        LampError: as `train` would.
    """
    dataset = read_dataset(dataset_root, config.split)
    cases = dataset.split("train")
    store = CaseStore(dataset, config.preprocess, cache_folder(config))
    run = Run(Path(), config, dataset.root.resolve(), dataset.organs, dataset.channels)
    plans = plan_stages(run, store, cases, cases, devices, kept={})
    divisor, found = run.outline().divisor, []
    for index, stage in enumerate(config.train.curriculum):
        batches = stage_batches(config, index, store, cases, divisor)
        share = batches.share_of(plans[index].image_shape)
        found.append(Forecast(plans[index], stage.epochs * len(batches), share, voxels_seen(stage, store, cases)))
    return found


def stage_batches(
    config: ExperimentConfig, index: int, store: CaseStore, cases: tuple[Case, ...], divisor: int, epoch: int = 0
) -> Batches:
    """The mini-batches of an epoch of a stage.

    Args:
        config: the experiment.
        index: of the stage.
        store: where the cases are prepared, before any is read.
        cases: that are trained on.
        divisor: what the network needs shapes to be multiples of.
        epoch: of the stage, from 0.

    Raises:
        ConfigError: the patch is no multiple of the divisor, or flips would mix up left and right.
    """
    stage = config.train.curriculum[index]
    return Batches(
        store,
        cases,
        patch=stage.patch_shape,
        batch=stage.batch,
        divisor=divisor,
        seed=(config.train.seed, index, epoch),
        augment=config.augment,
        patches_per_case=stage.patches_per_case,
        positive_fraction=stage.positive_fraction,
    )


def voxels_seen(stage: CurriculumStage, store: CaseStore, cases: tuple[Case, ...]) -> int:
    """The voxels of all samples of all epochs of a stage; whole volumes as they are prepared."""
    of_case = [math.prod(stage.patch_shape or store.shape(case)) for case in cases]
    return stage.epochs * stage.patches_per_case * sum(of_case)


def plan_stages(
    run: Run,
    store: CaseStore,
    train_cases: tuple[Case, ...],
    all_cases: tuple[Case, ...],
    devices: int,
    *,
    kept: Mapping[int, Plan],
    show: Show | None = None,
) -> dict[int, Plan]:
    """The plan of every stage; a plan that does not fit is found out before the scans are prepared, where it can be.

    Args:
        run: whose configuration it is.
        store: where scans are prepared.
        train_cases: that are trained on.
        all_cases: that are prepared.
        devices: worker processes.
        kept: plans that are not made anew.
        show: told of every plan.
    """
    config, divisor = run.config, run.outline().divisor
    for index in range(len(config.train.curriculum)):  # what mixes up left and right is refused before it is timed
        with _of_stage(index):
            stage_batches(config, index, store, train_cases, divisor)
    plans: dict[int, Plan] = {}
    for reads_scans in (False, True):
        if reads_scans:
            store.prepare(all_cases, workers=cpu_cores())
        for index, stage in enumerate(config.train.curriculum):
            if (stage.patch_shape is None) == reads_scans:
                with _of_stage(index):
                    plan = kept.get(index) or stage_plan(run, index, store, train_cases, devices, memory=config.memory)
                plans[index] = plan
                if show is not None:
                    show(index, stage, plan)
    return plans


def stage_plan(
    run: Run, index: int, store: CaseStore, cases: tuple[Case, ...], devices: int, *, memory: str | int | None
) -> Plan:
    """The plan of one stage.

    Args:
        run: whose configuration it is.
        index: of the stage.
        store: where the scans of a whole-volume stage are prepared already.
        cases: that are trained on.
        devices: worker processes.
        memory: limit per device.

    Raises:
        PlanError: none fits, or the network is another one for volumes of other sizes and would have to be divided.
        ConfigError: the network does not take such volumes.
    """
    stage = run.config.train.curriculum[index]
    torch.manual_seed(run.config.train.seed)
    network = run.network()
    loss = run.config.loss.model_copy(update={"class_weights": {}})  # they change no seconds
    shape = (stage.batch, store.channels, *_largest_input(stage, store, cases, network.divisor))
    if isinstance(network, UShape):  # whose own words say what would do
        network.check_input(shape)
    make = partial(
        make_plan,
        network,
        shape,
        devices,
        data=stage.data,
        space=stage.space,
        # Whole volumes have shapes of their own, so that each is a micro-batch.
        micro_batches=stage.batch if stage.patch_shape is None else stage.micro_batches,
        schedule=stage.schedule,
        recompute=stage.recompute,
        precision=run.config.train.precision,
        memory=memory,
        across=run.config.across,
        optimizer_copies=run.config.train.optimizer_copies,
        loss=with_drawn_targets(HybridLoss(loss, run.organs, network.heads)),
    )
    plan = make()
    if plan.is_for_any_cells or not is_another_when_validated(network, plan.image_shape):
        return plan
    try:
        plan = make(pipe=1)
        return plan if plan.is_for_any_cells else make(pipe=1, recompute="always")
    except PlanError as error:
        raise PlanError(
            f"{run.config.network.name or run.config.network.kind} is another network in validation (in evaluation "
            "mode, or for volumes of other sizes), so that it cannot be divided among devices. Take --devices 1, or a "
            f"batch of {devices} or a multiple of that for this stage. ({error})"
        ) from error


@contextmanager
def _of_stage(index: int) -> Iterator[None]:
    """What is wrong with one stage of several is told as such."""
    try:
        yield
    except (ConfigError, PlanError) as error:
        raise type(error)(f"stage {index + 1}: {error}") from error


def is_another_when_validated(network: Network, shape: Sequence[int]) -> bool:
    """Whether a network's cells depend on its mode or the volume's size: a division into stages holds for one alone.

    Args:
        network: in training mode.
        shape: (B, C, D, H, W) that it takes.
    """
    graph = trace(network, shape)
    shapes = [tuple(shape)]
    if graph.reads_shape:
        batch, channels, *sides = shape
        shapes.append((batch, channels, *(2 * side for side in sides)))
    network.eval()
    try:
        return not all(trace(network, of).is_divided_like(graph) for of in shapes)
    except ConfigError:
        return False  # it takes one size, with which all has to be done
    finally:
        network.train()


def _largest_input(stage: CurriculumStage, store: CaseStore, cases: tuple[Case, ...], divisor: int) -> Shape3:
    if stage.patch_shape is not None:
        return stage.patch_shape
    return largest_padded((store.shape(case) for case in cases), divisor)
