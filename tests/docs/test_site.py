"""The site: built strictly, whole, and without a request to anybody else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lors
import lors.speech
import lors_kernels
import pages
from helpers import module
from lors.cli.app import COMMANDS

for _name in ("mkdocs", "material", "mkdocstrings"):
    module(_name, "docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out


def text(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text("utf-8")


@pytest.mark.parametrize(("package", "page"), [(lors, "lors"), (lors.speech, "speech"), (lors_kernels, "kernels")])
def test_every_public_name_is_in_the_reference(package: object, page: str, site: Path) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    found = set(re.findall(r'id="([\w.]+)"', text(site, f"reference/{page}")))
    for item in package.__all__:  # type: ignore[attr-defined]
        assert item == "__version__" or found & {f"{name}.{item}", f"{name}.{item}.{item}"}, item
    assert "doc-symbol-module" not in text(site, f"reference/{page}"), "a module in the place of its function"


def test_every_command_is_in_the_reference(site: Path) -> None:
    page = text(site, "reference/commands")
    for command in COMMANDS:
        assert f'id="lors-{command}"' in page, command
    assert "--density" in page and "--max-steps" in page


def test_a_page_that_is_named_is_linked(site: Path) -> None:
    """Docstrings and help name pages as the repository has them."""
    for page, name, address in (
        ("reference/lors", "<code>docs/methods.md</code>", "../../methods/"),
        ("reference/commands", "docs/speech.md", "../../speech/"),
    ):
        assert f'<a href="{address}">{name}</a>' in text(site, page), page
    for path in site.rglob("index.html"):
        bare = re.sub(r"<a [^>]*>.*?</a>|<[^>]*>", "", path.read_text("utf-8"), flags=re.DOTALL)
        assert not re.findall(r"docs/[\w/-]+\.md", bare), path


def test_a_manifest_can_be_copied_with_its_tabs(site: Path) -> None:
    assert "audio\ttext\tlanguage\tsplit" in re.sub("<[^>]+>", "", text(site, "how-to/own-data"))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link rel=\"(?:stylesheet|preload|preconnect)\")[^>]*?(?:src|href)=\"([^\"]+)\"",
            page.read_text("utf-8"),
        )
        assert loaded and not [address for address in loaded if re.match(r"(https?:)?//", address)], page


def test_links_out_of_the_folder_lead_to_the_repository(site: Path) -> None:
    page = text(site, "recipes")
    assert re.search(r'href="https://\S+/blob/main/examples/gradient\.yml"', page)
    assert (site / "results" / "scaling-cpu.png").exists() and "results/scaling-cpu.png" in text(site, "measurements")
