"""The part of a run's page that says where its time went."""

from __future__ import annotations

from typing import Any

from tea_rl.evaluation.report_parts import escape, number

#: Told apart next to one another, in this order, again from the first after the last.
_COLOURS = (
    "#3b6ea5",
    "#d98c3f",
    "#5f9e6e",
    "#b65f5f",
    "#857aab",
    "#8d7866",
    "#c98cb5",
    "#8f8f8f",
    "#4f9a9a",
    "#b3a23c",
)
#: Narrower pieces of the bar carry no name.
_NAMED_SHARE = 0.07


def profile_section(profile: dict[str, Any]) -> str:
    """A bar and a table of the stages; empty without a profile."""
    stages = [stage for stage in profile.get("stages", []) if stage["seconds"] > 0]
    whole = sum(stage["seconds"] for stage in stages)
    if not whole:
        return ""
    bar, rows = [], []
    for place, stage in enumerate(stages):
        name, share = escape(stage["name"]), stage["seconds"] / whole
        colour = _COLOURS[place % len(_COLOURS)]
        bar.append(
            f'<span style="display:inline-block;overflow:hidden;width:{100 * share:.2f}%;background:{colour};color:#fff;'
            f'padding:.3em 0;text-align:center;font-size:.8em" title="{name} {share:.0%}">'
            f"{name if share >= _NAMED_SHARE else '&nbsp;'}</span>"
        )
        each = stage.get("seconds_a_step")
        rows.append(
            f'<tr><td><span style="color:{colour}">&#9632;</span> {name}</td><td class="number">{number(each or None)}</td>'
            f'<td class="number">{number(stage["seconds"])}</td><td class="number">{share:.1%}</td></tr>'
        )
    return (
        f'<section><h2>Where the time went</h2><div style="white-space:nowrap;font-size:0">'
        f'<div style="font-size:1rem">{"".join(bar)}</div></div>'
        "<table><thead><tr><th>Stage</th><th>Seconds a step (median)</th><th>Seconds</th><th>Share</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table><p>{number(profile['seconds'])} s, {profile['steps']} steps, since the run was "
        "last started.</p></section>"
    )
