"""The languages of the experiment, and the codes each corpus uses for them.

Inside this package a language is Whisper's code (``ca``, ``sv``); corpora are asked and read in their own codes.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import LorsError, nearest

__all__ = [
    "CHARACTER_LANGUAGES", "LANGUAGES", "common_voice_code", "fleurs_code", "language_name", "parse_languages",
    "spoken_code", "whisper_code",
]  # fmt: skip

# The paper's two groups of five, in its order.
LANGUAGES = ("ca", "de", "es", "fr", "it", "id", "nl", "pt", "ru", "sv")

# Written without spaces between words: scored by character.
CHARACTER_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "yue"})

_COMMON_VOICE = {
    "ga": "ga-IE", "hy": "hy-AM", "jw": "jv", "ne": "ne-NP", "nn": "nn-NO", "no": "nb-NO", "pa": "pa-IN", "sv": "sv-SE",
    "zh": "zh-CN",
}  # fmt: skip
_WHISPER = {"cmn": "zh", "fil": "tl", "jv": "jw", "nb": "no"}  # where its code is not ISO's
_FLEURS_NAMES = (
    "af_za am_et ar_eg as_in ast_es az_az be_by bg_bg bn_in bs_ba ca_es ceb_ph ckb_iq cmn_hans_cn cs_cz cy_gb da_dk de_de "
    "el_gr en_us es_419 et_ee fa_ir ff_sn fi_fi fil_ph fr_fr ga_ie gl_es gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id "
    "ig_ng is_is it_it ja_jp jv_id ka_ge kam_ke kea_cv kk_kz km_kh kn_in ko_kr ky_kg lb_lu lg_ug ln_cd lo_la lt_lt luo_ke "
    "lv_lv mi_nz mk_mk ml_in mn_mn mr_in ms_my mt_mt my_mm nb_no ne_np nl_nl nso_za ny_mw oc_fr om_et or_in pa_in pl_pl "
    "ps_af pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in tg_tj th_th tr_tr uk_ua umb_ao "
    "ur_pk uz_uz vi_vn wo_sn xh_za yo_ng yue_hant_hk zu_za"
)


def whisper_code(code: str) -> str:
    """Whisper's code for a corpus's code: ``sv-SE``, ``sv_se``, ``sv`` -> ``sv``; ``cmn_hans_cn`` -> ``zh``."""
    head = code.strip().replace("_", "-").split("-")[0].lower()
    return _WHISPER.get(head, head)


def language_name(language: str) -> str:
    """What transformers calls it in English: ``ca`` -> ``catalan``; the code itself where it has no name for it."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return LANGUAGES.get(language, language)


def spoken_code(text: str) -> str:
    """Whisper's code for a code, or an English name, as tables have them: ``sv-SE``, ``Swedish`` -> ``sv``."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return TO_LANGUAGE_CODE.get(text.strip().lower()) or whisper_code(text)


def common_voice_code(language: str) -> str:
    """The code of Common Voice and CoVoST 2."""
    return _COMMON_VOICE.get(language, language)


def fleurs_code(language: str) -> str:
    """The configuration name of FLEURS; LorsError for a language that is none of its 102."""
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


_FLEURS = {whisper_code(name): name for name in _FLEURS_NAMES.split()}
