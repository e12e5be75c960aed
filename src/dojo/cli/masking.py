"""Addresses without what is secret in them: the one place where that is decided.

An address may carry a user's name and password (`http://name:password@host`) and keys in its query
(`?key=...`). Whatever is written or said goes through `hide` first; what is asked goes out as it
was given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

MASK = "***"

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
    masked = _ADDRESS.sub(lambda match: _masked(*_split(match)), text)
    for secret in sorted(known, key=len, reverse=True):
        masked = masked.replace(secret, MASK)
    return masked


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
