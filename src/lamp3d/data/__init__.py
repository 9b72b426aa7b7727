"""Datasets, preprocessing, augmentation and patches: from scan files to mini-batches."""

from lamp3d.data.augment import AugmentConfig
from lamp3d.data.contours import UnusualContour, unseen_organs, unusual_contours
from lamp3d.data.dataset import Case, Dataset, SplitConfig, read_dataset
from lamp3d.data.patches import Batch, Batches
from lamp3d.data.phantom import make_phantom, write_phantom_dataset
from lamp3d.data.preprocess import PreparedScan, PreprocessConfig, prepare_scan
from lamp3d.data.store import CaseStore

__all__ = [
    "AugmentConfig",
    "Batch",
    "Batches",
    "Case",
    "CaseStore",
    "Dataset",
    "PreparedScan",
    "PreprocessConfig",
    "SplitConfig",
    "UnusualContour",
    "make_phantom",
    "prepare_scan",
    "read_dataset",
    "unseen_organs",
    "unusual_contours",
    "write_phantom_dataset",
]
