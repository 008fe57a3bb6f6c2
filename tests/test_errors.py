"""Text on its way to a terminal."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors.errors import LorsError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("C:\\models\\català ру́сский 日本語 🙂", "C:\\models\\català ру́сский 日本語 🙂"),
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("\x9b31m", "\\x9b31m"),  # one byte of C1 is a whole "ESC ["
        ("a\nerror: b\r\t\0\x7f", "a\\nerror: b\\r\\t\\x00\\x7f"),
        ("a\u2028b\u2029c\x85", "a\\u2028b\\u2029c\\x85"),
        ("gnp.\u202etxt", "gnp.\\u202etxt"),
        ("\udcff", "\\udcff"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(codec=None)))
def test_printable_text_is_one_line_of_visible_characters(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert printable(shown) == shown


def test_every_control_and_format_character_is_escaped() -> None:
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert printable(chr(code)).isascii(), hex(code)


def test_messages_are_printable_and_short() -> None:
    assert str(LorsError("tensor 'a\x1b[2J\u202e\ud800'")) == "tensor 'a\\x1b[2J\\u202e\\ud800'"
    assert len(str(LorsError("x" * 10**6))) <= 1500
    assert len(str(LorsError("\U000e0001" * 10**6))) <= 1500
