"""The model card: a header the hub understands, every input with its digest, and the recipe that makes it again."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError, printable
from lors.files.directory import OutputDirectory
from lors.merging.card import Input, carried_over, languages, versions, write_card
from lors.merging.publish import parameters_of
from lors.methods import SPECS
from lors.recipes.recipe import Recipe

DIGEST = "0123456789abcdef" * 4
RECIPE = "merge_method: lors\nbase_model: openai/whisper-small\nmodels:\n- model: me/ca  # Català\n"
BASE = Input("base", "openai/whisper-small", {"model.safetensors": DIGEST}, hub_id="openai/whisper-small")
EXPERTS = [
    Input("ca", "me/whisper-ca", {"model.safetensors": DIGEST[::-1]}, hub_id="me/whisper-ca", weight=1.0),
    Input("sv-SE", "sv|dir", {"a.safetensors": "a" * 64, "b.safetensors": "b" * 64}, weight=0.5),
]


def card(directory: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """The YAML header and the text of a card."""
    arguments: dict[str, Any] = {
        "base": BASE,
        "experts": EXPERTS,
        "method": "lors",
        "parameters": {"rank": 7, "density": 0.2, "lambda": 0.2},
        "recipe": RECIPE,
        "backend": "cpu (AVX-512)",
    }
    written = write_card(directory, **{**arguments, **changes})
    assert written == [directory / "README.md", directory / "lors_recipe.yml"]
    text = written[0].read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_header(tmp_path: Path) -> None:
    (tmp_path / "base.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\n- zh\ntags: [audio]\n---\n# Whisper\n"
    )
    header, _ = card(tmp_path, carried=carried_over(tmp_path / "base.md")[0])
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["lors-merging", "merge", "whisper"],
        "base_model": ["openai/whisper-small", "me/whisper-ca"],
        "base_model_relation": "merge",
        "language": ["ca", "sv"],
        "license": "apache-2.0",
    }


def test_header_says_only_what_is_known(tmp_path: Path) -> None:
    local = Input("mix", "dir", {"x": DIGEST})
    assert card(tmp_path, base=local, experts=[local], naming="other")[0] == {"tags": ["lors-merging", "merge"]}
    assert "library_name" not in card(tmp_path, naming="openai-whisper")[0]
    (tmp_path / "base.md").write_text("---\nlanguage: [en, zh]\nlicense: other\nlicense_name: mine\n---")
    header, _ = card(tmp_path, experts=[local], carried=carried_over(tmp_path / "base.md")[0])
    assert (header["language"], header["license"], header["license_name"]) == (["en", "zh"], "other", "mine")


HEADERS: dict[str, tuple[str, dict[str, Any], str]] = {  # a card -> what is carried over, and the notice
    "nothing": ("", {}, ""),
    "no header": ("# no header", {}, ""),
    "no end": ("---\nlicense: x", {}, "does not end within 65536 bytes; no license is carried over"),
    "an end that is far": ("---\nlicense: x\n" + "\n" * 70_000 + "---\n", {}, "does not end within"),
    "60 kB of newlines": ("---\n" + "\n" * 60_000, {}, "does not end within"),
    "60 kB of newlines and an end": ("---\nlicense: x" + "\n" * 60_000 + "---\n", {"license": "x"}, ""),
    "broken elsewhere": ("---\n: [broken\nlicense: mit\n---\n", {"license": "mit"}, ""),
    "a date that is none elsewhere": ("---\ndate: 2024-99-99\nlicense: mit\n---\n", {"license": "mit"}, ""),
    "a number of 5,000 digits elsewhere": (f"---\nn: {'9' * 5000}\nlicense: mit\n---\n", {"license": "mit"}, ""),
    "a bomb elsewhere": ("---\na: &a [1,1]\nb: &b [*a,*a]\n<<: *b\nlicense: mit\n---\n", {"license": "mit"}, ""),
    "a list": ("---\n- a list\n---\n", {}, ""),
    "carriage returns": ("---\r\nlicense: mit\r\nlanguage:\r\n- ca\r\n---\r\n", {"license": "mit", "language": ["ca"]}, ""),
    "quoted": ("---\n\"license\": 'a b'\n---\n", {"license": "a b"}, ""),
    "a list over lines": ("---\nlanguage: [\n  ca,\n  de\n]\nlicense: x\n---\n", {"language": ["ca", "de"], "license": "x"}, ""),
    "a key of the lines below": ("---\nmodel-index:\n- license: gpl\n  license: x\n---\n", {}, ""),
    "nothing in it": ("---\nlicense:\n---\n", {}, ""),
    "twice": ("---\nlicense: a\nlicense: b\n---\n", {}, "'license' was already given in line 2; the license is not carried"),
    "a date": ("---\nlicense: 2024-01-01\nlanguage: ca\n---\n", {"language": "ca"}, "the license is not carried over"),
    "a date that is none": ("---\nlicense: 2024-99-99\n---\n", {}, "the license is not carried over"),
    "a number": ("---\nlicense: 3\n---\n", {}, "license: expected a string, got 3"),
    "a number of 5,000 digits": (f"---\nlicense: {'9' * 5000}\n---\n", {}, "the license is not carried over"),
    "5,000 lists": (f"---\nlicense: {'[' * 5000}\n---\n", {}, "nested deeper than 32"),
    "60,000 lists": (f"---\nlanguage: {'[' * 60_000}\n---\n", {}, "nested deeper than 32"),
    "20,000 lists in a row": (f"---\nlanguage: [{'[],' * 20_000}]\n---\n", {}, "the language is not carried over"),
    "16,000 lines": ("---\nlanguage:\n" + "- a\n" * 16_000 + "---\n", {}, "the language is not carried over"),
    "an alias": ("---\nx: &x mit\nlicense: *x\n---\n", {}, "found undefined alias"),
    "lines": ("---\nlicense: \"a\\nb: c\"\n---\n", {}, "expected one line of text"),
    "a terminal's commands": ("---\nlicense: \"\\e[2J\"\n---\n", {}, "expected one line of text"),
    "a tag": ("---\nlicense: !!python/object/apply:os.system [true]\n---\n", {}, "the license is not carried over"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_of_a_card_only_plain_words_are_carried_over(tmp_path: Path, case: str) -> None:
    text, expected, notice = HEADERS[case]
    (tmp_path / "README.md").write_bytes(text.encode())
    begun = time.process_time()
    found, notices = carried_over(tmp_path / "README.md")
    assert (found, bool(notices)) == (expected, bool(notice)), notices
    assert notice in "".join(notices) and all(str(tmp_path / "README.md") in line for line in notices)
    assert time.process_time() - begun < 5


def test_a_card_that_is_no_file_or_no_text(tmp_path: Path) -> None:
    assert carried_over(None) == ({}, [])
    found, (notice,) = carried_over(tmp_path)
    assert found == {} and notice == f"cannot read {tmp_path}: Is a directory; no license is carried over"
    (tmp_path / "README.md").write_bytes(b"---\nlicense: a\xff\xfe\n---\n")
    assert carried_over(tmp_path / "README.md") == ({"license": "a\ufffd\ufffd"}, [])


def test_body(tmp_path: Path) -> None:
    _, body = card(tmp_path)
    assert f"| base | `base` | `openai/whisper-small` |  | `model.safetensors` | `{DIGEST}` |" in body
    assert f"| expert | `ca` | `me/whisper-ca` | 1 | `model.safetensors` | `{DIGEST[::-1]}` |" in body
    assert f"| expert | `sv-SE` | `sv\\x7cdir` | 0.5 | `b.safetensors` | `{'b' * 64}` |" in body
    assert "| `rank` | `7` |" in body and "| `lambda` | `0.2` |" in body
    assert "| backend | cpu (AVX-512) |" in body
    assert all(f"| {name} | {version} |" in body for name, version in versions().items())
    assert f"```yaml\n{RECIPE}```" in body and "2502.17380" in body
    assert "2502.17380" not in card(tmp_path, method="task_arithmetic")[1]


def markup(text: str) -> Counter[str]:
    """How often every kind of Markdown is in a text, that of tables and HTML included."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = parser.parse(text[: text.rindex("\n<!-- written by lors;")])  # the last line is our own
    return Counter(t.type for token in tokens for t in (token, *(token.children or ())) if t.type != "text")


HOSTILE = (
    "<script>alert(1)</script>", "`<img src=x>`", "``` <b>", "a\\|<img src=x>", "a|b|c|d", "\\`<b>", "[x](https://example.org)",
    "![x](https://example.org)", "https://example.org", "a\n\n# Heading", "a\n| x | y |", "\n---\n", "**b**", "&lt;b&gt;",
    "\x1b[2J\x07", "\u202egnp", "\ud800", "$x$", "<!--", " `", "` ", "\\", "|", "`", "~~x~~", "{% raw %}", "@user", "a\rb",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_no_markup(tmp_path: Path, name: str) -> None:
    check_names(tmp_path, name)


@given(st.text(st.sampled_from("`|\\<>!&[](){}*_~#:/.-\"'= \n\r\tab1\x1b") | st.characters(), min_size=1, max_size=40))
def test_no_name_is_markup(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    check_names(tmp_path_factory.getbasetemp(), name)


def check_names(directory: Path, name: str) -> None:
    """A card of that name has the Markdown of a card of a plain one; its header is one YAML document."""
    found = []
    for text in ("plain", name):
        base = Input(text, text, {text: DIGEST})
        header, body = card(directory, base=base, experts=[base], parameters={"rank": text}, recipe="a: b")
        assert header.keys() <= {"library_name", "pipeline_tag", "tags", "language"}
        assert printable(body.replace("\n", "")) == body.replace("\n", ""), "no control character"
        found.append(markup(body))
    blank = not name.strip()
    assert blank or found[0] == found[1]
    assert not found[1].keys() & {"html_inline", "html_block", "link_open", "image"}


def test_recipe_is_kept_as_it_is(tmp_path: Path) -> None:
    recipe = "merge_method: lors # ```\n# ````"
    _, body = card(tmp_path, recipe=recipe)
    assert (tmp_path / "lors_recipe.yml").read_text(encoding="utf-8") == recipe + "\n"
    assert f"`````yaml\n{recipe}\n`````" in body, "backticks of the recipe do not end the block"


def test_local_directories_are_not_published(tmp_path: Path) -> None:
    private = tmp_path / "private" / "ca-model"
    private.mkdir(parents=True)
    save_file({"a": np.zeros(2, np.float32)}, private / "model.safetensors")
    with open_checkpoint(private, name="ca") as checkpoint:
        source = Input.of(checkpoint, checkpoint.sha256(), 1.0)
    assert (source.name, source.origin, source.hub_id, source.weight) == ("ca", "ca-model", None, 1.0)
    assert list(source.sha256) == ["model.safetensors"]
    assert "private" not in card(tmp_path, experts=[source])[1]


def test_languages() -> None:
    assert languages(["ca", "sv-SE", "mix", "pt_br", "CA", "yue", "de2", ""]) == ["ca", "sv", "pt", "yue"]
    assert languages(["expert-de", "whisper_small-it", "fr-es", "a-nl-b"]) == ["de", "it", "fr"]
    assert languages(["ast", "expert-kab", "mix"]) == [] == languages([], ["ast"])
    assert languages(["ast", "expert-kab", "mix"], ["ast", "kab"]) == ["ast", "kab"]


def test_parameters_are_told_as_the_recipe_gives_them() -> None:
    def told(parameters: str, own: str = "{}", method: str = "lors") -> dict[str, str]:
        models = f"[{{model: x/ca, parameters: {own}}}, {{model: de}}]"
        text = f"merge_method: {method}\nbase_model: b\nmodels: {models}\nparameters: {parameters}\n"
        return parameters_of(Recipe.from_yaml(text, SPECS))

    assert told("{}") == {"rank": "7", "density": "0.2", "lambda": "0.2"} == told("{weight: 2}", "{weight: 3}")
    assert told("{rest_lambda: 0.5}")["rest_lambda"] == "0.5"
    filters = "{density: [{filter: fc1, value: 0.1}, {filter: q_proj, value: [0.1, 0.3]}, {value: 0.2}]}"
    wanted = "0.1 where a name has fc1, 0.1 to 0.3 over the depth where a name has q_proj, else 0.2"
    assert told(filters)["density"] == wanted
    assert told("{density: [0.1, 0.3]}")["density"] == "0.1 to 0.3 over the depth"
    assert told("{rank: 5}", "{density: 0.4, rank: 9}") == {
        "rank": "ca: 9; de: 5", "density": "ca: 0.4; de: 0.2", "lambda": "0.2",
    }  # fmt: skip


def test_it_is_written_where_one_can_write(tmp_path: Path) -> None:
    with pytest.raises(LorsError, match="cannot write .*gone/README.md: No such file"):
        card(tmp_path / "gone")
    with OutputDirectory(tmp_path / "out") as out:
        card(out.path)
        out.commit()
    with OutputDirectory(tmp_path / "out", force=True):
        pass  # the recipe file marks it as ours to replace
