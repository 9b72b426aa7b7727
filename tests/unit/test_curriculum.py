"""Settings of a training run: what is accepted, and the learning rate over a stage."""

import pytest
from pydantic import ValidationError

from lamp3d.data import AugmentConfig, PreprocessConfig
from lamp3d.train.curriculum import CurriculumStage, TrainConfig
from lamp3d.train.state import TrainingState


def stage(**settings: object) -> CurriculumStage:
    return CurriculumStage.model_validate({"patch": 64, "epochs": 10, "learning_rate": 0.01} | settings)


@pytest.mark.parametrize(
    ("given", "shape"), [(32, (32, 32, 32)), ([16, 32, 48], (16, 32, 48)), ((8, 8, 8), (8, 8, 8)), ("whole", None)]
)
def test_patch_is_a_cube_a_box_or_whole(given: object, shape: object) -> None:
    made = stage(patch=given)
    assert made.patch_shape == shape
    assert CurriculumStage.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    "wrong",
    [{"patch": 0}, {"patch": "half"}, {"patch": [1, 2]}, {"epochs": 0}, {"learning_rate": 0}, {"batchsize": 1}],
)
def test_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        stage(**wrong)


def test_an_empty_curriculum_is_refused() -> None:
    with pytest.raises(ValidationError, match="curriculum"):
        TrainConfig(curriculum=())


def test_constant_learning_rate() -> None:
    config = TrainConfig(curriculum=(stage(),))
    assert {config.learning_rate(0, k / 100) for k in range(1, 101)} == {0.01}


def test_cosine_rises_then_falls_in_every_stage() -> None:
    config = TrainConfig(curriculum=(stage(), stage(learning_rate=0.002)), lr_schedule="cosine")
    for index, full in enumerate([0.01, 0.002]):
        rates = [config.learning_rate(index, k / 1000) for k in range(1, 1001)]
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert max(rates) == pytest.approx(full)
        assert rates[0] == pytest.approx(full / 30)
        assert rates[-1] == pytest.approx(full / 100)


def test_poly_falls_with_the_power_of_what_is_left_of_a_stage() -> None:
    config = TrainConfig(curriculum=(stage(), stage(learning_rate=0.002)), lr_schedule="poly")
    for index, full in enumerate([0.01, 0.002]):
        rates = [config.learning_rate(index, k / 100) for k in range(1, 101)]
        assert rates == sorted(rates, reverse=True)
        assert rates[49] == pytest.approx(full * (0.01 + 0.99 * 0.5**0.9))
        assert rates[-1] == pytest.approx(full / 100)


def test_last_epoch_of_a_stage_is_always_validated() -> None:
    config = TrainConfig(curriculum=(stage(epochs=7),), validate_every=3)
    assert [epoch for epoch in range(7) if config.validates(0, epoch)] == [2, 5, 6]


def test_settings_that_changed_are_named_and_those_that_came_later_count_as_their_defaults() -> None:
    before, now = TrainConfig(curriculum=(stage(),)), TrainConfig(curriculum=(stage(),), seed=3)
    kept = before.model_dump(mode="json") | {"preprocess": {"margin_voxels": 2}}
    del kept["clip_norm"]
    state = TrainingState(settings=kept)
    others = {"preprocess": PreprocessConfig(margin_voxels=2, hu_offset=1024), "augment": AugmentConfig.off()}
    assert state.changed(before, {}) == []
    assert state.changed(now, others) == ["seed", "preprocess.hu_offset"]
