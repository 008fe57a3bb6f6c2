"""What must agree before a release: the tag with the version, and the links of the package page with where it is hosted.

TAG=v0.1.0 HERE=https://host/owner/name python .ci/release.py; without a tag only the links are looked at.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def problems(tag: str, here: str) -> list[str]:
    """One line for each thing that does not agree."""

    def find(file: str, pattern: str) -> str:
        found = re.search(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE)
        return found[1] if found else ""

    version = find("lors_kernels/__init__.py", r'^__version__ = "(.+?)"')
    checks = [
        ("pyproject.toml: Repository", here, find("pyproject.toml", r'^Repository = "(.+?)"')),
        ("CITATION.cff: repository-code", here, find("CITATION.cff", r'^repository-code: "(.+?)"')),
        ("CITATION.cff: version", version, find("CITATION.cff", r"^version: (.+)$")),
    ]
    if tag:
        checks += [
            ("tag", f"v{version}", tag),
            ("CHANGELOG.md: first version", version, find("CHANGELOG.md", r"^## (?!Unreleased)\[?([0-9][^\] ]*)")),
        ]
    return [f"{what}: expected {wanted}, got {got or 'none'}" for what, wanted, got in checks if wanted != got]


if __name__ == "__main__":
    found = problems(os.environ.get("TAG", ""), os.environ["HERE"])
    sys.exit("\n".join(found) or 0)
