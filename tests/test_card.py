"""The model card: a header the hub understands, every input with its digest, and the recipe that makes it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from lors.card import Source, languages, versions, write_card
from lors.checkpoint import open_checkpoint
from lors.errors import LorsError
from lors.output import OutputDirectory

DIGEST = "0123456789abcdef" * 4
RECIPE = "merge_method: lors\nbase_model: openai/whisper-small\nmodels:\n- model: me/ca  # Català\n"
BASE = Source("base", "openai/whisper-small", {"model.safetensors": DIGEST}, hub_id="openai/whisper-small")
EXPERTS = [
    Source("ca", "me/whisper-ca", {"model.safetensors": DIGEST[::-1]}, hub_id="me/whisper-ca", weight=1.0),
    Source("sv-SE", "sv|dir", {"a.safetensors": "a" * 64, "b.safetensors": "b" * 64}, weight=0.5),
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
    header, _ = card(tmp_path, base_card=tmp_path / "base.md")
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
    local = Source("mix", "dir", {"x": DIGEST})
    assert card(tmp_path, base=local, experts=[local], naming="other")[0] == {"tags": ["lors-merging", "merge"]}
    assert "library_name" not in card(tmp_path, naming="openai-whisper")[0]
    (tmp_path / "base.md").write_text("---\nlanguage: [en, zh]\nlicense: other\nlicense_name: mine\n---")
    header, _ = card(tmp_path, experts=[local], base_card=tmp_path / "base.md")
    assert (header["language"], header["license"], header["license_name"]) == (["en", "zh"], "other", "mine")


@pytest.mark.parametrize(
    "text", ["", "# no header", "---\n: [broken\n---\n", "---\n- a list\n---\n", "---\nlicense: x"]
)
def test_base_cards_without_a_usable_header(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.md").write_text(text)
    assert "license" not in card(tmp_path, base_card=tmp_path / "base.md")[0]


def test_body(tmp_path: Path) -> None:
    _, body = card(tmp_path)
    assert f"| base | base | openai/whisper-small |  | model.safetensors | `{DIGEST}` |" in body
    assert f"| expert | ca | me/whisper-ca | 1 | model.safetensors | `{DIGEST[::-1]}` |" in body
    assert f"| expert | sv-SE | sv\\|dir | 0.5 | b.safetensors | `{'b' * 64}` |" in body
    assert "| `rank` | `7` |" in body and "| `lambda` | `0.2` |" in body
    assert "| backend | cpu (AVX-512) |" in body
    assert all(f"| {name} | {version} |" in body for name, version in versions().items())
    assert f"```yaml\n{RECIPE}```" in body and "2502.17380" in body
    assert "2502.17380" not in card(tmp_path, method="task_arithmetic")[1]


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
        source = Source.of(checkpoint, checkpoint.sha256(), 1.0)
    assert (source.name, source.origin, source.hub_id, source.weight) == ("ca", "ca-model", None, 1.0)
    assert list(source.sha256) == ["model.safetensors"]
    assert "private" not in card(tmp_path, experts=[source])[1]


def test_languages() -> None:
    assert languages(["ca", "sv-SE", "mix", "pt_br", "CA", "yue", "de2", ""]) == ["ca", "sv", "pt", "yue"]


def test_it_is_written_where_one_can_write(tmp_path: Path) -> None:
    with pytest.raises(LorsError, match="cannot write .*gone/README.md: No such file"):
        card(tmp_path / "gone")
    with OutputDirectory(tmp_path / "out") as out:
        card(out.path)
        out.commit()
    with OutputDirectory(tmp_path / "out", force=True):
        pass  # the recipe file marks it as ours to replace
