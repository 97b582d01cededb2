"""Two runs side by side: what changed, with intervals, and whether it got worse.

Differences are paired where both runs kept the outcomes of the same items (bootstrap over items), and taken as
independent otherwise: for two rates that is Newcombe's (1998) method 10. Whether a result changed is tested: by
McNemar's exact test where outcomes are paired, by the interval otherwise. Holm's (1979) correction over the results
tested at once keeps the chance of any false alarm in a comparison at 5 % or less; results that are the same in both
runs, such as kept figures, are not counted in it. What is tested are the two runs' models on these items: how much
another training would differ, `derta seeds` tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from math import inf, sqrt
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest, fisher_exact, norm, t

from derta_lib import results
from derta_lib.errors import DertaError, UsageError
from derta_lib.records import read_json, write_text
from derta_lib.results import Number, Results
from derta_lib.runs import kept_items, merge
from derta_lib.stats import LEVEL, combine, difference

SEARCH = ("searched", "streams", "iterations", "population", "generations")
MUST_AGREE = ("model", "behaviours", "max_new_tokens", "attacks", "probes", *SEARCH)
"""Parameters that decide what is measured, in every notebook that has them (some rates are over all attacks); data
count by their hashes.
"""

BETTER = {"asr": -1, "benign_refusal": -1, "fluent": 1, "recovers": 1, "helpfulness": 1}
"""Metrics that can get worse, wherever they stand in a key: -1 where lower is better."""


@dataclass(frozen=True)
class Change:
    """A key of two runs; `difference` is second minus first, in points for rates; None where one run lacks the key.

    `p` is two-sided, None where nothing differs, or there is no interval to test it by; `clear` says whether the
    difference stands beside the other results tested.
    """

    key: str
    first: Number | None
    second: Number | None
    difference: Number | None = None
    paired: bool = False
    p: float | None = None
    clear: bool = False

    @property
    def metric(self) -> str:
        parts = self.key.split("/")
        return next((part for part in parts if part in BETTER), parts[0])

    @property
    def sign(self) -> int:
        """1 or -1 when the second run's number is clearly higher or lower, else 0."""
        if self.difference is None or not self.clear:
            return 0
        return (self.difference.value > 0) - (self.difference.value < 0)


def compare(first: Path, second: Path) -> list[Change]:
    """Every key of two run folders. Raises UsageError saying what differs when the runs measured different things."""
    (a, made_a), (b, made_b) = _load(first), _load(second)
    if unlike := _unlike(made_a, made_b):
        raise UsageError(f"{first.name} and {second.name} cannot be compared: {'; '.join(unlike)}.")
    items_a, items_b = _outcomes(first, a), _outcomes(second, b)
    return _holm([_change(key, a.get(key), b.get(key), items_a.get(key), items_b.get(key)) for key in sorted({*a, *b})])


def worse(changes: Sequence[Change], metrics: Sequence[str]) -> list[Change]:
    """Clear changes for the worse in `metrics`, by Holm's correction over the results in these metrics alone.

    Raises UsageError for a metric without a known direction, and DertaError for one that the second run has not
    measured wherever the first did, or that has no interval anywhere, and where no change could be clear, so few
    crafts stand behind it: what was not measured, or cannot be tested, cannot be said to be no worse.
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
        if all(change.difference is None or change.difference.low is None for change in measured):
            raise DertaError(f"--fail-on {metric}: its numbers have no intervals, so a change may be chance alone.")
    tested = [change for change in changes if change.metric in metrics and change.p is not None]
    pairs = [change.difference.n or 0 for change in tested if change.paired and change.difference]
    if tested and len(pairs) == len(tested) and 2.0 ** (1 - max(pairs)) > (1 - LEVEL) / len(tested):
        raise DertaError(
            f"--fail-on {', '.join(metrics)}: with {max(pairs)} crafts or fewer behind each of {len(tested)} results, "
            "no change could be told from chance; make both runs with more (--set behaviours=16)."
        )
    return [c for c in _holm([c for c in changes if c.metric in metrics]) if c.sign == -BETTER[c.metric]]


def summary(changes: Sequence[Change]) -> str:
    """How many results of two runs changed, in a sentence."""
    moved, alone = sum(change.clear for change in changes), sum(c.difference is None for c in changes)
    told = (
        f"{moved or 'None'} of {len(changes) - alone} results in both runs changed clearly (Holm's correction over "
        f"{sum(change.p is not None for change in changes)} tests; by chance alone, any in at most 5 % of comparisons)."
    )
    return told + (f" {alone} stand in one run only." if alone else "")


def write_page(first: Path, second: Path, changes: Sequence[Change]) -> Path:
    """`compare-<first>.html` in the second run's folder: one table, changes first, needing nothing beside it."""
    title = escape(f"{second.name} compared with {first.name}")
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
    bounded = change.difference is not None and change.difference.low is not None
    kind = "" if not bounded else "paired" if change.paired else "independent"
    moved = {0: "no clear change", 1: "higher", -1: "lower"}[change.sign] if change.difference else ""
    if change.difference and change.difference.value and change.p is None:
        moved = "not tested"
    if change.sign and change.metric in BETTER:
        moved = "better" if change.sign == BETTER[change.metric] else "worse"
    numbers = (str(number or "not in this run") for number in (change.first, change.second))
    return change.key, *numbers, str(change.difference or ""), kind, moved


def _load(folder: Path) -> tuple[Results, dict[str, Any]]:
    """Results and manifest of a run: its files as they are, or made from its parts where those are newer."""
    if not folder.is_dir():
        known = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        there = ", ".join(known) or "none yet"
        raise UsageError(f"there is no run '{folder.name}' in {folder.parent}; the runs are {there}.")
    told, made = folder / "results.json", folder / "manifest.json"
    parts = max((path.stat().st_mtime_ns for path in (folder / "parts").glob("*.json")), default=0)
    if told.exists() and made.exists() and min(told.stat().st_mtime_ns, made.stat().st_mtime_ns) >= parts:
        manifest = read_json(made)
        try:
            _ = [{**part["parameters"], **part["records"]} for part in manifest["notebooks"].values()]
        except (AttributeError, KeyError, TypeError):
            raise DertaError(f"{made}: this is no manifest of a run; make the run again.") from None
        return results.load(told), manifest
    return merge(folder)


def _outcomes(folder: Path, told: Results) -> dict[str, dict[str, float]]:
    """Outcomes by item; DertaError where their mean is not what results.json says, since one of them was edited."""
    found = kept_items(folder)
    for key, items in found.items():
        if key in told and items and abs(told[key].value - (mean := sum(items.values()) / len(items))) > 1e-9:
            raise DertaError(
                f"{folder / 'results.json'}: '{key}' is {told[key].value}, but the outcomes under parts/ give {mean}; "
                "one of the two was edited: make the run again, or delete results.json."
            )
    return found


def _unlike(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    if not (common := a["notebooks"].keys() & b["notebooks"].keys()):
        return ["they have no notebook in common"]
    said = []
    for stem in sorted(common):
        parts = a["notebooks"][stem], b["notebooks"][stem]
        for name in MUST_AGREE:
            one, other = (part["parameters"].get(name) for part in parts)
            if one != other:
                said.append(f"{name} is {one} in one and {other} in the other ({stem})")
        hashes = [{k: v for k, v in part["records"].items() if k.startswith("sha256/")} for part in parts]
        both = sorted({*hashes[0], *hashes[1]})
        said += [f"the data file {k[7:]} differs ({stem})" for k in both if hashes[0].get(k) != hashes[1].get(k)]
    return said


def _change(
    key: str, a: Number | None, b: Number | None, items_a: dict[str, float] | None, items_b: dict[str, float] | None
) -> Change:
    if a is None or b is None:
        return Change(key, a, b)
    if a.unit != b.unit:
        raise DertaError(f"result '{key}' is in {a.unit} in one run and in {b.unit} in the other; make one run again.")
    if items_a and items_b and items_a.keys() == items_b.keys() and a.unit == "rate":
        ids = sorted(items_a)
        rose, fell = (sum(sign * (items_b[i] - items_a[i]) > 0 for i in ids) for sign in (1, -1))
        p = float(binomtest(rose, rose + fell).pvalue) if rose + fell else None
        return Change(key, a, b, difference([items_b[i] for i in ids], [items_a[i] for i in ids], ids), True, p)
    apart = combine([(b, 1.0), (a, -1.0)])
    scale, unit = (100, "points") if a.unit == "rate" else (1, a.unit)
    low, high = (None if bound is None else bound * scale for bound in (apart.low, apart.high))
    return Change(key, a, b, Number(apart.value * scale, unit, None, low, high), False, _p_value(a, b, apart))


def _p_value(a: Number, b: Number, apart: Number) -> float | None:
    """Two-sided p-value of a difference that many half-widths of its interval off 0, in Student's t by the fewer
    trials.

    For two rates it is no less than Fisher's exact test gives, since the interval of few trials is an approximation.
    None where the difference is 0, or its interval is missing or without width.
    """
    bound = apart.low if apart.value > 0 else apart.high
    if not apart.value or bound is None or bound == apart.value:
        return None
    trials = [_trials(number) for number in (a, b)]
    df = max(1, min(trials) - 1)
    p = 2 * t.sf(t.ppf((1 + LEVEL) / 2, df) * abs(apart.value / (apart.value - bound)), df)
    if a.unit == "rate" and a.n and b.n:
        both = zip((a, b), map(round, trials), strict=True)
        counts = [(k := round(number.value * n), n - k) for number, n in both]
        p = max(p, fisher_exact(counts).pvalue)
    return float(p)


def _trials(number: Number) -> float:
    """n; for a rate no more than the independent trials that would give its interval its width (by Wilson), for where
    several outcomes are of one item they are worth fewer.
    """
    n = number.n or inf
    if number.unit != "rate" or number.low is None or number.high is None or n == inf:
        return n
    width, spread = number.high - number.low, number.value * (1 - number.value)
    if not 0 < width < 1:
        return n if width <= 0 else 1
    # Wilson's width w with x = z²/n: (w² − 1) x² + (2 w² − 4 p (1 − p)) x + w² = 0
    a, b, c = width**2 - 1, 2 * width**2 - 4 * spread, width**2
    x = (-b - sqrt(b * b - 4 * a * c)) / (2 * a)
    return min(n, max(1, norm.ppf((1 + LEVEL) / 2) ** 2 / x))


def _holm(changes: Sequence[Change]) -> list[Change]:
    """The changes anew, `clear` where Holm's procedure over all their p-values says so."""
    left = sorted(change.p for change in changes if change.p is not None)
    while left and left[0] <= (1 - LEVEL) / len(left):
        left.pop(0)
    border = left[0] if left else inf
    return [replace(change, clear=change.p is not None and change.p < border) for change in changes]
