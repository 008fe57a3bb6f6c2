"""The commands on expert files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from experts import EXPERTS


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.family(tmp_path_factory.mktemp("family"), EXPERTS)


def test_the_commands(family: dict[str, Path], tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from lors.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)

    for name in ("ca", "de"):
        done = run("decompose", family["base"], family[name], "-o", f"{name}.lors.safetensors", "--name", name)
        assert done.returncode == 0 and "of the checkpoint" in done.stdout, done.stderr
    assert run("merge", "out", "--base", family["base"], "--expert", "ca=ca.lors.safetensors").returncode == 0
    done = run("add", "out", "de.lors.safetensors")
    assert done.returncode == 0 and "note: added de\n" in done.stdout and "lors: 2 experts, " in done.stdout, done
    done = run("remove", "out", "ca.lors.safetensors", "--json")
    told = json.loads(done.stdout)
    assert told["experts"] == ["de"] and told["notices"][0] == "removed ca", done.stderr
    assert "lors: 1 expert, " in run("merge", "one", "--base", family["base"], "--expert", family["ca"]).stdout
    assert run("export-lora", "de.lors.safetensors", "-o", "adapter").returncode == 0
    done = run("add", "out", family["ca"])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["adapter", "ca.lors.safetensors", "de.lors.safetensors", "one", "out"]
