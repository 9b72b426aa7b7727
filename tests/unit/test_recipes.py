"""The recipes of the repository: the paper's own numbers, and that each of their stages can be trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_dataset import write_tiny_dataset

from lamp3d.data import Batches, CaseStore, read_dataset
from lamp3d.experiment import load_config
from lamp3d.train import HybridLoss
from lamp3d.train.optimizer import make_optimizer

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
HEAD = ("ParotidLeft", "ParotidRight", "BrainStem")
LIVER = ("Liver", "Tumour", "Spine")


@pytest.mark.parametrize("name", ["han", "liver"])
def test_the_papers_recipes_have_the_papers_numbers(name: str) -> None:
    """Paper §3: epochs and batches of the three input sizes, RMSProp with 1e-3."""
    train = load_config(EXPERIMENTS / "paper" / f"{name}.yaml").train
    stages = [(stage.patch, stage.batch, stage.epochs, stage.learning_rate) for stage in train.curriculum]
    assert stages == [((64,) * 3, 16, 4800, 1e-3), ((128,) * 3, 4, 1200, 1e-3), ("whole", 1, 300, 1e-3)]
    assert (train.optimizer, train.lr_schedule) == ("rmsprop", "constant")
    assert all(stage.positive_fraction == 1 for stage in train.curriculum)


@pytest.mark.parametrize(
    ("name", "filters", "shape"),
    [("han", 128, (352, 256, 288)), ("liver", 32, (512, 512, 704))],
)
def test_the_papers_largest_inputs_go_through_the_networks(
    name: str, filters: int, shape: tuple[int, int, int]
) -> None:
    config = load_config(EXPERIMENTS / "paper" / f"{name}.yaml", [f"network.filters={filters}"])
    with torch.device("meta"):
        logits = config.network.build(10)(torch.empty(1, 1, *shape))
    assert logits.shape == (1, 10, *shape)


@pytest.mark.parametrize(
    ("name", "organs", "override"),
    [
        ("paper/han", HEAD, "train.seed=1"),
        ("paper/liver", LIVER, "preprocess.spacing_mm=[2, 2, 2]"),
        ("strong", HEAD, "augment.paired_labels=[[ParotidLeft, ParotidRight]]"),
    ],
)
def test_a_recipe_trains_in_every_stage(tmp_path: Path, name: str, organs: tuple[str, ...], override: str) -> None:
    """Scaled down to a network of two filters and patches of 32³; one organ is missing in one case."""
    config = load_config(EXPERIMENTS / f"{name}.yaml", ["network.filters=2", override])
    labels = {"0": "background"} | {str(k): organ for k, organ in enumerate(organs, start=1)}
    written = write_tiny_dataset(tmp_path, cases=2, labels=labels)
    written["training"][1]["annotated"] = organs[:2]
    dataset = read_dataset(tmp_path)
    store = CaseStore(dataset, config.preprocess, tmp_path / "cache")
    store.prepare(dataset.cases, progress=False)
    torch.manual_seed(config.train.seed)
    network = config.network.build(dataset.n_classes)
    loss_fn = HybridLoss(config.loss.resolved_for([case.annotated for case in dataset.cases], organs), organs)
    optimizer = make_optimizer(dict(network.named_parameters()), config.train)
    for index, stage in enumerate(config.train.curriculum):
        patch = stage.patch_shape and tuple(min(side // 2, 32) for side in stage.patch_shape)
        epoch = Batches(
            store,
            dataset.cases,
            patch=patch,
            batch=min(stage.batch, 2),
            divisor=network.divisor,
            seed=[index],
            augment=config.augment,
            positive_fraction=stage.positive_fraction,
        )
        batch = epoch.read(0)
        images, truth = (whole[0] if isinstance(whole, list) else whole for whole in (batch.images, batch.labels))
        before = [parameter.clone() for parameter in network.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = config.train.learning_rate(index, 0.01)
        optimizer.zero_grad()
        loss = loss_fn(network(images), (truth, batch.annotated[: len(images)]))
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert all(parameter.isfinite().all() for parameter in network.parameters())
        assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))
