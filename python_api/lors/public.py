"""URLs without what must not be seen: user, password, and the query, which holds the signatures of shared links."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

__all__ = ["public", "public_text", "secrets_of"]

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,30}"
_URL = re.compile(f"{_SCHEME}://")
_LINK = re.compile(rf"::(?={_SCHEME}(?:://|::|$))")  # of fsspec's chains: zip://x::https://...
_IN_TEXT = re.compile(rf"{_SCHEME}://[^\s'\"<>`]+")
_CONTAINER = {"abfs", "abfss", "wasb", "wasbs"}  # what stands before their @ is part of the place


def public(url: str) -> str:
    """The URL as it may be printed and stored. Anything else stays as it is."""
    return "::".join(map(_public_link, _LINK.split(url))) if "://" in url else url


def public_text(text: str) -> str:
    """A text with every URL in it `public`."""
    if "://" not in text:
        return text
    return _IN_TEXT.sub(_public_match, text)


def secrets_of(url: str) -> list[str]:
    """The parts of a URL that `public` leaves out, as written and decoded; the longest first."""
    found: set[str] = set()
    for link in _LINK.split(url):
        _, user, _, query = _parts(link)
        values = [value for pair in parse_qsl(query, keep_blank_values=True) for value in pair[1:]]
        found.update(
            [user, *user.split(":", 1), query, *values, *(part.partition("=")[2] for part in query.split("&"))]
        )
    found |= {unquote(part) for part in found}
    return sorted((part for part in found if len(part) > 2), key=len, reverse=True)


def _public_match(match: re.Match[str]) -> str:
    url = match[0].rstrip(".,:;)]}")
    return public(url) + match[0][len(url) :]


def _public_link(link: str) -> str:
    scheme, _, place, _ = _parts(link)
    return f"{scheme}{place}"


def _parts(link: str) -> tuple[str, str, str, str]:
    """scheme with "://", user and password, host and path, query and fragment."""
    if not _URL.match(link):
        return link, "", "", ""
    scheme, mark, rest = link.partition("://")
    place, query = (re.split(r"[?#]", rest, maxsplit=1) + [""])[:2]
    authority, slash, path = place.partition("/")
    user, at, host = authority.rpartition("@")
    if not at and "@" in path and re.search(r":(?!\d*$)", authority) and not authority.startswith("["):
        user, at, host = place.rpartition("@")  # a password with a slash in it, which no library reads as one
        return scheme + mark, user, host, query
    if scheme.lower() in _CONTAINER and ":" not in user:
        user, host = "", authority
    return scheme + mark, user, f"{host}{slash}{path}", query
