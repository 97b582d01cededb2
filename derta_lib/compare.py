"""Two runs side by side: what changed, with intervals, and whether it got worse.

Differences are paired where both runs kept the outcomes of the same items (bootstrap over items), and taken as
independent otherwise: for two rates that is Newcombe's (1998) method 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from derta_lib import results
from derta_lib.errors import DertaError, UsageError
from derta_lib.records import read_json, write_text
from derta_lib.results import Number, Results
from derta_lib.runs import merge, outcomes
from derta_lib.stats import combine, difference

MUST_AGREE = ("model", "data", "behaviours", "max_new_tokens")
"""Parameters that decide what is measured, in every notebook that has them; data are compared by their hashes."""

BETTER = {
    "asr": -1,
    "benign_refusal": -1,
    "deviation": -1,
    "seconds": -1,
    "fluent": 1,
    "recovers": 1,
    "helpfulness": 1,
}
"""Metrics that can get worse, wherever they stand in a key: -1 where lower is better."""


@dataclass(frozen=True)
class Change:
    """A key of two runs; `difference` is second minus first, in points for rates; None where one run lacks the key."""

    key: str
    first: Number | None
    second: Number | None
    difference: Number | None
    paired: bool

    @property
    def metric(self) -> str:
        parts = self.key.split("/")
        return next((part for part in parts if part in BETTER), parts[0])

    @property
    def sign(self) -> int:
        """1 or -1 when the second run's number is higher or lower beyond its interval, else 0."""
        if self.difference is None:
            return 0
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            low = high = self.difference.value
        return (low > 0) - (high < 0)


def compare(first: Path, second: Path) -> list[Change]:
    """Every key of two run folders. Raises UsageError saying what differs when the runs measured different things."""
    (a, made_a), (b, made_b) = _load(first), _load(second)
    if unlike := _unlike(made_a, made_b):
        raise UsageError(f"{first.name} and {second.name} cannot be compared: {'; '.join(unlike)}.")
    items_a, items_b = _outcomes(first, a), _outcomes(second, b)
    return [_change(key, a.get(key), b.get(key), items_a.get(key), items_b.get(key)) for key in sorted({*a, *b})]


def worse(changes: Sequence[Change], metrics: Sequence[str]) -> list[Change]:
    """Changes for the worse in `metrics`, beyond their interval.

    Raises UsageError for a metric without a known direction, and DertaError for one that the second run has not
    measured wherever the first did: what was not measured cannot be said to be no worse.
    """
    for metric in metrics:
        if metric not in BETTER:
            raise UsageError(f"--fail-on {metric}: the metrics with a better side are {', '.join(BETTER)}.")
        measured = [change for change in changes if change.metric == metric and change.first]
        if not measured:
            raise DertaError(f"--fail-on {metric}: the first run has none, so nothing can be compared.")
        if lost := [change.key for change in measured if change.second is None]:
            raise DertaError(
                f"--fail-on {metric}: the second run lacks {lost[0]} ({len(lost)} in all); "
                "make both runs with the same parameters."
            )
    return [c for c in changes if c.metric in metrics and c.sign == -BETTER[c.metric]]


def summary(changes: Sequence[Change]) -> str:
    """How many results of two runs changed, in a sentence."""
    moved, alone = sum(change.sign != 0 for change in changes), sum(c.difference is None for c in changes)
    told = f"{moved or 'None'} of {len(changes) - alone} results in both runs changed beyond the interval."
    return told + (f" {alone} stand in one run only." if alone else "")


def write_page(first: Path, second: Path, changes: Sequence[Change]) -> Path:
    """`compare-<first>.html` in the second run's folder: one table, changes first, needing nothing beside it."""
    title = f"{second.name} compared with {first.name}"
    columns = ["result", first.name, second.name, "difference", "interval", "verdict"]
    ordered = [row(change) for change in sorted(changes, key=lambda change: change.sign == 0)]
    table = pd.DataFrame(ordered, columns=columns).to_html(index=False, border=0)
    style = (
        "body{font-family:sans-serif;margin:2rem}div{overflow-x:auto}"
        "td,th{padding:.2rem .7rem;text-align:left;white-space:nowrap}"
    )
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><meta name="viewport" '
        f'content="width=device-width"><style>{style}</style></head><body><h1>{title}</h1>\n<p>{summary(changes)}</p>\n'
        f"<div>{table}</div></body></html>\n"
    )
    return write_text(second / f"compare-{first.name}.html", page)


def row(change: Change) -> tuple[str, ...]:
    """One line of the page: key, both numbers, difference, kind of interval, for better or for worse."""
    missing = "not in this run"
    kind = (
        ""
        if change.difference is None or change.difference.low is None
        else "paired"
        if change.paired
        else "independent"
    )
    moved = {0: "no clear change", 1: "higher", -1: "lower"}[change.sign] if change.difference else ""
    if change.sign and change.metric in BETTER:
        moved = "better" if change.sign == BETTER[change.metric] else "worse"
    return (
        change.key,
        str(change.first or missing),
        str(change.second or missing),
        str(change.difference or ""),
        kind,
        moved,
    )


def _load(folder: Path) -> tuple[Results, dict[str, Any]]:
    """Results and manifest of a run: its files as they are, or made from its parts where those are newer."""
    if not folder.is_dir():
        known = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        raise UsageError(f"there is no run '{folder.name}'; the runs are {', '.join(known) or 'none yet'}.")
    told, made = folder / "results.json", folder / "manifest.json"
    parts = max((path.stat().st_mtime_ns for path in (folder / "parts").glob("*.json")), default=0)
    if told.exists() and made.exists() and min(told.stat().st_mtime_ns, made.stat().st_mtime_ns) >= parts:
        return results.load(told), read_json(made)
    return merge(folder)


def _outcomes(folder: Path, told: Results) -> dict[str, dict[str, float]]:
    """Outcomes by item; DertaError where their mean is not what results.json says, since one of them was edited."""
    found = outcomes(folder)
    for key, items in found.items():
        if key in told and items and abs(told[key].value - (mean := sum(items.values()) / len(items))) > 1e-9:
            raise DertaError(
                f"{folder / 'results.json'}: '{key}' is {told[key].value}, but the outcomes under parts/ give {mean}; "
                "one of the two was edited: make the run again, or delete results.json."
            )
    return found


def _unlike(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    said = []
    for stem in sorted({*a["notebooks"]} & {*b["notebooks"]}):
        parts = a["notebooks"][stem], b["notebooks"][stem]
        for name in MUST_AGREE:
            one, other = (part["parameters"].get(name) for part in parts)
            if one != other:
                said.append(f"{name} is {one} in one and {other} in the other ({stem})")
        hashes = [{k: v for k, v in part["records"].items() if k.startswith("sha256/")} for part in parts]
        said += [
            f"the data file {k[7:]} differs ({stem})" for k in hashes[0] if hashes[1].get(k) not in (None, hashes[0][k])
        ]
    if not {*a["notebooks"]} & {*b["notebooks"]}:
        said.append("they have no notebook in common")
    return said


def _change(
    key: str, a: Number | None, b: Number | None, items_a: dict[str, float] | None, items_b: dict[str, float] | None
) -> Change:
    if a is None or b is None:
        return Change(key, a, b, None, False)
    if a.unit != b.unit:
        raise DertaError(f"result '{key}' is in {a.unit} in one run and in {b.unit} in the other; make one run again.")
    if items_a and items_b and items_a.keys() == items_b.keys() and a.unit == "rate":
        ids = sorted(items_a)
        paired = difference([items_b[i] for i in ids], [items_a[i] for i in ids], ids)
        return Change(key, a, b, paired, True)
    bounded = None not in (a.low, a.high, b.low, b.high)
    apart = combine([(b, 1.0), (a, -1.0)]) if bounded else Number(b.value - a.value, a.unit)
    scale, unit = (100, "points") if a.unit == "rate" else (1, a.unit)
    low, high = (None if bound is None else bound * scale for bound in (apart.low, apart.high))
    return Change(key, a, b, Number(apart.value * scale, unit, None, low, high), False)
