"""The languages of the experiment, and the codes each corpus uses for them.

Inside this package a language is Whisper's code (``ca``, ``sv``); corpora are asked and read in their own codes.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import LorsError, nearest

__all__ = ["CHARACTER_LANGUAGES", "LANGUAGES", "common_voice_code", "fleurs_code", "parse_languages", "whisper_code"]

# The paper's two groups of five, in its order.
LANGUAGES = ("ca", "de", "es", "fr", "it", "id", "nl", "pt", "ru", "sv")

# Written without spaces between words: scored by character.
CHARACTER_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})

_COMMON_VOICE = {"sv": "sv-SE", "zh": "zh-CN", "ga": "ga-IE", "pa": "pa-IN"}
_FLEURS = {
    "ar": "ar_eg", "ca": "ca_es", "de": "de_de", "en": "en_us", "es": "es_419", "et": "et_ee", "fa": "fa_ir",
    "fr": "fr_fr", "id": "id_id", "it": "it_it", "ja": "ja_jp", "lv": "lv_lv", "mn": "mn_mn", "nl": "nl_nl",
    "pt": "pt_br", "ru": "ru_ru", "sl": "sl_si", "sv": "sv_se", "ta": "ta_in", "tr": "tr_tr", "cy": "cy_gb",
    "zh": "cmn_hans_cn", "th": "th_th", "lo": "lo_la", "my": "my_mm",
}  # fmt: skip


def whisper_code(code: str) -> str:
    """Whisper's code for a corpus's code: ``sv-SE``, ``sv_se``, ``sv`` -> ``sv``; ``cmn_hans_cn`` -> ``zh``."""
    head = code.strip().replace("_", "-").split("-")[0].lower()
    return {"cmn": "zh", "nb": "no"}.get(head, head)


def common_voice_code(language: str) -> str:
    """The code of Common Voice and CoVoST 2."""
    return _COMMON_VOICE.get(language, language)


def fleurs_code(language: str) -> str:
    """The configuration name of FLEURS; LorsError for a language this table has no name for."""
    if language not in _FLEURS:
        raise LorsError(f"FLEURS: expected a known language, got {language!r}{nearest(language, _FLEURS)}")
    return _FLEURS[language]


def parse_languages(text: str | Iterable[str]) -> tuple[str, ...]:
    """``ca,de,sv-SE`` (or a sequence) -> Whisper's codes, in order, without repeats."""
    parts = text.split(",") if isinstance(text, str) else list(text)
    codes = tuple(dict.fromkeys(whisper_code(part) for part in parts if part.strip()))
    if not codes:
        raise LorsError(f"languages: expected at least one code such as ca,de, got {text!r}")
    return codes
