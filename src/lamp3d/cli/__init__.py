"""The command line: ``lamp3d``, and its commands."""

import signal
import sys
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import SignalException

from lamp3d.cli import data, planning, runs, study  # noqa: F401 (they declare the commands)
from lamp3d.cli.common import app, stop
from lamp3d.errors import LampError
from lamp3d.files import FULL
from lamp3d.parallel.lead import lead, under_torchrun


def main() -> None:
    """Run a command; an error that the user can put right is one message and exit status 2.

    Under ``torchrun`` the first rank runs it, and the others do their part.
    """
    try:
        if under_torchrun():
            lead(app)
        else:
            signal.signal(signal.SIGTERM, _raise)  # of its own it would leave half-written files
            app()
    except LampError as error:
        stop(str(error))
    except OSError as error:
        if error.filename is None and error.strerror not in FULL:
            raise  # else it is about a path, such as a file where --out wants a folder, or about where output goes
        stop(f"{error.filename or 'output'}: {error.strerror}.")
    except SignalException as error:  # as torch's launcher makes of SIGINT and SIGTERM too
        _stopped(error.sigval)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # what typer makes of Ctrl-C
            _stopped(signal.SIGINT)
        raise


def _raise(number: int, _: object) -> NoReturn:
    raise SignalException("stopped", signal.Signals(number))


def _stopped(number: int) -> NoReturn:
    goes_on = "; the run goes on with --resume" if sys.argv[1:2] == ["train"] else ""
    stop(f"stopped by {signal.Signals(number).name}{goes_on}.", 128 + number)
