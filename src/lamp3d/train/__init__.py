"""Training: loss, curriculum, checkpoints, and the trainer that brings them together."""

from lamp3d.train.checkpoint import Checkpoint, copy_tensors, load_weights, network_tensors, save_checkpoint
from lamp3d.train.curriculum import CurriculumStage, TrainConfig
from lamp3d.train.history import EpochRecord, read_history
from lamp3d.train.loss import HybridLoss, LossConfig, with_drawn_targets
from lamp3d.train.state import resumable
from lamp3d.train.trainer import Trainer, time_line_path

__all__ = [
    "Checkpoint",
    "CurriculumStage",
    "EpochRecord",
    "HybridLoss",
    "LossConfig",
    "TrainConfig",
    "Trainer",
    "copy_tensors",
    "load_weights",
    "network_tensors",
    "read_history",
    "resumable",
    "save_checkpoint",
    "time_line_path",
    "with_drawn_targets",
]
