"""Experiments as a whole: configuration, run folder, training, prediction and evaluation."""

from lamp3d.experiment.config import ExperimentConfig, NetworkConfig, load_config
from lamp3d.experiment.export import export, find_model
from lamp3d.experiment.inference import predict
from lamp3d.experiment.planning import Forecast, forecast
from lamp3d.experiment.run import Run
from lamp3d.experiment.scoring import evaluate
from lamp3d.experiment.training import train
from lamp3d.experiment.verify import verify

__all__ = [
    "ExperimentConfig",
    "Forecast",
    "NetworkConfig",
    "Run",
    "evaluate",
    "export",
    "find_model",
    "forecast",
    "load_config",
    "predict",
    "train",
    "verify",
]
