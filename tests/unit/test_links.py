"""What joins the devices: within a machine, and between machines."""

import json

import pytest
import torch

from lamp3d import UNet, make_plan
from lamp3d.errors import ConfigError
from lamp3d.plan import Plan
from lamp3d.plan.links import Link, Links, load_link

NEAR, FAR = load_link("nvlink4"), load_link("network100")
FOURS = Links(within=NEAR, across=FAR, per_machine=4)


def ways(links: Links, pipe: int) -> str:
    """From each rank of a pipeline to the next one: n within a machine, f between machines."""
    table = links.in_pipeline(pipe)
    assert all(table[a][b] == table[b][a] for a in range(pipe) for b in range(pipe))
    return "".join("f" if table[rank][rank + 1] == FAR else "n" for rank in range(pipe - 1))


def test_pipelines_stay_on_one_machine_where_they_can() -> None:
    assert ways(FOURS, 2) == "n"
    assert ways(FOURS, 4) == "nnn"
    assert ways(FOURS, 8) == "nnnfnnn"
    assert ways(FOURS, 3) == "ff"  # 0 1 2, 3 | 4 5, 6 7 | 8: some pipeline leaves a machine on either way
    assert ways(Links(within=NEAR), 8) == "nnnnnnn"


def test_slabs_are_as_far_apart_as_the_first_and_the_last() -> None:
    assert FOURS.among_slabs(4, 1) == NEAR
    assert FOURS.among_slabs(2, 2) == NEAR
    assert FOURS.among_slabs(8, 1) == FAR
    assert FOURS.among_slabs(2, 4) == FAR


def test_what_sums_at_the_same_time_shares_the_way_out_of_a_machine() -> None:
    size = 1e9
    alone = FOURS.sum_seconds(size, 2, 4)  # two machines, each with a pipeline of four, whose ranks sum at once
    assert alone == pytest.approx(4 * size / 11e9 + 2 * 30e-6)
    assert FOURS.sum_seconds(size, 8, 1) == pytest.approx(2 * 7 / 8 * size / 11e9 + 6 * 30e-6)
    assert FOURS.sum_seconds(size, 4, 1) == pytest.approx(2 * 3 / 4 * size / 450e9 + 4 * 10e-6)


def test_between_machines_nothing_is_faster_than_within_one() -> None:
    loopback = load_link("loopback")
    across = Links(within=loopback, across=FAR, per_machine=2).across
    assert across is not None
    assert (across.gbs, across.seconds, across.by_cores) == (loopback.gbs, loopback.seconds, True)
    assert across.title == FAR.title


def test_machines_get_replicas_where_the_way_between_them_is_slow() -> None:
    with torch.device("meta"):
        network = UNet(1, 4, filters=16)

    def plan(**links: str | int) -> Plan:
        return make_plan(network, (2, 1, 64, 64, 64), 8, hardware="h100-80g", **links)

    assert plan(link="nvlink4").links == Links(within=NEAR)
    near, far = plan(per_machine=8), plan(per_machine=4, across="10MB")
    assert near.links == Links(within=NEAR)
    assert far.data == 2
    assert far.step_seconds > near.step_seconds
    assert "on 2 machines (10MB a second)" in str(far.table().title)
    assert near.step_seconds <= plan(per_machine=4).step_seconds <= far.step_seconds
    assert Plan.model_validate_json(far.model_dump_json()) == far


def test_on_several_machines_torchrun_says_how_many_workers_each_has(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Conv3d(1, 1, 1)
    assert make_plan(network, (4, 1, 8, 8, 8), 4).links == Links(within=load_link("loopback"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    links = make_plan(network, (4, 1, 8, 8, 8), 4, across="1GB").links
    assert links is not None
    assert links.per_machine == 2
    assert links.across is not None
    assert links.across.gbs == 1


def test_plans_that_know_one_link_are_read() -> None:
    plan = make_plan(torch.nn.Conv3d(1, 1, 1), (1, 1, 8, 8, 8))
    saved = json.loads(plan.model_dump_json())
    del saved["links"]
    link = Link(title="a wire", gbs=1, seconds=0, source="a test")
    assert Plan.model_validate(saved | {"link": link.model_dump()}).links == Links(within=link)
    assert Plan.model_validate(saved | {"link": None}).links is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_machine": 0}, "at least one device"),
        ({"across": "string"}, "no link"),
        ({"across": "10GB", "per_machine": 4}, "4 devices on one machine of 4"),
    ],
)
def test_what_joins_nothing_is_refused(settings: dict[str, str | int], words: str) -> None:
    given = {"hardware": "v100-16g", "per_machine": 2} | settings
    with pytest.raises(ConfigError, match=words):
        make_plan(torch.nn.Conv3d(1, 1, 1), (4, 1, 8, 8, 8), 4, **given)
