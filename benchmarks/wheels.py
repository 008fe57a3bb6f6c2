"""The packages to bring to a machine that cannot fetch any:

    python -m benchmarks.wheels DIRECTORY [--extra test]

DIRECTORY is what `python -m benchmarks.gpu --stages machine --out DIRECTORY` left there. Prints `name==version`, a line each, for
what this project and its extras need and that machine has not, in the versions that are installed here: arguments for
`pip download --no-deps --only-binary=:all: --python-version ...`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = "lors-merging"


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def missing(there: Mapping[str, str], python: str, extras: tuple[str, ...] = ()) -> list[str]:
    """What is needed and not there, or there in a version that will not do; what that needs too."""
    have = {name_of(name): version for name, version in there.items()}
    found: dict[str, str] = {}
    seen = set[tuple[str, str]]()
    todo = [(PROJECT, extra) for extra in ("", *extras)]
    while todo:
        package, extra = todo.pop()
        if (package, extra) in seen:
            continue
        seen.add((package, extra))
        for text in metadata.requires(package) or ():
            need = Requirement(text)
            where = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
            if need.marker and not need.marker.evaluate(where):
                continue
            name = name_of(need.name)
            if name in have and Version(have[name]) in need.specifier:
                continue  # and with it what it needs
            if name != PROJECT:
                found[name] = metadata.version(name)
            todo += [(name, more) for more in ("", *need.extras)]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheels", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--extra", action="append", default=[], help="of pyproject.toml; repeat")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in (options.directory / "rows.jsonl").read_text().splitlines()]
    there = [row["found"] for row in rows if row.get("key") == "packages" and "failed" not in row["found"]]
    if not there:
        print(f"error: {options.directory}: expected a row 'packages' of the stage machine, got none", file=sys.stderr)
        return 2
    try:
        print("\n".join(missing(there[-1]["packages"], there[-1]["python"], tuple(options.extra))))
    except metadata.PackageNotFoundError as error:
        print(f"error: expected {error.name} to be installed here, got none", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
