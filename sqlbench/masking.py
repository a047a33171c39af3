"""Removal of credentials from texts that others wrote, even if they are escaped, encoded or cut."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable
from itertools import groupby
from urllib.parse import quote, quote_plus, unquote

SHORTEST = 6
"""Characters of the shortest secret that is masked: a shorter one would be found in any text."""
PART = 10
"""Consecutive characters that give a secret away; an endpoint may cut or wrap the text that it repeats."""
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([nrt])|(.))")


def mask(text: str, secrets: Iterable[str]) -> str:
    """Replace every secret in a text by ``***``.

    A text that holds one in escaped form (JSON, URL, HTML, repr) is returned without any escapes.
    """
    escaped = {form for secret in secrets if len(secret) >= SHORTEST for form in _escaped(secret)}
    forms = {form for secret in escaped for form in _encoded(secret)}
    for candidate in (_unescaped(text), text):
        hidden = _without(candidate, forms)
        if hidden != candidate:
            return hidden
    return text


def _escaped(secret: str) -> set[str]:
    """Return the forms that a secret may have before it is encoded; for most keys they are all the same."""
    ways = (
        _unescaped,
        quote,
        quote_plus,
        html.escape,
        lambda text: json.dumps(text)[1:-1],
        lambda text: repr(text)[1:-1],
    )
    return {secret, *(way(secret) for way in ways)}


def _encoded(secret: str) -> list[str]:
    """Return the secret as it is, in hexadecimal, and in base64 at each offset in the encoded text."""
    raw = secret.encode()
    forms = [secret, raw.hex()]
    for before in range(3):
        text = base64.b64encode(bytes(before) + raw).decode().rstrip("=")
        # The first and last characters also depend on the neighbours.
        text = text[(0, 2, 3)[before] : len(text) - ((before + len(raw)) % 3 > 0)]
        forms += [text, text.translate(str.maketrans("+/", "-_"))]
    return forms


def _unescaped(text: str) -> str:
    for _ in range(4):  # texts that were escaped more than once
        before = text
        text = html.unescape(unquote(text))
        text = _ESCAPE.sub(lambda m: " " if m[3] else m[4] or chr(int(m[1] or m[2], 16)), text)
        if text == before:
            break
    return text


def _without(text: str, forms: Iterable[str]) -> str:
    """Mask parts of the forms in a text, regardless of case and of white space in between."""
    places = [i for i, c in enumerate(text) if not c.isspace()]
    compact = "".join(text[i].lower() if text[i].isascii() else text[i] for i in places)
    hidden = [False] * len(text)
    for form in forms:
        form = "".join(c.lower() if c.isascii() else c for c in form if not c.isspace())
        if len(form) < SHORTEST:
            continue
        size = min(len(form), PART)
        parts = {form[i : i + size] for i in range(len(form) - size + 1)}
        for start in range(len(compact) - size + 1):
            if compact[start : start + size] in parts:
                first, last = places[start], places[start + size - 1]
                hidden[first : last + 1] = [True] * (last + 1 - first)
    runs = groupby(zip(hidden, text, strict=True), lambda pair: pair[0])
    return "".join("***" if hide else "".join(c for _, c in run) for hide, run in runs)
