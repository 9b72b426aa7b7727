"""nnU-Net's raw layout, read as what the Decathlon's `dataset.json` would say.

``Dataset003_Liver/`` has ``imagesTr/CASE_0000.nii.gz`` (one file a channel), ``labelsTr/CASE.nii.gz`` and a
``dataset.json`` with ``channel_names``, ``labels`` (name to value), ``file_ending`` and ``numTraining``. Cases in
``imagesTs`` are the test split. Instead of by these names, files may be listed: ``dataset`` gives each case its
``images`` and ``label``, relative to the folder. Where there is a ``splits_final.json``, beside or in the preprocessed
folder, its first fold says which cases are for validation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lamp3d.errors import DatasetError
from lamp3d.scan import FIRST_CHANNEL, scan_files

SPLITS = "splits_final.json"
ENDINGS = (".nii.gz", ".nii")


def is_nnunet(content: dict[str, Any]) -> bool:
    """Whether a ``dataset.json`` is nnU-Net's (version 2)."""
    return "channel_names" in content


def as_decathlon(root: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What a ``dataset.json`` in Decathlon layout would say of the same folder.

    Args:
        root: the folder.
        content: of its ``dataset.json``.

    Raises:
        DatasetError: there are labels of regions or to be ignored, or other files than NIfTI; files are missing, or
            are of channels without a name; or there are not as many cases as ``numTraining`` says.
    """
    path = root / "dataset.json"
    channels, ending = content["channel_names"], content.get("file_ending")
    labels = content.get("labels", {})
    if not isinstance(channels, dict) or not isinstance(labels, dict):
        raise DatasetError(f'{path}: channel_names and labels should be mappings, such as {{"background": 0}}.')
    if ending is None:
        raise DatasetError(f'{path}: file_ending is missing; write there how the files end, "{ENDINGS[0]}".')
    if ending not in ENDINGS:
        raise DatasetError(f"{path}: file_ending {ending!r}; lamp3d reads {' and '.join(ENDINGS)}: convert the files.")
    training = (
        _listed(path, content["dataset"]) if "dataset" in content else _entries(root, "Tr", len(channels), ending)
    )
    if not training:
        raise DatasetError(f"{root / 'imagesTr'}: no files CASE{FIRST_CHANNEL}{ending}.")
    if (bare := [entry["name"] for entry in training if "label" not in entry]) != []:
        raise DatasetError(f"{root / 'labelsTr'}: no label map of {', '.join(bare)}; add {bare[0]}{ending}.")
    if content.get("numTraining", len(training)) != len(training):
        raise DatasetError(
            f"{path}: numTraining is {content['numTraining']}, but imagesTr has {len(training)} cases; "
            "is the dataset complete?"
        )
    tests = _entries(root, "Ts", len(channels), ending)
    found = {"name": content.get("name") or root.resolve().name, "labels": _labels(path, labels), "modality": channels}
    found |= {"training": training, "test": tests}
    if (splits := _first_fold(root, [entry["name"] for entry in training])) is not None:
        found["splits"] = splits | ({"test": [entry["name"] for entry in tests]} if tests else {})
    return found


def _listed(path: Path, cases: Any) -> list[dict[str, Any]]:
    entries = []
    for name, files in cases.items() if isinstance(cases, dict) else ():
        try:
            images, label = [str(image) for image in files["images"]], files["label"]
        except (KeyError, TypeError):
            raise DatasetError(
                f'{path}: dataset, {name}: {files!r}; it should be {{"images": [a path a channel], "label": a path}}.'
            ) from None
        entries.append({"name": str(name), "image": images, "label": str(label)})
    if not entries:
        raise DatasetError(f"{path}: dataset should map cases to their images and label.")
    return entries


def _entries(root: Path, of: str, channels: int, ending: str) -> list[dict[str, Any]]:
    entries = []
    for first in sorted((root / f"images{of}").glob(f"*{FIRST_CHANNEL}{ending}")):
        name = first.name.removesuffix(f"{FIRST_CHANNEL}{ending}")
        if name.startswith("."):
            continue  # what macOS leaves
        *images, beyond = (f"images{of}/{image.name}" for image in scan_files(first, channels + 1))
        if images and (root / beyond).exists():
            raise DatasetError(f"{root / beyond}: channel_names has {channels} channel(s), and not this one; add it.")
        entry: dict[str, Any] = {"name": name, "image": images}
        if (root / f"labels{of}" / f"{name}{ending}").exists():
            entry["label"] = f"labels{of}/{name}{ending}"
        entries.append(entry)
    return entries


def _labels(path: Path, labels: dict[str, Any]) -> dict[str, str]:
    if regions := [name for name, value in labels.items() if isinstance(value, list)]:
        raise DatasetError(
            f"{path}: {', '.join(regions)} are regions of several labels; lamp3d wants one label an organ."
        )
    if "ignore" in labels:
        raise DatasetError(
            f"{path}: has an ignore label; lamp3d leaves out whole organs of a case (`annotated` in Decathlon layout)."
        )
    if wrong := [value for value in labels.values() if not (isinstance(value, int | float) or str(value).isdigit())]:
        raise DatasetError(
            f"{path}: label value {wrong[0]!r} is no number; beside channel_names, labels are a number by its "
            'name, such as {"background": 0}: exchange them.'
        )
    if len(set(labels.values())) < len(labels):
        raise DatasetError(f"{path}: two of the labels {labels} have one value; give each its own.")
    return {str(value): name for name, value in labels.items()}


def _first_fold(root: Path, cases: list[str]) -> dict[str, list[str]] | None:
    folder = root.resolve()
    for path in (folder / SPLITS, folder.parent.parent / "nnUNet_preprocessed" / folder.name / SPLITS):
        if path.exists():
            try:
                fold = json.loads(path.read_text(encoding="utf-8"))[0]
                splits = {
                    "train": [str(name) for name in fold["train"]],
                    "validation": [str(name) for name in fold["val"]],
                }
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise DatasetError(f"{path}: not a list of folds with train and val ({error!r}); repair it.") from error
            if unknown := [name for names in splits.values() for name in names if name not in cases]:
                raise DatasetError(
                    f"{path}: the first fold has {', '.join(unknown)}, of which the dataset has no scan; add it, or "
                    "repair or remove the file."
                )
            return splits
    return None
