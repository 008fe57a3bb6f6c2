"""Files beside the weights that are links: they are copied into what is published, so they may not lead anywhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import lors
import tiny
from lors.errors import LorsError
from lors.merging.on_disk import dry_run
from lors.methods import SPECS
from lors.recipes.recipe import Recipe


@pytest.mark.parametrize("name", ["merges.txt", "config.json", "README.md"])
def test_side_files_that_lead_out_are_not_followed(tmp_path: Path, name: str) -> None:
    """A checkpoint from somebody else could have any file of this machine copied into what is published."""
    base, ca = tiny.family(tmp_path, ("ca",)).values()
    (tmp_path / "private").write_text('{"model_type": "whisper", "key": "my secret"}')
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "private")
    with pytest.raises(LorsError, match=f"{name}: is a link to .*private, outside"):
        lors.merge(base, {"ca": ca}, tmp_path / "out", rank=1)
    with pytest.raises(LorsError, match=f"{name}: is a link"):
        dry_run(Recipe.from_arguments(base, {"ca": ca}, methods=SPECS, rank=1), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "ca", "private"]
    if name == "README.md":  # an expert's is not looked at
        lors.merge(ca, {"base": base}, tmp_path / "out", rank=1)
        assert b"secret" not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
        return
    with pytest.raises(LorsError, match=f"{name}: is a link"):  # an expert has what the base lacks
        lors.merge(ca, {"base": base}, tmp_path / "out", rank=1)
    assert sorted(os.listdir(tmp_path)) == ["base", "ca", "private"]


def test_links_that_stay_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, ca = tiny.family(tmp_path, ("ca",)).values()
    (base / "shared").mkdir()
    (base / "shared" / "vocab").write_text("{}")
    (base / "vocab.json").symlink_to("shared/vocab")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    blobs = tmp_path / "hub" / "models--org--base" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "1234").write_text("from the hub")
    (base / "merges.txt").symlink_to(blobs / "1234")  # as `hf download --local-dir` made them
    lors.merge(base, {"ca": ca}, tmp_path / "out", rank=1)
    assert (tmp_path / "out" / "merges.txt").read_text() == "from the hub"
    assert not (tmp_path / "out" / "vocab.json").is_symlink()
    # a hub cache somewhere else is told by its layout, which nobody can imitate with one more link
    snapshot = tmp_path / "other" / "models--org--base" / "snapshots" / "1"
    shutil.copytree(ca, snapshot)
    (snapshot / "merges.txt").symlink_to("../../blobs/1234")
    shutil.copytree(blobs, snapshot.parent.parent / "blobs")
    lors.merge(snapshot, {"ca": ca}, tmp_path / "out2", rank=1)
    shutil.rmtree(snapshot.parent.parent / "blobs")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "1234").write_text("my secret")
    (snapshot.parent.parent / "blobs").symlink_to(tmp_path / "private")
    with pytest.raises(LorsError, match="merges.txt: is a link"):
        lors.merge(snapshot, {"ca": ca}, tmp_path / "out3", rank=1)
