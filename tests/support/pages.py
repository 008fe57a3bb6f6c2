"""Pages as a reader follows them: the files that they show, the commands and the Python that they tell to run.

In Markdown a block stands between fences. What is said of one stands before it as a comment: `<!-- not run: reason -->`,
`<!-- said by: command -->`. A block with a title is a file.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
RUN = ("bash", "python")

_FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<key>[a-z ]+): (?P<value>[^\n]+) -->\n(?P=indent))?```(?P<language>\w+)"
    r"(?: title=\"(?P<title>[^\"\n]+)\")?\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block; `said` is what the comment before it says: ("not run", "needs a GPU")."""

    where: str  # page:line
    language: str
    text: str
    title: str | None
    said: tuple[str, str] | None

    @property
    def reason(self) -> str | None:
        """Why it is not run; None where it is."""
        return self.said[1] if self.said and self.said[0] == "not run" else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text[: match.start()].count("\n") + 1
        said = (match["key"], match["value"]) if match["key"] else None
        body = textwrap.dedent(match["text"])
        found.append(Block(f"{page.name}:{line}", match["language"], body, match["title"], said))
    fences = len(re.findall(r"^ *```", text, re.MULTILINE))
    assert fences == 2 * len(found), f"{page.name}: {fences} fences, {len(found)} blocks that can be read"
    return found
