"""Addresses without what is secret in them: the one place where that is decided.

An address may carry a user's name and password (`http://name:password@host`) and keys in its query
(`?key=...`). Whatever is written or said goes through `hide` first; what is asked goes out as it
was given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import unquote, urlsplit

MASK = "***"
SECRET_FLAGS = ("--webhook",)  # whose value is a secret as a whole, its path too
_WORDS = ("initializer_token", "new_token")  # tokens of a text
_kept: set[str] = set()  # what `hide` masks wherever it stands

# A scheme, then what may be user info, an address in brackets (IPv6), and the rest. A text may go
# on after an address: quotes, commas, brackets and spaces end it.
_ADDRESS = re.compile(
    r"""(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,15}://)
        (?P<user>[^\s\[\]<>"',]*@)?
        (?P<rest>(\[[0-9A-Fa-f:.%]*\])?[^\s\[\]<>"',]*)""",
    re.VERBOSE,
)
_HOST = re.compile(r"[^:@/?\#]*(:[0-9]*)?([/?\#]|$)")  # what stands there where there is no user


def hide(text: str, known: Sequence[str] = ()) -> str:
    """A text with the user info and the query values of its addresses masked.

    Args:
        known: secrets that are masked wherever they stand, as an answer may repeat them.
    """
    for secret in sorted(_kept, key=len, reverse=True):  # addresses among them: as they are
        text = text.replace(secret, MASK)
    masked = _ADDRESS.sub(lambda match: _masked(*_split(match)), text)
    for secret in sorted(known, key=len, reverse=True):
        masked = masked.replace(secret, MASK)
    return masked


def keep(secret: str) -> None:
    """From now on `hide` masks this text, and of an address its path too, in whatever is said."""
    rest = ""
    with suppress(ValueError):
        parts = urlsplit(secret)
        rest = f"{parts.path}?{parts.query}" if parts.query else parts.path
    _kept.update(one for one in (secret, rest) if len(one) >= 8)


def keep_flagged(words: Sequence[str]) -> None:
    """Keeps what stands behind flags whose value is a secret."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") in [one.replace("-", "_") for one in SECRET_FLAGS]:
            keep(value if equals else "".join(words[i + 1 : i + 2]))


def is_secret(name: str) -> bool:
    """Whether an option of this name, such as hub_token, is neither written down nor shown."""
    named = name.endswith(("_token", "_key", "password")) and name not in _WORDS
    return named or f"--{name}" in SECRET_FLAGS


def secrets(text: str) -> list[str]:
    """What `hide` masks in a text: names, passwords, query values, also as they are once decoded.

    Short ones, of less than four characters, are left out: they stand everywhere.
    """
    found: list[str] = []
    for match in _ADDRESS.finditer(text):
        _, user, _, query, _ = _split(match)
        found += [user, *user.partition(":")[::2]]
        found += [pair.partition("=")[2] or pair for pair in query.split("&")]
    found += [unquote(one) for one in found]
    return [one for one in dict.fromkeys(found) if len(one) >= 4]


def without_user(address: str) -> tuple[str, str]:
    """An address that one can connect to, and the user info that was in it ("" for none)."""
    match = _ADDRESS.match(address)
    user = _split(match)[1] if match else ""
    return (address.replace(f"{user}@", "", 1), user) if user else (address, "")


def _split(match: re.Match[str]) -> tuple[str, str, str, str, str]:
    """Scheme, user info, host and path, query, fragment; without the marks between them."""
    user, rest = match["user"] or "", match["rest"]
    if user and _HOST.match(user):  # an @ in a path or a query, and nobody's name
        user, rest = "", user + rest
    rest, _, fragment = rest.partition("#")
    place, _, query = rest.partition("?")
    return match["scheme"], user[:-1], place, query, fragment


def _masked(scheme: str, user: str, place: str, query: str, fragment: str) -> str:
    pairs = [pair.partition("=") for pair in query.split("&")] if query else []
    values = "&".join(f"{name}={MASK}" if equals else MASK for name, equals, _ in pairs)
    return "".join(
        (
            *(scheme, f"{MASK}@" if user else "", place),
            *(f"?{values}" if values else "", f"#{fragment}" if fragment else ""),
        )
    )
