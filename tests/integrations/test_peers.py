"""What all bridges say of a tool that is missing, too old or broken, whichever of their functions is called first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from typing import Any

import pytest

import lors.integrations.mergekit
import lors.integrations.peft
import lors.integrations.transformers
from lors import LorsError
from lors.integrations import peers


def import_fusion_bench_bridge() -> None:
    """A fresh copy, because it asks for its tool when it is imported."""
    spec = find_spec("lors.integrations.fusion_bench")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module_from_spec(spec))


# distribution, package, extra, first version that will do, one that will not, ways to call for it
BRIDGES: dict[str, tuple[str, str, str, str, list[Callable[[], Any]]]] = {
    "mergekit": ("mergekit", "peers", "0.1.5", "0.1.4", [
        lors.integrations.mergekit.register,
        lors.integrations.mergekit.accelerate,
        lambda: lors.integrations.mergekit.mergekit_yaml(["config.yml", "out"]),
    ]),
    "peft": ("peft", "peers", "0.10.0", "0.9.0", [
        lors.integrations.peft.accelerate,
        lambda: lors.integrations.peft.add_lors_adapter(None, ["ca"], [1.0], "both"),
    ]),
    "fusion-bench": ("fusion_bench", "peers", "0.2.30", "0.2.9", [import_fusion_bench_bridge]),
    "transformers": ("transformers", "speech", "4.45", "4.44.2", [
        lambda: lors.integrations.transformers.load_merged("base", {"ca": "ca"}),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("distribution", BRIDGES)
def test_a_tool_that_is_missing_too_old_or_broken(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra, oldest, old, calls = BRIDGES[distribution]

    def missing(name: str) -> str:
        raise peers.PackageNotFoundError(name)

    wanted = rf"{distribution} >= {oldest} \(pip install 'lors-merging\[{extra}\]'\)"
    for version, message in (
        (missing, rf"^{distribution}: not installed; expected {wanted}$"),
        (lambda name: old, rf"^{distribution}: expected version {oldest} or newer, got {old}$"),
        (lambda name: oldest, rf"^{distribution} {oldest}: cannot be imported: "),
    ):
        monkeypatch.setattr(peers, "version", version)
        monkeypatch.setitem(sys.modules, package, None)
        for call in calls:
            with pytest.raises(LorsError, match=message):
                call()


@pytest.mark.parametrize(
    "text,numbers", [("0.1.5", (0, 1, 5)), ("0.10.0rc1", (0, 10, 0)), ("1.2.dev0+x", (1, 2)), ("2", (2,))]
)
def test_versions(text: str, numbers: tuple[int, ...]) -> None:
    assert peers.release(text) == numbers


def test_importing_a_bridge_imports_no_tool() -> None:
    code = (
        "import sys, lors.integrations.mergekit, lors.integrations.peft, lors.integrations.transformers\n"
        "assert not {'mergekit', 'peft', 'transformers', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
