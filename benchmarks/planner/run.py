"""The planner: predictions beside what is measured, how far it is from the best, and what it says of other devices.

    lamp3d bench planner [--rounds 3] [--only predictions optimality …]

`predictions` and `measured_best` time training steps on this machine, `one_gpu` on its GPU; the other parts only
compute. Writes results.json and pictures beside this file.
"""

from __future__ import annotations

from benchmarks.harness import Part, run_parts
from benchmarks.planner import one_gpu, optimality, predictions, setups
from lamp3d.plan.hardware import device_type


def main() -> None:
    """Run the parts that are asked for."""
    run_parts("planner", __doc__, PARTS, rounds=3)


PARTS: dict[str, Part] = {
    "predictions": predictions.measure,
    "measured_best": optimality.measure_best,
    "optimality": optimality.measure,
    "speed": optimality.measure_speed,
    **({"one_gpu": one_gpu.measure} if device_type() == "cuda" else {}),
    "setups": setups.measure,
    "scaling": setups.measure_scaling,
}


if __name__ == "__main__":
    from benchmarks.planner import run as module  # under its own name, by which workers import it

    module.main()
