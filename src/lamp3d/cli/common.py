"""What all commands share: the application, how it speaks, and how it reads sizes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from lamp3d.errors import ConfigError
from lamp3d.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer(
    help="Large 3D segmentation networks on whole volumes, spread over devices automatically.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

PICTURES = (".png", ".pdf", ".svg")

Devices = Annotated[int, typer.Option(min=1, help="Worker processes, one a device.")]
DatasetFolder = Annotated[Path, typer.Argument(help="Folder in Decathlon or nnU-Net layout.")]


def stop(message: str, status: int = 2) -> NoReturn:
    """End the program with one message."""
    stderr = Console(stderr=True, highlight=False)
    # A worker that was killed leaves half a progress bar and a hidden cursor (nothing is written where no terminal is).
    stderr.control(Control(ControlType.SHOW_CURSOR, ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
    # As Text: brackets in a message are no markup. Unwrapped: a terminal breaks lines by itself, a log should not.
    stderr.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    sys.exit(status)


def say(message: str) -> None:
    """One line, whatever is in it, however long."""
    console.print(Text(message), soft_wrap=True)


def command(*words: object) -> str:
    """A command of lamp3d's to be pasted into a shell."""
    return shlex.join(["lamp3d", *map(str, words)])


def picture_option(of: str) -> Any:
    """An option for the file of a picture, which is looked at before the work that it shows is done."""

    def checked(path: Path | None) -> Path | None:
        if path is not None and path.suffix not in PICTURES:
            raise ConfigError(f"{path}: pictures are {', '.join(PICTURES)}.")
        return path

    return typer.Option(callback=checked, help=f"{of} Drawn here ({', '.join(PICTURES)}).")


def draw(figure: Figure, path: Path) -> None:
    """Leave a picture where `picture_option` allows it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format=path.suffix[1:]))


def sides(text: str) -> tuple[int, int, int]:
    """(D, H, W) from 64 or 352x256x288."""
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) == 1:
        sides *= 3
    if len(sides) != 3 or min(sides) < 1:
        raise ConfigError(f"{text!r} is not a volume; write one number of voxels or three, such as 64 or 352x256x288.")
    return sides[0], sides[1], sides[2]
