"""``lamp3d plan`` and ``lamp3d verify``."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import torch
import typer
from rich.table import Table
from torch import nn

from lamp3d.cli.common import Devices, app, console, draw, picture_option, say, sides, stop
from lamp3d.errors import ConfigError
from lamp3d.experiment import NetworkConfig, load_config, verify
from lamp3d.files import write_text
from lamp3d.nets import Network, hollow, made_by
from lamp3d.plan import SCHEDULES, Plan, Planning, find_plans, format_bytes, parse_bytes
from lamp3d.plan.hardware import known_hardware
from lamp3d.report import cells_picture, time_line_picture
from lamp3d.sides import check_sides
from lamp3d.train import HybridLoss, LossConfig, with_drawn_targets

OWN = ("unet", "seunet")
USUAL_CLASSES = 10
SAID_BY_PLANS = ("volume", "batch", "devices", "micro_batches", "schedule", "data", "pipe", "space", "recompute")
VERIFY_TOLERANCES = {"float64": 1e-10, "float32": 1e-5}

MORE_ROUNDING = 10
"""Times what one device rounds in float32, several may round: other kernels, and sums in another order."""

Net = Annotated[
    str,
    typer.Option(
        help="unet, seunet, package.module:function that gives a network, or a configuration (.yaml) with one."
    ),
]
Filters = Annotated[Optional[int], typer.Option(min=1, help="Channels of the first block; default: 32, to verify 4.")]  # noqa: UP045
Classes = Annotated[Optional[int], typer.Option(min=2, help="Organs and background; default: 10.")]  # noqa: UP045
Channels = Annotated[int, typer.Option(min=1, help="Of the images: 1 for CT.")]
StemStride = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, max=2, help="1: full resolution, the default; 2: half."),
]
VolumeOption = Annotated[str, typer.Option(help="Voxels, such as 64 or 352x256x288.")]
Batch = Annotated[int, typer.Option(min=1, help="Cases a step.")]
Memory = Annotated[Optional[str], typer.Option(help="Limit per device, such as 16GB; default: what it has.")]  # noqa: UP045
MicroBatches = Annotated[Optional[int], typer.Option(min=1, help="Default: what is fastest.")]  # noqa: UP045
ScheduleOption = Annotated[Optional[str], typer.Option(help=f"One of {', '.join(SCHEDULES)}.")]  # noqa: UP045
Data = Annotated[Optional[int], typer.Option(min=1, help="Replicas, each with a share of the batch.")]  # noqa: UP045
Pipe = Annotated[Optional[int], typer.Option(min=1, help="Devices of one pipeline.")]  # noqa: UP045
Space = Annotated[Optional[str], typer.Option(help="Slabs that every volume is cut into, such as 2 or 2x2.")]  # noqa: UP045
RecomputeOption = Annotated[Optional[str], typer.Option(help="never, always; default: as little as fits.")]  # noqa: UP045
HardwareOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help=f"Devices that are not here: {', '.join(known_hardware())}, or a YAML file like theirs."),
]
LinkOption = Annotated[Optional[str], typer.Option(help="What joins those of a machine: pcie4, nvlink3, 10GB, …")]  # noqa: UP045
AcrossOption = Annotated[Optional[str], typer.Option(help="What joins machines: network100, network400, 10GB, …")]  # noqa: UP045
PerMachine = Annotated[Optional[int], typer.Option(min=1, help="Devices of a machine; of those described: 8.")]  # noqa: UP045


@app.command()
def plan(
    net: Net = "unet",
    filters: Filters = None,
    classes: Classes = None,
    channels: Channels = 1,
    stem_stride: StemStride = None,
    volume: VolumeOption = "64",
    batch: Batch = 1,
    devices: Devices = 1,
    memory: Memory = None,
    hardware: HardwareOption = None,
    link: LinkOption = None,
    across: AcrossOption = None,
    per_machine: PerMachine = None,
    micro_batches: MicroBatches = None,
    schedule: ScheduleOption = None,
    data: Data = None,
    pipe: Pipe = None,
    space: Space = None,
    recompute: RecomputeOption = None,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="auto: what is faster and fits.")] = "auto",
    fresh: Annotated[bool, typer.Option(help="Time the cells even if that was done before.")] = False,
    json_path: Annotated[Optional[Path], typer.Option("--json", help="Write the plan here.")] = None,  # noqa: UP045
    picture: Annotated[Optional[Path], picture_option("Cells and the time line of a step.")] = None,  # noqa: UP045
) -> None:
    """Does it fit, how is it split, what does it cost? Every way to use the devices is considered.

    Seconds are those of a training step without the optimizer's; on this machine with the loss, but for networks of
    your own (package.module:function), whose loss is not known.
    """
    limit = None if memory is None else parse_bytes(memory)  # before the profiling, which takes a while
    make, shape = _network(net, filters, classes, channels, stem_stride, volume)
    loss = None
    if hardware is None:
        network = make()
        if isinstance(network, Network) and ":" not in net:  # whose logits are what lamp3d's loss takes, and how many
            organs = [str(label) for label in range(1, classes or USUAL_CLASSES)]
            loss = with_drawn_targets(HybridLoss(LossConfig(), organs, network.heads))
    else:
        network = hollow(make)
    found = _find_plans(
        network, (batch, channels, *shape), devices, recompute, micro_batches=micro_batches, schedule=schedule,
        data=data, pipe=pipe, space=_slabs(space), precision=precision, memory=limit, hardware=hardware, link=link,
        across=across, per_machine=per_machine, fresh=fresh, loss=loss,
    )  # fmt: skip
    console.print(found.plan.table())
    console.print(found.alternatives())
    if json_path is not None:
        found.plan.save(json_path)
        say(f"Plan: {json_path}")
    if picture is not None:
        draw(cells_picture(found), picture)
        say(f"Picture: {picture}")


@app.command("verify")
def verify_command(
    context: typer.Context,
    net: Net = "unet",
    filters: Filters = None,
    classes: Classes = None,
    channels: Channels = 1,
    stem_stride: StemStride = None,
    volume: VolumeOption = "32",
    batch: Batch = 4,
    devices: Devices = 2,
    micro_batches: MicroBatches = None,
    schedule: ScheduleOption = None,
    data: Data = None,
    pipe: Pipe = None,
    space: Space = None,
    recompute: RecomputeOption = None,
    plan_path: Annotated[Optional[Path], typer.Option("--plan", help="A plan in JSON to check instead.")] = None,  # noqa: UP045
    dtype: Annotated[Literal["float64", "float32"], typer.Option(help="In which to compute.")] = "float64",
    timeline: Annotated[Optional[Path], picture_option("Predicted and measured time lines.")] = None,  # noqa: UP045
) -> None:
    """One step on one device and on the plan's: prints how far output, loss and gradients are apart."""
    if plan_path is not None:
        _refuse_what_the_plan_says(context, plan_path)
        found = Plan.load(plan_path)
        volume = "x".join(map(str, found.image_shape[-3:]))
    make, shape = _network(net, filters, classes, channels, stem_stride, volume, 4)
    if plan_path is None:
        found = _find_plans(
            make(), (batch, channels, *shape), devices, recompute, micro_batches=micro_batches, schedule=schedule,
            data=data, pipe=pipe, space=_slabs(space), precision="fp32",
        ).plan  # fmt: skip
    console.print(found.table())
    if found.precision != "fp32":
        say(f"{found.precision} rounds too coarsely to compare: everything else of the plan is checked, in {dtype}.")
    reports = verify(make, found, dtype)
    apart = _largest([report.differences for report in reports])
    rounding = _largest([report.rounding for report in reports])
    table = Table(title=f"One device against {found.devices}, in {dtype}")
    table.add_column("largest relative difference of")
    for column in ("", "one device") if dtype == "float32" else ("",):
        table.add_column(column, justify="right")
    table.add_column("parameter")
    for what, (difference, where) in apart.items():
        one_device = [f"{rounding[what][0]:.1e}"] if dtype == "float32" else []
        table.add_row(what, f"{difference:.1e}", *one_device, where)
    console.print(table)
    for rank, report in enumerate(reports):
        sent, peak = format_bytes(report.bytes_sent), format_bytes(report.peak_bytes)
        say(f"device {rank}: {sent} sent in a step beside parameters' gradients, peak memory of its process {peak}")
    if timeline is not None:
        lines = {"predicted": found.time_line(), "measured": reports[0].line}
        draw(time_line_picture(lines), timeline)
        trace = timeline.with_suffix(".json")
        write_text(trace, json.dumps(reports[0].line.chrome_trace()))
        say(f"Time lines: {timeline}; for chrome://tracing: {trace}")
    limits = {what: max(VERIFY_TOLERANCES[dtype], MORE_ROUNDING * rounding[what][0]) for what in apart}
    beyond = [f"{what} beyond {limit:.0e}" for what, limit in limits.items() if not apart[what][0] <= limit]
    if beyond:
        stop(f"too far apart: {', '.join(beyond)}.", 1)
    say(f"All within {max(limits.values()):.0e}.")


def _refuse_what_the_plan_says(context: typer.Context, plan_path: Path) -> None:
    sources = {name: context.get_parameter_source(name) for name in SAID_BY_PLANS}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{plan_path} says that itself: leave out {options}.")


def _largest(differences: list[dict[str, float]]) -> dict[str, tuple[float, str]]:
    """Of output, loss and gradients the largest, and of the gradients, whose it is."""
    everything = [(name, value) for of_rank in differences for name, value in of_rank.items()]
    largest = {what: (max(value for name, value in everything if name == what), "") for what in ("output", "loss")}
    worst = max((value, name) for name, value in everything if name not in largest)
    return largest | {"gradients": worst}


def _network(
    net: str,
    filters: int | None,
    classes: int | None,
    channels: int,
    stem_stride: int | None,
    volume: str,
    usual_filters: int = 32,
) -> tuple[Callable[[], nn.Module], tuple[int, int, int]]:
    """A function that makes the network, with its weights seeded, and the volume's sides."""
    torch.manual_seed(0)
    shape = sides(volume)
    if net not in OWN and (filters, stem_stride) != (None, None):
        raise ConfigError(f"--net {net} says itself how it is built: leave out --filters and --stem-stride.")
    if net.endswith((".yaml", ".yml")):
        settings = load_config(Path(net)).network
    elif ":" in net:
        if classes is not None:
            raise ConfigError(f"--net {net} says itself how many classes it has: leave out --classes.")
        return partial(made_by, net), shape
    elif net in OWN:
        how = {"kind": net, "filters": filters or usual_filters, "stem_stride": stem_stride or 1}
        settings = NetworkConfig.model_validate(how)
    else:
        raise ConfigError(
            f"no network {net!r}: {', '.join(OWN)}, package.module:function, or a configuration (.yaml), which may "
            "name one of MONAI's."
        )
    classes = classes or USUAL_CLASSES
    check_sides("a volume", shape, settings.outline(classes, channels).divisor)
    return partial(settings.build, classes, channels), shape


def _slabs(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    numbers = text.lower().split("x")
    if not all(number.isdigit() and int(number) for number in numbers):
        raise ConfigError(f"{text!r} is no number of slabs; write it like 2, or 2x2 for two axes.")
    return tuple(int(number) for number in numbers)


def _find_plans(
    network: nn.Module, shape: tuple[int, ...], devices: int, recompute: str | None, **settings: Any
) -> Planning:
    if recompute not in (None, "never", "always"):
        raise ConfigError(f"--recompute {recompute!r} is neither never nor always.")
    with console.status("Profiling the network's cells, and trying plans"):
        return find_plans(network, shape, devices, recompute=recompute, **settings)
