"""Checkpoints and outputs at fsspec URLs: the bits of a merge of local files, and one line for whatever goes wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import tiny

import lors
from helpers import module
from lors.checkpoint import open_checkpoint
from lors.errors import LorsError
from lors.methods import SPECS
from lors.recipe import Recipe
from lors.remote import Store, cache, is_url, local_path
from lors.sweep import sweep
from lors.sweep_score import Score
from lors.task_vector import decompose

fsspec = module("fsspec", "remote")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.family(tmp_path_factory.mktemp("family"), ("ca", "de"))


@pytest.fixture
def bucket(family: dict[str, Path]) -> str:
    """The family in fsspec's memory; the URL."""
    fs = fsspec.filesystem("memory")
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)
    for name, path in family.items():
        fs.put(f"{path}/", f"/bucket/{name}/", recursive=True)
    return "memory://bucket"


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(LorsError) as caught:
        lors.merge(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(url: str) -> bytes:
    return bytes(fsspec.filesystem("memory").cat(f"{url.removeprefix('memory:/')}/model.safetensors"))


def test_a_merge_between_urls_has_the_bits_of_a_local_one(bucket: str, family: dict[str, Path], tmp_path: Path) -> None:
    experts = {name: f"{bucket}/{name}" for name in ("ca", "de")}
    report = lors.merge(f"{bucket}/base", experts, f"{bucket}/out", check=True)
    lors.merge(family["base"], {name: family[name] for name in experts}, tmp_path / "out")
    assert report.out == f"{bucket}/out" and any("checked" in notice for notice in report.notices)
    assert weights(f"{bucket}/out") == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert Store(f"{bucket}/out").listing().keys() == set(os.listdir(tmp_path / "out"))
    assert not list(cache().glob("out-*")) and not list(cache().glob("*.tmp"))


def test_what_is_there_is_replaced_only_by_force_and_completely(bucket: str, family: dict[str, Path]) -> None:
    lors.merge(family["base"], {"ca": family["ca"]}, f"{bucket}/out", out_shard_size="100KB")
    assert len(Store(f"{bucket}/out").listing()) > 6
    assert "exists already; --force replaces it" in refusal(family["base"], {"ca": family["ca"]}, f"{bucket}/out")
    lors.merge(family["base"], {"ca": family["ca"]}, f"{bucket}/out", force=True)
    names = set(Store(f"{bucket}/out").listing())
    assert "model.safetensors" in names and not [name for name in names if "-of-" in name or "index" in name]


def test_a_changed_file_is_fetched_again(bucket: str, family: dict[str, Path], tmp_path: Path) -> None:
    url = f"{bucket}/ca.lors.safetensors"
    decompose(f"{bucket}/base", f"{bucket}/ca", url, name="x")
    lors.merge(family["base"], {"x": url}, tmp_path / "first")
    assert "exists already" in str(pytest.raises(LorsError, decompose, f"{bucket}/base", f"{bucket}/de", url).value)
    decompose(f"{bucket}/base", f"{bucket}/de", url, name="x", force=True)
    lors.merge(family["base"], {"x": url}, tmp_path / "second")
    lors.merge(family["base"], {"x": url}, f"file://{tmp_path}/third")  # a local path: nothing is copied
    first, second, third = (
        open_checkpoint(tmp_path / n).sha256()["model.safetensors"] for n in ("first", "second", "third")
    )
    assert first != second == third


def test_a_failed_upload_leaves_nothing(bucket: str, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    put = MemoryFileSystem.put_file

    def broken(self: object, source: str, target: str, **options: object) -> None:
        if "safetensors" in target:
            raise PermissionError("quota\nexceeded")
        put(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", broken)
    assert "cannot be written: quota" in refusal(family["base"], {"ca": family["ca"]}, f"{bucket}/out")
    assert Store(f"{bucket}/out").listing() == {}


def test_refusals(bucket: str, family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_expert(url: str) -> str:
        return refusal(family["base"], {"ca": url}, tmp_path / "out")

    assert "memory://bucket/nowhere: there is no file at this URL" in with_expert("memory://bucket/nowhere")
    assert "cannot be opened: Protocol not known: nosuch" in with_expert("nosuch://a/b")
    fsspec.filesystem("memory").pipe("/bucket/text/notes.txt", b"text")
    assert "no weights there: expected model.safetensors" in with_expert(f"{bucket}/text")
    fsspec.filesystem("memory").pipe("/bucket/junk/model.safetensors", b"junk" * 100)
    assert "model.safetensors" in with_expert(f"{bucket}/junk")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert "pip install 'lors-merging[remote]'" in with_expert("s3://bucket/ca")
    assert os.listdir(tmp_path) == ["cache"]


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/x") and is_url("simplecache::s3://bucket/x") and is_url("file:///x")
    assert not is_url("org/model@main") and not is_url("C:/x") and not is_url("./a") and not is_url(Path("s3://b/x"))
    assert local_path("file:///a%20b") == "/a b" and local_path("a") == "a" and local_path("s3://a") is None


def test_a_sweep_at_a_url_goes_on_anywhere(bucket: str, family: dict[str, Path], tmp_path: Path) -> None:
    """The second run finds an empty machine: what it knows comes from the URL."""
    recipe = Recipe.from_arguments(f"{bucket}/base", {"ca": f"{bucket}/ca"}, "lors", methods=SPECS, rank=2)
    options = {"rank": "1,2", "lambda": "0.2,0.8"}
    scored = []

    def size(model: Path) -> Score:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(model.name)
        return Score("complete", (float(len(scored)),))

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, options, size, f"{bucket}/sweep")
    at = Store(f"{bucket}/sweep")
    assert {"sweep.json", "trials.jsonl"} <= at.listing().keys() and "trials.csv" not in at.listing()
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "elsewhere")
    done = sweep(recipe, options, lambda model: Score("complete", (9.0,)), f"{bucket}/sweep")
    assert sorted(trial.values[0] for trial in done.trials) == [1.0, 2.0, 9.0, 9.0]
    assert {"trials.csv", "trials.json", "best.yml", "index.html"} <= at.listing().keys()
    assert not list(cache().glob("sweep-*")), "what is complete at the URL is not kept here"
    with pytest.raises(LorsError, match="expected nothing there or a sweep"):
        sweep(recipe, options, size, f"{bucket}/base")
