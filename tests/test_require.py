"""LORS_REQUIRE: what it names fails when it is missing, what it does not name is skipped with the reason."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HIDDEN = ("mergekit", "peft", "fusion_bench")
# every file that needs a peer, and a test that needs one in the middle of others
FILES = [
    *("integrations/test_mergekit.py", "integrations/test_peft.py", "integrations/test_fusion_bench.py"),
    "methods/test_methods.py::test_linear_is_mergekits",
    "recipes/test_parameters.py::test_any_setting_means_what_it_means_to_mergekit",
    "experts/test_lora.py::test_peft_loads_the_exported_adapter",
]


def outcomes(required: str, tmp_path: Path, arguments: list[str]) -> tuple[int, dict[str, int], str]:
    """Exit status, numbers of outcomes and the output of pytest in a process without the peers, PATH or browser."""
    plugin = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in HIDDEN)
    (tmp_path / "without_peers.py").write_text(plugin)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "LORS_REQUIRE": required, "PYTHONPATH": os.pathsep.join(paths), "PATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "without_peers", *arguments]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    counted = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout.splitlines()[-1])
    return done.returncode, {outcome: int(count) for count, outcome in counted}, done.stdout


@pytest.mark.parametrize("required", ["", "cpu,peers,chromium"])
def test_missing_peers_and_browser(required: str, tmp_path: Path) -> None:
    arguments = [f"tests/{name}" for name in [*FILES, "analysis/test_interference.py::test_the_probe_sees_faults"]]
    status, counted, output = outcomes(required, tmp_path, ["--continue-on-collection-errors", *arguments])
    if required:
        assert status == 1 and counted == {"failed": 5, "error": 3}, output
        assert "peers is required by LORS_REQUIRE and missing: import of peft halted" in output
        assert "chromium is required by LORS_REQUIRE and missing: no chromium on the PATH" in output
    else:
        assert status == 0 and counted == {"skipped": 8}, output
        assert "peers: import of fusion_bench halted" in output


def test_a_misspelt_requirement(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_require.py"]
    environment = {**os.environ, "LORS_REQUIRE": "cpu,peer"}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 4 and "LORS_REQUIRE: unknown peer; known: avx2, avx512, chromium, cpu" in done.stderr


def test_no_skip_passes_by_the_rule() -> None:
    """`helpers.require` decides; only what is there in spite of a test may be in its way."""
    skip = re.compile(r"importorskip|pytest\.skip\(|mark\.skip|skipif|SkipTest")
    found = {
        f"{path.relative_to(TESTS)}: {line.strip()}"
        for path in TESTS.rglob("*.py")
        if path.name not in ("helpers.py", "test_require.py")
        for line in path.read_text().splitlines()
        if skip.search(line) and "there is a" not in line
    }
    assert found == set()
