"""Where links lead, and that what is said in several places is said once: the version and the repository's address."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lors
import lors_kernels
import pages
from helpers import module

ROOT = pages.ROOT
README = ROOT / "README.md"
REPOSITORY = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]
HOME = (f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/", f"{REPOSITORY}/raw/main/")


def slugs(page: Path) -> set[str]:
    """Anchors of the headings, as hosts and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading).lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in plain}


def targets(text: str) -> list[str]:
    """Of links and pictures, without code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    return [first or second for first, second in found]


def test_links_of_the_package_page_are_absolute_and_lead_somewhere() -> None:
    """The README as the built package has it."""
    command = [sys.executable, "setup.py", "-q", "--long-description"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = targets(page)
    assert len(found) > 10 and len(found) == len(targets(README.read_text("utf-8")))
    for target in found:
        assert target.startswith("https://"), f"{target}: on the package page this leads nowhere"
        inside = next((target.removeprefix(home) for home in HOME if target.startswith(home)), None)
        if inside is not None:
            path, _, anchor = inside.partition("#")
            assert (ROOT / path).exists(), target
            assert not anchor or anchor in slugs(ROOT / path), target
        else:
            assert not target.startswith(REPOSITORY), target


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *sorted(pages.DOCS.rglob("*.md"))], ids=lambda p: p.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    """In the repository; the site is built strictly besides."""
    for target in targets(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or path.endswith(("reference/commands.md", "contributing.md")):
            continue  # elsewhere, or pages that the site makes
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in slugs(file), f"{page.name}: {target}"


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert lors.__version__ == lors_kernels.__version__ == str(citation["version"])


def test_one_address() -> None:
    """Everything that names the repository names this one."""
    files = [
        README,
        ROOT / "mkdocs.yml",
        ROOT / "CITATION.cff",
        *(ROOT / ".github").rglob("*.yml"),
        *pages.DOCS.rglob("*.md"),
    ]
    project = re.search(r"/([^/]+)$", REPOSITORY)[1]  # type: ignore[index]
    for file in files:
        for address in re.findall(rf"https://[\w.-]+/[\w.-]+/{project}\b", file.read_text("utf-8")):
            assert address == REPOSITORY, f"{file.name}: {address}"


@pytest.mark.parametrize(
    ("tag", "here", "said"),
    [
        ("", REPOSITORY, ""),
        (
            "",
            "https://host/fork/lors",
            "pyproject.toml: Repository: expected https://host/fork/lors, got " + REPOSITORY,
        ),
        (f"v{lors_kernels.__version__}x", REPOSITORY, f"tag: expected v{lors_kernels.__version__}, got"),
    ],
)
def test_a_release_of_another_version_or_place_is_stopped(tag: str, here: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "release.py"], env={"TAG": tag, "HERE": here}, capture_output=True, text=True
    )
    assert said in done.stderr and done.returncode == bool(said), done.stderr


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/w*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_for_the_host_have_its_schema(schema: str, pattern: str) -> None:
    module("check_jsonschema", "docs")
    files = sorted(ROOT.glob(pattern))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert files and done.returncode == 0, done.stdout
