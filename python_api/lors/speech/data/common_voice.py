"""Common Voice, as its releases unpack or as the archives of the hub, and CoVoST 2 on the former."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ...errors import LorsError
from .audio import AudioFile, AudioSource
from .languages import common_voice_code
from .left_out import LeftOut
from .opened import archived
from .tables import tsv_rows
from .utterance import Utterance


def _common_voice_root(place: str, language: str) -> Path:
    code = common_voice_code(language)
    for root in (Path(place, code), Path(place)):
        if (root / "clips").is_dir():
            return root
    raise LorsError(
        f"{place}: expected {code}/clips or clips (Common Voice as unpacked) or audio/{code}/SPLIT/*.tar, got neither"
    )


def common_voice(place: str, language: str, split: str, left_out: LeftOut) -> Iterator[Utterance]:
    code = common_voice_code(language)
    archives = sorted(Path(place, "audio", code, split).glob("*.tar"))
    if archives:
        inside, table = archived(place, archives), Path(place, "transcript", code, f"{split}.tsv")
        for _, row in tsv_rows(table, ["path", "sentence"], left_out):
            audio = inside.get(row["path"]) or AudioFile(archives[0].parent / row["path"])
            yield _clip(audio, row, None, language, split)
        return
    root = _common_voice_root(place, language)
    for _, row in tsv_rows(root / f"{split}.tsv", ["path", "sentence"], left_out):
        yield _clip(_unpacked(root, row), row, None, language, split)


def _unpacked(root: Path, row: dict[str, str]) -> AudioFile:
    return AudioFile(root / "clips" / row["path"])


def _clip(audio: AudioSource, row: dict[str, str], translation: str | None, language: str, split: str) -> Utterance:
    return Utterance(
        row["path"],
        audio,
        row["sentence"],
        translation,
        language,
        split,
        row.get("client_id") or None,
    )


def covost2(place: str, language: str, split: str, left_out: LeftOut) -> Iterator[Utterance]:
    """X -> English, from the split's own table or made by the release's rule from its table and Common Voice's.

    The rule of version 2: the rows of ``validated.tsv`` that ``covost_v2.ca_en.tsv`` has as well, joined on ``path``, in
    the order of the former; split s is what the latter's column ``split`` says, and train is ``train_covost`` too. A
    backslash escapes in these tables: the release's script writes them so.
    """
    root = _common_voice_root(place, language)
    code = common_voice_code(language)
    ready = _first_file([d / f"covost_v2.{code}_en.{split}.tsv" for d in (root, Path(place))])
    if ready is not None:
        for _, row in tsv_rows(ready, ["path", "sentence", "translation"], left_out, escape="\\"):
            yield _clip(_unpacked(root, row), row, row["translation"] or None, language, split)
        return
    table = _first_file([d / f"covost_v2.{code}_en.tsv" for d in (root, Path(place))])
    if table is None:
        raise LorsError(f"{place}: expected covost_v2.{code}_en.{split}.tsv or covost_v2.{code}_en.tsv, got neither")
    accepted = {split, "train_covost"} if split == "train" else {split}
    rows = tsv_rows(table, ["path", "translation", "split"], left_out, escape="\\")
    translations = {row["path"]: row["translation"] for _, row in rows if row["split"] in accepted}
    for _, row in tsv_rows(root / "validated.tsv", ["path", "sentence"], left_out, escape="\\"):
        if row["path"] in translations:
            yield _clip(_unpacked(root, row), row, translations[row["path"]] or None, language, split)


def _first_file(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)
