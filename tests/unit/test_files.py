"""Files are written all or nothing, for those whom the umask lets read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lamp3d.files import write_atomically, write_text


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read_what_is_written(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "for some")
        write_atomically(tmp_path / "tensors", lambda temporary: save_file({"a": torch.zeros(1)}, temporary))
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [mode, mode]


def test_what_goes_wrong_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_text(path, "before")

    def write(temporary: Path) -> None:
        temporary.write_text("half of")
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_atomically(path, write)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("text", "before")]
