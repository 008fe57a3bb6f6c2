"""What the site needs beside the pages in this folder: files of the repository that pages link to, a page that is made, and links.

A page may link to `../examples/x.yml`: that is right in the repository and on the page of a host, and on the site it leads to
the repository; pictures from there are copied in. The page of all commands is what the commands say of themselves.
Docstrings and help name pages as files of the repository, `docs/methods.md`: on the site that is a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
COMMANDS = "reference/commands.md"
CONTRIBUTING = "contributing.md"
PICTURES = {".png", ".svg"}
_LINK = re.compile(r"(\]\(|src=\")(\.\./[^)\s\"#]+)")
_NAMED = re.compile(r"<code>(?:docs/)?([\w/-]+\.md)</code>|(?<![\w/\">])docs/([\w/-]+\.md)\b")


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    files.append(File.generated(config, CONTRIBUTING, content=text))
    for picture in sorted((ROOT / "benchmarks" / "results").iterdir()):
        if picture.suffix in PICTURES:
            files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def outside(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, found[2]))
        if path.startswith("docs/"):
            return found[0]
        if Path(path).suffix in PICTURES:
            copied = posixpath.relpath(f"results/{posixpath.basename(path)}", folder or ".")
            return found[1] + copied
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: links to {path}, which is not in the repository")
        return f"{found[1]}{config['repo_url']}/blob/main/{path}"

    return _LINK.sub(outside, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    def linked(found: re.Match[str]) -> str:
        file = files.get_file_from_path(found[1] or found[2])
        return found[0] if file is None else f'<a href="{get_relative_url(file.url, page.url)}">{found[0]}</a>'

    return _NAMED.sub(linked, html)


def commands_page() -> str:
    """Every command with its arguments and options, by typer."""
    import typer
    from typer.cli import get_docs_for_click

    from lors.cli.app import COMMANDS as names
    from lors.cli.app import application

    command = typer.main.get_command(application(names))
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="lors", title="Commands")
    text = re.sub(r"^\*\*Commands\*\*:\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)  # headings say it
    text = re.sub(r"^(lors .+)$", r"    \1", text, flags=re.MULTILINE)  # examples
    return re.sub(r"^\* `(-h, )?--help`.*\n", "", text, flags=re.MULTILINE)
