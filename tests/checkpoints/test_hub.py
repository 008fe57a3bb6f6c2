"""Hub ids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from weights import sha256, whisper, write


def test_hub_ids_offline(tmp_path: Path) -> None:
    """A real hub cache, without a network: what is in it opens, what is not is one line."""
    commit = "1" * 40
    repository = tmp_path / "hub" / "models--org--whisper"
    snapshot = write(repository / "snapshots" / commit, whisper(), {"model_type": "whisper"})
    (repository / "blobs").mkdir()
    blob = repository / "blobs" / sha256(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = f"""
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
for source in ("org/whisper", "org/whisper@{commit}"):
    with open_checkpoint(source) as checkpoint:
        assert (checkpoint.hub_id, checkpoint.name, checkpoint.naming) == ("org/whisper", source, "hf-whisper")
        assert checkpoint.sha256() == {{"model.safetensors": {blob.name!r}}}
for source in ("org/other", "org/whisper@v2"):
    try:
        open_checkpoint(source)
    except LorsError as error:
        assert str(error).startswith(source) and "cannot be reached" in str(error), error
    else:
        raise AssertionError(source)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
