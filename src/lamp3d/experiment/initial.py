"""The weights that a run begins with: those of another run, or of a model."""

from __future__ import annotations

from torch import Tensor

from lamp3d.errors import ConfigError
from lamp3d.experiment.export import find_model
from lamp3d.experiment.run import Run
from lamp3d.train import Checkpoint, network_tensors


def initial_weights(run: Run) -> dict[str, Tensor]:
    """Of the run's parameters and buffers those that do not begin afresh, by name; output layers for other organs do.

    Raises:
        ConfigError: there is no such model, its network is another one, or it has seen other channels.
    """
    if run.config.initial_weights is None:
        return {}
    source = Run.open(find_model(run.config.initial_weights))
    if len(run.channels) == len(source.channels) > 1 and run.channels != source.channels:
        raise ConfigError(
            f"{run.config.initial_weights} has seen the channels {', '.join(source.channels)}, and the scans have "
            f"{', '.join(run.channels)}: order or name them alike in dataset.json, or begin without initial_weights."
        )
    checkpoint = Checkpoint(source.best)
    fresh = set() if source.organs == run.organs else _output_layers(run)
    network = run.outline()
    checkpoint.check_network(network, apart_from=fresh)
    return checkpoint.read("model", [name for name in network_tensors(network) if name not in fresh])


def _output_layers(run: Run) -> set[str]:
    """What of the network would be larger with one organ more."""
    own, larger = network_tensors(run.outline()), network_tensors(run.outline(1))
    return {name for name, tensor in own.items() if tensor.shape != larger[name].shape}
