"""What CI is told about wheels: nothing there is checked by running it here."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent


def wheels() -> dict[str, str]:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    step = next(step for step in jobs["wheels"]["steps"] if "cibuildwheel" in step.get("uses", ""))
    return dict(step["env"])


def test_linux_wheels_hold_the_cuda_module_and_ci_looks_for_what_it_has_built() -> None:
    env = wheels()
    variables = dict(pair.split("=", 1) for pair in env["CIBW_ENVIRONMENT_LINUX"].split())
    archs = variables["LORS_CUDA_ARCHS"].split(",")
    assert variables["LORS_BUILD_CUDA"] == "1" and {"80", "90", "100", "120"} <= set(archs)
    command = env["CIBW_TEST_COMMAND_LINUX"]
    assert re.search(r"--cuda (\S+)", command)[1] == ",".join(f"sm_{arch}" for arch in archs)  # type: ignore[index]
    assert (ROOT / re.search(r"\{project\}/(\S+)", command)[1]).exists()  # type: ignore[index]
    readme = (ROOT / "README.md").read_text()
    assert ", ".join(f"sm_{arch}" for arch in archs) in readme


def test_the_toolkit_is_pinned_to_one_cuda_and_found_where_it_is_installed() -> None:
    env = wheels()
    target, path = re.search(r"--target (\S+) -r (\S+)", env["CIBW_BEFORE_ALL_LINUX"]).groups()  # type: ignore[union-attr]
    lines = (ROOT / path).read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {str(pin.specifier).removeprefix("==").rsplit(".", 1)[0] for pin in pins}
    assert len(pins) == 5 and len(versions) == 1, "one CUDA, exact versions"
    (version,) = versions
    assert f"PATH={target}/nvidia/cu{version.split('.')[0]}/bin:" in env["CIBW_ENVIRONMENT_LINUX"]
    assert any(pin.name == "nvidia-cuda-nvcc" for pin in pins)
