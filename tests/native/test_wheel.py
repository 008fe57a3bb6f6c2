"""What CI is told about wheels and releases: nothing there is checked by running it here."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHEELS = PROJECT["tool"]["cibuildwheel"]


def workflow(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text()))


def test_wheels_for_every_python_that_the_package_names() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [line.removeprefix(prefix) for line in PROJECT["project"]["classifiers"] if line.startswith(prefix)]
    assert WHEELS["build"].split() == [f"cp3{minor}-*" for minor in named]
    assert PROJECT["project"]["requires-python"] == f">=3.{named[0]}"


def test_linux_wheels_hold_the_cuda_module_and_ci_looks_for_what_it_has_built() -> None:
    variables = WHEELS["linux"]["environment"]
    archs = variables["LORS_CUDA_ARCHS"].split(",")
    assert variables["LORS_BUILD_CUDA"] == "1" and {"80", "90", "100", "120"} <= set(archs)
    command = WHEELS["linux"]["test-command"]
    assert re.search(r"--cuda (\S+)", command)[1] == ",".join(f"sm_{arch}" for arch in archs)  # type: ignore[index]
    assert (ROOT / re.search(r"\{project\}/(\S+)", command)[1]).exists()  # type: ignore[index]
    readme = (ROOT / "README.md").read_text()
    assert ", ".join(f"sm_{arch}" for arch in archs) in readme


def test_the_toolkit_is_pinned_to_one_cuda_and_found_where_it_is_installed() -> None:
    target, path = re.search(r"--target (\S+) -r (\S+)", WHEELS["linux"]["before-all"]).groups()  # type: ignore[union-attr]
    lines = (ROOT / path).read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {str(pin.specifier).removeprefix("==").rsplit(".", 1)[0] for pin in pins}
    assert len(pins) == 5 and len(versions) == 1, "one CUDA, exact versions"
    (version,) = versions
    assert WHEELS["linux"]["environment"]["PATH"].startswith(f"{target}/nvidia/cu{version.split('.')[0]}/bin:")
    assert any(pin.name == "nvidia-cuda-nvcc" for pin in pins)


def test_both_workflows_build_the_same_wheels() -> None:
    tests, release = (workflow(name)["jobs"]["wheels"] for name in ("ci", "release"))
    assert tests["strategy"]["matrix"]["os"] == release["strategy"]["matrix"]["os"]
    programs = [
        re.search(r"cibuildwheel==\S+", step["run"])[0]  # type: ignore[index]
        for job in (tests, release)
        for step in job["steps"]
        if "cibuildwheel" in step.get("run", "")
    ]
    assert len(programs) == 2 and len(set(programs)) == 1


def test_a_release_stops_before_it_publishes() -> None:
    """Unless a variable is set and a reviewer approves; and no other job may ask the index for a token."""
    jobs = workflow("release")["jobs"]
    publish = jobs["publish"]
    assert publish["environment"] == "pypi" and "vars.PUBLISH == 'yes'" in publish["if"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "attest"
    uses = {name: [step["uses"] for step in job["steps"] if "uses" in step] for name, job in jobs.items()}
    assert [name for name, actions in uses.items() if any("pypi-publish" in action for action in actions)] == [
        "publish"
    ]
    assert sum("actions/attest@" in action for action in uses["attest"]) == 2
    foreign = [
        action for name in uses for action in uses[name] if not action.startswith("actions/") or "attest" in action
    ]
    assert all(re.fullmatch(r"\S+@[0-9a-f]{40}", action) for action in foreign), "pinned by their digest"


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_may_only_read_unless_a_job_says_why(name: str) -> None:
    assert workflow(name)["permissions"] == {"contents": "read"}
