"""The planner: predictions beside what is measured, how far it is from the best, and what it says of other devices.

    lamp3d bench planner [--rounds 3] [--only predictions optimality …]

`predictions` and `measured_best` time training steps on this machine; the other parts only compute. Writes results.json
and pictures beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import keep
from benchmarks.planner import optimality, predictions, setups

HERE = Path(__file__).parent


def main() -> None:
    """Run the parts that are asked for, and keep what they find in results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    arguments = parser.parse_args()
    console = Console(width=150)
    for part in arguments.only:
        found = PARTS[part](arguments.rounds, console)
        keep(HERE / "results.json", part, f"lamp3d bench planner --rounds {arguments.rounds} --only {part}", found)


PARTS: dict[str, Callable[[int, Console], Any]] = {
    "predictions": predictions.measure,
    "measured_best": optimality.measure_best,
    "optimality": optimality.measure,
    "speed": optimality.measure_speed,
    "setups": setups.measure,
    "scaling": setups.measure_scaling,
}


if __name__ == "__main__":
    from benchmarks.planner import run as module  # under its own name, by which workers import it

    module.main()
