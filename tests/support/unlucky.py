"""Commands on unlucky days: `python unlucky.py faults|signals COUNT ROOT` prints what became of them, as JSON.

A process that has everything imported forks a child per run, so that a run takes milliseconds. With LD_PRELOAD=faults.so
(tests/native/faults.c) system calls of the child fail at random; or the child gets a signal at a random moment. After each run
every output is the old or the new one, whole, the exit code says which, and what is said is a line. A run after that,
undisturbed, leaves nothing behind but its output.

COUNT: faults or signals to reach. UNLUCKY_COMMANDS=merge,add chooses commands.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("write", "fsync", "rename", "close", "read", "flock", "open", "link", "remove")
PATIENCE = 5.0  # seconds after a signal


@dataclass(frozen=True)
class Command:
    """Arguments with {base}, {ca} ... and {out}, the directory of the run; `outputs` are in it."""

    arguments: str
    outputs: tuple[str, ...]
    prepare: tuple[str, ...] = ()  # commands that make what is there before
    resumes: bool = False  # the same command goes on where it was stopped: an output may be absent or part of a sweep
    seconds: float = 0.0
    lines: int = 1


COMMANDS = {
    "merge": Command("merge {out}/o --base {base} --expert ca={ca}", ("o",)),
    "merge --force": Command(
        "merge {out}/o --base {base} --expert ca={ca} --expert de={de} --force --out-shard-size 100KB", ("o",),
        ("merge {out}/o --base {base} --expert ca={ca}",),
    ),
    "add": Command("add {out}/o {de.file}", ("o",), ("merge {out}/o --base {base} --expert ca={ca}", "@user")),
    "remove": Command(
        "remove {out}/o {ca.file}", ("o",),
        ("merge {out}/o --base {base} --expert ca={ca.file} --expert de={de.file}", "@user"),
    ),
    "decompose": Command("decompose {base} {ca} -o {out}/x.lors.safetensors", ("x.lors.safetensors",)),
    "decompose --force": Command(
        "decompose {base} {ca} -o {out}/x.lors.safetensors --force", ("x.lors.safetensors",),
        ("decompose {base} {de} -o {out}/x.lors.safetensors",),
    ),
    "export-lora": Command(
        "export-lora {ca.file} -o {out}/l --force", ("l",), ("export-lora {de.file} -o {out}/l",)
    ),
    "report": Command(
        "report {base} ca={ca} -o {out}/r.html --force", ("r.html", "r.json"), ("report {base} de={de} -o {out}/r.html",)
    ),
    "synth": Command(
        "synth {out}/c --languages ca --train 0 --dev 0 --test 2 --seed 1 --force", ("c",),
        ("synth {out}/c --languages ca --train 0 --dev 0 --test 2 --seed 2",),
    ),
    "sweep": Command(
        "sweep {recipe} --rank 1,2 --lambda 0.2,0.4 --score 'stat -c %s' -o {out}/s --method lors", ("s",), (), True
    ),
}  # fmt: skip


def digest(path: Path) -> str | None:
    """Of everything that is there, times and other names apart; None when there is nothing."""
    if not os.path.lexists(path):
        return None
    found = hashlib.sha256()
    for file in [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]:
        found.update(f"{file.relative_to(path.parent)}\0".encode())
        if file.is_symlink():
            found.update(os.readlink(file).encode())
        elif file.is_file():
            found.update(file.read_bytes())
    return found.hexdigest()


def put_files_of_a_user(out: Path) -> None:
    (out / "o" / ".git" / "objects").mkdir(parents=True)
    (out / "o" / ".git" / "objects" / "1").write_text("history")
    (out / "o" / "latest").symlink_to(".git")
    os.link(out / "o" / ".git" / "objects" / "1", out / "o" / "notes.txt")


# --- one run


def child(arguments: Sequence[str], said: Path, begin: Callable[[], None], end: Callable[[], None]) -> int:
    """Forks a `lors` process; its identity."""
    pid = os.fork()
    if pid:
        return pid
    code = 120
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(stream, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["lors", *arguments]
        from lors.cli import main

        begin()
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        end()
    except BaseException:
        import traceback

        end()
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def nothing() -> None:
    pass


@dataclass
class Lab:
    """A family of checkpoints and a template per command: the state before it, and the digests before and after."""

    root: Path
    faults: ctypes.CDLL | None
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    wrong: list[str] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        import tiny

        self.said = self.root.with_name("said")
        self.names = {name: str(path) for name, path in tiny.family(self.root / "family", ("ca", "de")).items()}
        for name in ("ca", "de"):
            self.names[f"{name}.file"] = str(self.root / "family" / f"{name}.lors.safetensors")
            self.healthy(f"decompose {{base}} {{{name}}} -o {{{name}.file}} --name {name}", self.root)
        recipe = self.root / "family" / "recipe.yml"
        recipe.write_text(
            f"merge_method: lors\nbase_model: {self.names['base']}\nmodels: [{{model: {self.names['ca']}}}]\n"
        )
        self.names["recipe"] = str(recipe)

    def arguments(self, text: str, out: Path) -> list[str]:
        words = text
        for name, value in {**self.names, "out": str(out)}.items():
            words = words.replace(f"{{{name}}}", value)
        return shlex.split(words)

    def healthy(self, text: str, out: Path) -> float:
        """Seconds of an undisturbed run."""
        begun = time.monotonic()
        pid = child(self.arguments(text, out), self.said, nothing, nothing)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != 0:
            raise RuntimeError(f"{text}: exit code {status}: {self.said.read_text()}")
        return time.monotonic() - begun

    def prepared(self, name: str) -> tuple[Path, list[str | None], list[str | None], float]:
        command = COMMANDS[name]
        template, out = self.root / f"template-{name.replace(' ', '')}", self.root / "out"
        template.mkdir()
        for text in command.prepare:
            put_files_of_a_user(template) if text == "@user" else self.healthy(text, template)
        self.restore(template, out)
        old = [digest(out / output) for output in command.outputs]
        seconds = self.healthy(command.arguments, out)
        new = [digest(out / output) for output in command.outputs]
        assert all(new) and not set(old) & set(new), name
        return template, old, new, seconds

    def restore(self, template: Path, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        copied: dict[int, str] = {}  # other names of a file stay other names of it

        def copy(source: str, target: str) -> None:
            inode = os.stat(source).st_ino
            if inode in copied:
                os.link(copied[inode], target)
            else:
                shutil.copy2(source, target)
                copied[inode] = target

        shutil.copytree(template, out, symlinks=True, copy_function=copy)

    # --- what must hold

    def judge(
        self,
        name: str,
        label: str,
        code: int,
        allowed: set[int],
        old: list[str | None],
        new: list[str | None],
    ) -> None:
        command, out = COMMANDS[name], self.root / "out"
        said = self.said.read_text(errors="replace")
        lines = said.splitlines()

        def wrong(what: str) -> None:
            self.wrong.append(f"{name}: {label}: {what}: exit code {code}, said {said[-600:]!r}")

        if code not in allowed:
            wrong("exit code")
        told = [line for line in lines if not line.startswith("note: ")]
        if len(told) > 1 or (code > 0 and not told) or any(not line.startswith(STARTS) for line in told):
            wrong("expected one line")
        states = [digest(out / output) for output in command.outputs]
        if command.resumes:
            self.tally["old or new"] += 1
        elif code == 2 and states != old and all(s is None or s == o for s, o in zip(states, old, strict=True)):
            self.tally["put back by the next run"] += 1  # not even the old one could be put back: said, and beside it
            if ".old" not in said:
                wrong("the old one is gone, and no word of where")
        elif any(state not in (o, n) for state, o, n in zip(states, old, new, strict=True)):
            wrong("neither the old nor the new")
        else:
            self.tally["old" if states == old else "new" if states == new else "old and new files"] += 1
            if code == 0 and states != new:
                wrong("exit code 0 and not the new")
            if code == 2 and states == new:
                wrong("an error though the new is in place")
        try:
            self.afterwards(name, wrong, old, new)
        except RuntimeError as error:
            wrong(f"the next run failed: {error}")

    def afterwards(self, name: str, wrong: Callable[[str], None], old: list[str | None], new: list[str | None]) -> None:
        """The next run finds nothing that is in its way, and leaves nothing but its output."""
        command, out = COMMANDS[name], self.root / "out"
        for stuck in out.glob(".*.taken"):  # what a run without flock was told to remove
            stuck.unlink()
        self.healthy("decompose {base} {ca} -o {out}/neighbour", out)
        (out / "neighbour").unlink()
        states = [digest(out / output) for output in command.outputs]
        if not command.resumes and any(state not in (o, n) for state, o, n in zip(states, old, new, strict=True)):
            wrong("neither the old nor the new after the next run")
        if command.resumes:
            self.healthy(f"{command.arguments} --retry", out)
            if len((out / "s" / "trials.jsonl").read_text().splitlines()) != 4 or not (out / "s" / "best.yml").exists():
                wrong("not every trial once")
        if (
            rest := {path.name for path in out.iterdir()}
            - {*command.outputs}
            - {f".{o}{kind}.lors.lock" for o in command.outputs for kind in ("", ".writing")}
        ):
            kept = {name for name in rest if name.endswith(".old")}
            if rest - kept:
                wrong(f"left behind: {sorted(rest - kept)}")


STARTS = ("error: ", "interrupted", "terminated by ")


# --- faults


def run_faults(lab: Lab, count: int, names: Sequence[str]) -> None:
    assert lab.faults is not None, "expected LD_PRELOAD=faults.so"
    faults = lab.faults
    faults.faults_count.restype = ctypes.c_uint
    states = {name: lab.prepared(name) for name in names}
    seed = 0
    while sum(lab.tally[kind] for kind in KINDS) < count and len(lab.wrong) < 20:
        name = names[seed % len(names)]
        template, old, new, _ = states[name]
        lab.restore(template, lab.root / "out")
        rate = lab.rng.choice((3_000, 10_000, 30_000, 100_000))
        kinds = lab.rng.choice(
            (2 ** len(KINDS) - 1, lab.rng.randrange(1, 2 ** len(KINDS)), 1 << lab.rng.randrange(len(KINDS)))
        )
        reader, writer = os.pipe()

        def begin(seed: int = seed, rate: int = rate, kinds: int = kinds) -> None:
            faults.faults_arm(*map(ctypes.c_uint64, (seed, rate, kinds)), str(lab.root).encode())

        def end(writer: int = writer) -> None:
            faults.faults_disarm()
            os.write(writer, json.dumps([faults.faults_count(kind) for kind in range(len(KINDS))]).encode())

        pid = child(lab.arguments(COMMANDS[name].arguments, lab.root / "out"), lab.said, begin, end)
        os.close(writer)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        came = json.loads(os.read(reader, 1000) or b"[]")
        os.close(reader)
        for kind, number in zip(KINDS, came, strict=False):
            lab.tally[kind] += number
        lab.tally["runs"] += 1
        lab.tally[f"exit code {code}"] += 1
        hit = {kind: number for kind, number in zip(KINDS, came, strict=False) if number}
        lab.judge(name, f"seed {seed}, rate {rate}, {hit}", code, {0, 2}, old, new)
        seed += 1


# --- signals


def run_signals(lab: Lab, count: int, names: Sequence[str]) -> None:
    states = {name: lab.prepared(name) for name in names}
    for number in range(count):
        name = names[number % len(names)]
        template, old, new, seconds = states[name]
        lab.restore(template, lab.root / "out")
        signum = lab.rng.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
        wait = lab.rng.uniform(0, 1.2 * seconds)
        pid = child(lab.arguments(COMMANDS[name].arguments, lab.root / "out"), lab.said, nothing, nothing)
        time.sleep(wait)
        os.kill(pid, signum)
        begun = time.monotonic()
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() - begun < 2 * PATIENCE:
            time.sleep(0.005)
        took = time.monotonic() - begun
        if not ended[0]:
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(ended[1])
        label = f"{signal.Signals(signum).name} after {wait:.3f} of {seconds:.3f} s"
        if took > PATIENCE:
            lab.wrong.append(f"{name}: {label}: ended {took:.1f} s after it")
        lab.tally["signals"] += 1
        lab.tally["came before the end"] += code != 0
        lab.tally["slowest, ms"] = max(lab.tally["slowest, ms"], round(1000 * took))
        # before the handlers are there, the system's default: nothing has been begun
        lab.judge(name, label, code, {0, 128 + signum, -signum}, old, new)


def main() -> None:
    mode, count, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]).resolve()
    known = [name for name in COMMANDS if name != "synth" or shutil.which("espeak-ng")]
    names = [name for name in known if name in os.environ.get("UNLUCKY_COMMANDS", ",".join(known)).split(",")]
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    import lors.analysis.interference_page
    import lors.checkpoints.reader
    import lors.cli.app
    import lors.console
    import lors.experts.decompose  # noqa: F401
    import lors.merging.ledger
    import lors.merging.on_disk
    import lors.sweep.run

    if "synth" in names:
        import soundfile  # noqa: F401
        import soxr  # noqa: F401

        import lors.speech.data.synth  # noqa: F401

    root.mkdir(parents=True)
    preloaded = "faults" in os.environ.get("LD_PRELOAD", "")
    lab = Lab(root, ctypes.CDLL(None) if preloaded else None)
    {"faults": run_faults, "signals": run_signals}[mode](lab, count, names)
    print(json.dumps({"tally": lab.tally, "wrong": lab.wrong}, indent=1))


if __name__ == "__main__":
    main()
