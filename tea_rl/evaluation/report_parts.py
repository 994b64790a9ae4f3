"""Pieces that the pages of runs and comparisons share."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable
from typing import Any

from tea_rl.evaluation.report_style import STYLE

#: Control characters, which no page may hold, as the pictures that Unicode has of them; tabs and line ends stay.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def clean(text: str) -> str:
    r"""A text with its control characters made visible and broken surrogates replaced.

    >>> clean("a\x1bb") == "a\u241bb"
    True
    """
    return text.translate(_VISIBLE).encode("utf-8", "replace").decode("utf-8")


def escape(text: str) -> str:
    """A text for any place in a page: what a model wrote stays text."""
    return html.escape(clean(text))


def html_page(title: str, parts: Iterable[str], style: str = "", script: str = "") -> str:
    """A page that needs nothing beside it, and is forbidden to ask for anything.

    Args:
        title: plain text.
        parts: pieces of HTML; empty ones are left out.
        style: after the common style sheet.
        script: the only one that the page may run.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - tea-rl</title><style>{STYLE}{style}</style></head><body><main>"
        + "\n".join(part for part in parts if part)
        + "</main>"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )


def json_for_script(value: Any) -> str:
    """JSON that can stand inside a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td><code>{escape(value)}</code></td></tr>" for key, value in items
    )
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as ``("a.b", "value")`` pairs; a long list of plain values is shortened."""
    if isinstance(value, dict) and value:
        return [
            pair
            for key, item in value.items()
            for pair in flatten(item, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [
            pair
            for index, item in enumerate(value)
            for pair in flatten(item, f"{prefix}[{index}]".lstrip("."))
        ]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(prefix, text if len(text) <= 200 else text[:199] + "…")]


def setting_groups(settings: dict[str, Any]) -> str:
    """Settings in their groups; empty where there are none."""
    blocks = "".join(
        f"<div class='group'><h3>{escape(name)}</h3>{pairs(flatten(value))}</div>"
        for name, value in settings.items()
    )
    return f'<div class="groups">{blocks}</div>' if blocks else ""


def number(value: Any) -> str:
    """A number for people: two decimals or two significant digits, NaN as NaN, a missing one as a dash."""
    if not isinstance(value, int | float):
        return "&ndash;"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 0.095 or value == 0 else f"{value:.2g}"
