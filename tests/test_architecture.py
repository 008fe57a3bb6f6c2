"""Imports point down, and no name that begins with an underscore is taken over a module's edge.

Every import counts: at the top of a file, inside a function, under TYPE_CHECKING. A line of LAYERS may import from the
lines below it and from its own folder, never from a line above or from another folder of its own line. docs/architecture.md
says what each of them knows, in the words of its __init__.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (  # from the top; names are folders or modules directly below `lors`
    ("__main__",),
    ("cli",),
    ("speech", "integrations"),
    ("sweep", "analysis", "exporting"),
    ("merging",),
    ("engine",),
    ("methods",),
    ("experts",),
    ("recipes",),
    ("checkpoints",),
    ("cluster", "command", "pages"),
    ("files", "keeper", "progress", "console"),
    ("errors", "tasks"),
    ("public",),
)
FACES = {"lors", "lors.cli", "lors.methods", "lors.speech", "lors_kernels"}  # whose __init__.py hands names on
MOST_FILES = 12  # directly in python_api/lors


class Import(NamedTuple):
    """`module` takes `name` ("": the module itself) of `target`."""

    module: str
    line: int
    target: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.name or 'import'} of {self.target}"


@dataclass(frozen=True)
class Tower:
    """The modules of some packages (name -> folder) and what they take from each other."""

    packages: dict[str, Path]

    @cached_property
    def modules(self) -> dict[str, Path]:
        found = {}
        for package, folder in self.packages.items():
            for path in sorted(folder.rglob("*.py")):
                parts = path.relative_to(folder).with_suffix("").parts
                found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
        return found

    @cached_property
    def imports(self) -> list[Import]:
        return [one for module in self.modules for one in self._imports(module)]

    def _imports(self, module: str) -> Iterator[Import]:
        path = self.modules[module]
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        known: dict[str, str] = {}  # local name -> module
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.modules:
                        known[alias.asname or alias.name] = alias.name
                        yield Import(module, node.lineno, alias.name, "")
            elif isinstance(node, ast.ImportFrom):
                start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*start, *([node.module] if node.module else [])])
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    if inner in self.modules:
                        known[alias.asname or alias.name] = inner
                        yield Import(module, node.lineno, inner, "")
                    elif source in self.modules:
                        yield Import(module, node.lineno, source, alias.name)
        for node in ast.walk(tree):  # module.name too
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
                yield Import(module, node.lineno, known[node.value.id], node.attr)

    def circles(self) -> list[list[str]]:
        """Strongly connected modules (Tarjan); a package's own __init__ is its face and no room."""
        faces = {name for name, path in self.modules.items() if path.name == "__init__.py"}
        graph: dict[str, set[str]] = {module: set() for module in self.modules if module not in faces}
        for one in self.imports:
            if one.module in graph and one.target in graph and one.module != one.target:
                graph[one.module].add(one.target)
        index: dict[str, int] = {}
        low: dict[str, int] = {}
        stack: list[str] = []
        found: list[list[str]] = []

        def visit(module: str) -> None:
            index[module] = low[module] = len(index)
            stack.append(module)
            for target in graph[module]:
                if target not in index:
                    visit(target)
                    low[module] = min(low[module], low[target])
                elif target in stack:
                    low[module] = min(low[module], index[target])
            if low[module] == index[module]:
                group = [stack.pop()]
                while group[-1] != module:
                    group.append(stack.pop())
                if len(group) > 1:
                    found.append(sorted(group))

        for module in graph:
            if module not in index:
                visit(module)
        return found

    def upwards(self) -> list[str]:
        place = {name: floor for floor, line in enumerate(LAYERS) for name in line}
        found = []
        for one in self.imports:
            if not one.module.startswith("lors.") or one.target.split(".")[0] != "lors":
                continue  # the package's own face takes from everywhere
            if one.target == "lors":  # and gives nothing but the version
                found += [] if one.name == "__version__" else [str(one)]
                continue
            room, other = one.module.split(".")[1], one.target.split(".")[1]
            if room != other and not place.get(room, 99) < place.get(other, -1):
                found.append(str(one))
        return found

    def private(self) -> list[str]:
        return [str(one) for one in self.imports if one.name.startswith("_") and not one.name.startswith("__")]


TOWER = Tower({"lors": ROOT / "python_api" / "lors", "lors_kernels": ROOT / "lors_kernels"})


def test_no_circle() -> None:
    assert TOWER.circles() == []


def test_imports_point_down() -> None:
    rooms = {module.split(".")[1] for module in TOWER.modules if module.startswith("lors.")}
    assert rooms == {name for line in LAYERS for name in line}, "every folder has its line"
    assert TOWER.upwards() == []


def test_private_names_stay_at_home() -> None:
    assert TOWER.private() == []


def test_the_kernels_know_no_file_and_no_model() -> None:
    taken = [
        str(one) for one in TOWER.imports if one.module.startswith("lors_kernels") and one.target.startswith("lors.")
    ]
    assert taken == []


def test_only_tests_take_from_the_reference() -> None:
    """It is a backend: dispatch loads it by name."""
    takers = {one.module for one in TOWER.imports if one.target == "lors_kernels.reference"}
    assert {module for module in takers if not module.startswith("lors_kernels.testing.")} == set()


def test_folders_say_what_they_know_and_hand_nothing_on() -> None:
    for module, path in TOWER.modules.items():
        if path.name == "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert ast.get_docstring(ast.Module(body, [])), f"{path}: expected a sentence"
            assert module in FACES or len(body) == 1 or module.startswith("lors_kernels."), f"{path}: hands names on"
    assert len(list((ROOT / "python_api" / "lors").glob("*.py"))) <= MOST_FILES


def test_the_page_says_what_the_folders_say() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [
        (re.findall(r"`(\w+)(?:/|\.py)`", names), text)
        for names, text in re.findall(r"^\| (.*) \| (.*) \|$", page, re.M)
    ]
    rows = rows[: next(at for at, (names, _) in enumerate(rows) if names == ["public"]) + 1]
    floor = {name: at for at, line in enumerate(LAYERS) for name in line}
    named = [name for names, _ in rows for name in names]
    assert sorted(named) == sorted(floor.keys() - {"__main__"}), "every folder and module has its place"
    assert named == sorted(named, key=lambda name: floor[name]), "from the top"
    for names, text in rows:
        folder = ROOT / "python_api" / "lors" / (names or [""])[0]
        if names and folder.is_dir():
            said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert (said or "").split("\n\n")[0] == text, folder


@pytest.mark.parametrize(
    ("files", "circles", "upwards", "private"),
    [
        ({"errors.py": "", "files/a.py": "from ..errors import x"}, 0, 0, 0),
        ({"errors.py": "from .files.a import y", "files/a.py": ""}, 0, 1, 0),
        ({"files/a.py": "def f():\n    from ..cluster import y", "cluster.py": ""}, 0, 1, 0),
        ({"files/a.py": "from . import b", "files/b.py": "def f():\n    from .a import x"}, 1, 0, 0),
        ({"files/a.py": "from .b import _x", "files/b.py": ""}, 0, 0, 1),
        ({"files/a.py": "from . import b\nb._x()", "files/b.py": ""}, 0, 0, 1),
        ({"cli/a.py": "from ..engine.b import X", "engine/b.py": ""}, 0, 0, 0),
        ({"elsewhere/a.py": "from ..errors import x", "errors.py": ""}, 0, 1, 0),
        ({"files/a.py": "from .. import merge, __version__"}, 0, 1, 0),
    ],
)  # fmt: skip
def test_the_guard_sees_faults(files: dict[str, str], circles: int, upwards: int, private: int, tmp_path: Path) -> None:
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    tower = Tower({"lors": tmp_path})
    assert [len(found) for found in (tower.circles(), tower.upwards(), tower.private())] == [circles, upwards, private]
