"""Checkpoints and outputs at fsspec URLs: the bits of a merge of local files, and one line for whatever goes wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import lors
import tiny
from helpers import module
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from lors.experts.decompose import decompose
from lors.files.remote import Store, cache, is_url, local_path
from lors.methods import SPECS
from lors.public import public, public_text, secrets_of
from lors.recipes.recipe import Recipe
from lors.sweep.run import sweep
from lors.sweep.score import Score

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


def test_force_at_a_url_removes_nothing_foreign(bucket: str, family: dict[str, Path]) -> None:
    memory = fsspec.filesystem("memory")
    lors.merge(family["base"], {"ca": family["ca"]}, f"{bucket}/out")
    for name in ("thesis.tex", "eval/answers.txt"):
        memory.pipe(f"/bucket/out/{name}", b"years of work")
        before = memory.find("/bucket/out")
        said = refusal(family["base"], {"de": family["de"]}, f"{bucket}/out", force=True)
        assert f"{bucket}/out: --force replaces only a checkpoint" in said and name.partition("/")[0] in said
        assert memory.find("/bucket/out") == before and memory.cat(f"/bucket/out/{name}") == b"years of work"
        memory.rm(f"/bucket/out/{name.partition('/')[0]}", recursive=True)
    memory.pipe("/bucket/file", b"mine")
    assert "expected a directory to write, it is a file" in refusal(
        family["base"], {"ca": family["ca"]}, f"{bucket}/file", force=True
    )


def test_a_file_at_a_url_is_replaced_only_by_its_kind(bucket: str, family: dict[str, Path]) -> None:
    fsspec.filesystem("memory").pipe("/bucket/thesis.tex", b"years of work")
    for out, said in (
        (f"{bucket}/thesis.tex", "only an expert file may be replaced"),
        (f"{bucket}/de", "expected a file to write, it is a directory"),
    ):
        with pytest.raises(LorsError, match=said):
            decompose(family["base"], family["ca"], out, force=True)
    assert fsspec.filesystem("memory").cat("/bucket/thesis.tex") == b"years of work"


def test_what_comes_to_a_url_meanwhile_stays(
    bucket: str, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lors.merging import on_disk

    accompany, memory = on_disk.accompany, fsspec.filesystem("memory")

    def late(*arguments: object) -> None:
        accompany(*arguments)  # type: ignore[arg-type]
        memory.pipe("/bucket/out/config.json", b"another's")

    monkeypatch.setattr(on_disk, "accompany", late)
    assert "exists already" in refusal(family["base"], {"ca": family["ca"]}, f"{bucket}/out")
    assert memory.find("/bucket/out") == ["/bucket/out/config.json"]


@pytest.mark.parametrize("out", ["{}/base", "{}/base/", "memory:///bucket/ca", "{}/x/../base", "simplecache::{}/base"])
def test_the_output_is_no_input_url(bucket: str, out: str) -> None:
    out = out.format(bucket)
    said = refusal(f"{bucket}/base", {"ca": f"{bucket}/ca"}, out, force=True)
    assert "the output would replace the input" in said
    assert "must not be inside the input" in refusal(f"{bucket}/base", {"ca": f"{bucket}/ca"}, f"{out}/new")
    assert "would replace the input" in refusal(f"{bucket}/base", {"ca": f"{bucket}/ca"}, bucket, force=True)
    with pytest.raises(LorsError, match="would replace the input"):
        decompose(f"{bucket}/base/model.safetensors", f"{bucket}/ca", f"{bucket}/base/model.safetensors", force=True)
    assert weights(f"{bucket}/base") and weights(f"{bucket}/ca")


def test_an_interrupted_upload_leaves_nothing(
    bucket: str, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    put = MemoryFileSystem.put_file

    def interrupted(self: object, source: str, target: str, **options: object) -> None:
        if "safetensors" in target:
            raise KeyboardInterrupt
        put(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lors.merge(family["base"], {"ca": family["ca"]}, f"{bucket}/out")
    assert Store(f"{bucket}/out").listing() == {} and not list(cache().glob("out-*"))


def test_local_urls_are_paths(family: dict[str, Path], tmp_path: Path) -> None:
    """However a local path is written, it is guarded as one."""
    root = shutil.copytree(family["base"].parent, tmp_path / "models")
    for form in ("file://{}", "local://{}", "FILE://{}", "file://localhost{}"):
        said = refusal(root / "base", {"ca": form.format(root / "ca")}, form.format(root / "base"), force=True)
        assert "would replace the input" in said
    said = refusal(root / "base", {"ca": root / "ca"}, f"simplecache::file://{root / 'base'}", force=True)
    assert "would replace the input" in said


def test_a_sweep_at_a_url_wants_an_empty_place(bucket: str, family: dict[str, Path]) -> None:
    """Its end removes what it shared there, and nothing else."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/mine/cache/photo.jpg", b"mine")
    recipe = Recipe.from_arguments(family["base"], {"ca": family["ca"]}, "lors", methods=SPECS, rank=2)
    with pytest.raises(LorsError, match="expected nothing there or a sweep"):
        sweep(recipe, {"rank": "1,2"}, lambda model: Score("complete", (1.0,)), f"{bucket}/mine")
    sweep(recipe, {"rank": "1,2"}, lambda model: Score("complete", (1.0,)), f"{bucket}/sweep")
    memory.pipe("/bucket/sweep/cache/photo.jpg", b"mine")
    sweep(recipe, {"rank": "1,2"}, lambda model: Score("complete", (1.0,)), f"{bucket}/sweep")
    assert memory.cat("/bucket/sweep/cache/photo.jpg") == memory.cat("/bucket/mine/cache/photo.jpg") == b"mine"


class Server(ThreadingHTTPServer):
    """Serves a directory; says of a file what `headers` has, or forbids it."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.headers, self.status, self.gets = root, dict[str, str](), 200, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        content = (self.server.root / self.path.partition("?")[0].lstrip("/")).read_bytes()
        self.server.gets += self.command == "GET"
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(family: dict[str, Path]) -> Iterator[Server]:
    module("aiohttp", "remote")
    running = Server(family["base"].parent)
    yield running
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("header", ["Last-Modified", "ETag", "Content-MD5", None])
def test_a_file_that_changed_on_a_web_server_is_fetched_again(
    server: Server, family: dict[str, Path], tmp_path: Path, header: str | None
) -> None:
    """By whatever the server tells of it; when it tells nothing, always."""
    server.root = shutil.copytree(family["base"].parent, tmp_path / "served")
    url = f"http://127.0.0.1:{server.server_port}/ca/model.safetensors"
    code = (
        "import sys; from lors.checkpoints.reader import open_checkpoint; print(open_checkpoint(sys.argv[1]).sha256())"
    )

    def fetched() -> str:
        done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=True)
        return done.stdout

    if header:
        server.headers = {header: "Mon, 01 Jan 2024 00:00:00 GMT"}
    first, gets = fetched(), server.gets
    assert fetched() == first
    assert server.gets == 2 * gets - (header is not None), "what has not changed is asked for, and not fetched again"
    shutil.copy(family["de"] / "model.safetensors", server.root / "ca" / "model.safetensors")  # of the same size
    if header:
        server.headers = {header: "Tue, 02 Jan 2024 00:00:00 GMT"}
    assert fetched() != first
    if header is None:
        assert not list(cache().glob("*")), "a copy of which nobody can tell how old it is does not stay"


SECRETS = ("alice", "PASSW0RD", "p%40ss", "p@ss", "S1GNATURE", "AKIDEXAMPLE", "X-Amz")


def test_secrets_of_urls_are_seen_nowhere(server: Server, family: dict[str, Path], tmp_path: Path) -> None:
    """Not in what is written, printed, cached, or said of an error."""
    server.headers = {"ETag": "1"}
    place = f"127.0.0.1:{server.server_port}"
    query = "X-Amz-Credential=AKIDEXAMPLE%2F2024&X-Amz-Signature=S1GNATURE"
    ca = f"http://alice:PASSW0RD@{place}/ca/model.safetensors?{query}"
    de = f"http://alice:p%40ss@{place}/de.lors.safetensors?{query}"
    made = decompose(family["base"], family["de"], tmp_path / "de.lors.safetensors")
    server.root = shutil.copytree(family["base"].parent, tmp_path / "served")
    shutil.move(made.path, server.root / "de.lors.safetensors")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    printed = []

    def run(*arguments: object, code: int = 0) -> str:
        command = [sys.executable, "-c", "from lors.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        printed.append(done.stdout + done.stderr)
        assert done.returncode == code, printed[-1]
        return printed[-1]

    out, base = tmp_path / "out", family["base"]
    recipe = tmp_path / "served" / "recipe.yml"
    recipe.write_text(f"merge_method: lors\nbase_model: {base}\nmodels: [{{model: '{ca}'}}]\n")
    run("merge", recipe, out, "--dry-run")
    run("merge", recipe, out, "--check")
    run("add", out, de, "--weight", "0.5")
    run("merge", tmp_path / "out2", "--base", base, f"--expert=ca={ca}", "--json")
    run("report", base, ca, f"de={de}", "-o", tmp_path / "r.html")
    run("inspect", ca, "--base", base)
    run("decompose", base, ca, "-o", tmp_path / "ca.lors.safetensors")
    run("export-lora", de, "-o", tmp_path / "lora", "--base", ca)
    run("sweep", recipe, "--rank", "1,2", "--score", f"{sys.executable} -c 'print(1)'", "-o", tmp_path / "sweep")
    run("remove", out, de.replace("/de.", "/ca/model."), code=2)
    server.status = 403
    for url in (ca, de):
        assert place in run("merge", tmp_path / "out3", "--base", base, f"--expert=ca={url}", code=2)
    run("merge", tmp_path / "out3", "--base", base, f"--expert=ca=simplecache::{ca}", code=2)
    run("merge", f"nosuch://alice:PASSW0RD@host/out?{query}", "--base", base, f"--expert=ca={family['ca']}", code=2)

    seen = [(str(path), path.read_bytes() if path.is_file() else b"") for path in tmp_path.rglob("*") if path != recipe]
    assert any("/cache/lors/remote/" in path for path, _ in seen) and (out / "lors_ledger.json").exists()
    for secret in SECRETS:
        assert not [text for text in printed if secret in text], secret
        assert not [path for path, content in seen if secret in path or secret.encode() in content], secret
    assert f"http://{place}/ca/model.safetensors" in (out / "lors_recipe.yml").read_text()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h/a/b", "https://h/a/b"),
        ("https://u:p@h:80/a@b?c=d#e", "https://h:80/a@b"),
        ("https://u:p%2Fq@[::1]:80/a", "https://[::1]:80/a"),
        ("https://u:p/q@h/a", "https://h/a"),
        ("https://u:p@ss@h/a", "https://h/a"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("zip://x/y::simplecache::https://u:p@h/a.zip?s", "zip://x/y::simplecache::https://h/a.zip"),
        ("org/model@main", "org/model@main"),
        ("./odd://dir?x@y", "./odd://dir?x@y"),
        ("hf://user/repo@main/a", "hf://user/repo@main/a"),
    ],
)
def test_public(url: str, shown: str) -> None:
    assert public(url) == shown
    assert public_text(f"cannot read '{url}': no") == f"cannot read '{shown}': no" or "odd" in url
    assert str(LorsError(f"{url}: no such file")) == f"{shown}: no such file" or "odd" in url
    if shown != url:
        assert not [secret for secret in secrets_of(url) if secret in shown]


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
