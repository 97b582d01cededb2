"""The claims ledger: what the paper claims, what this run found, and a verdict computed from a written rule.

`claims.json` holds the statements; one claim more is made for each cell of the paper's tables and figures. The paper's
values are references into the CSV files of `derta_lib/paper`, ours are keys of a run's results.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from derta_lib import paper
from derta_lib.errors import DertaError
from derta_lib.records import read_json
from derta_lib.results import Number, Results
from derta_lib.stats import combine
from derta_lib.style import in_words

REPRODUCED = "reproduced on the authors' generations"
SAME_DIRECTION = "same direction at small scale"
NOT_REPRODUCED = "not reproduced"
NOT_TESTED = "not tested at this scale"
VERDICTS = (REPRODUCED, SAME_DIRECTION, NOT_REPRODUCED, NOT_TESTED)

RELEASE_GAP = "The authors' own responses, scored by an offline judge instead of by hand."
SMALL_GAP = (
    "This run's own model and data (by default a small model after few steps on fictional crafts), DeRTa by this "
    "book's preset, instead of base models of 7B to 70B by the paper's loss on real requests."
)
SEEDS_GAP = (
    "Several trainings with LoRA (the kept seeds of notebook 5, by default of SmolLM2-135M-Instruct on fictional "
    "crafts), DeRTa by this book's preset, instead of base models of 7B to 70B by the paper's loss on real requests."
)
UNMEASURED_GAP = "No released response and no measurement of this run bears on it."

CELL_POINTS = 5.0
"""A cell counts as reproduced when ours is within so many percentage points of the paper's value."""

RULES: dict[str, tuple[str, ...]] = {
    "below": (),
    "at_least": (),
    "lower_than": ("other",),
    "lowers_more": ("to", "other", "other_to"),
    "within": (),
}
"""The rules and the keys that each needs besides `ours`."""
SIGNS = {"ours": 1, "to": -1, "other": -1, "other_to": 1}
"""The fields of a rule that name result keys, and the sign of each in the quantity that it looks at."""


@dataclass(frozen=True)
class Rule:
    """How a verdict is reached from the run's numbers; all rates from 0 to 1.

    `ours` and `other` are result keys; a key may end in a group of attacks in braces (`asr/derta/{black-box}`) and then
    means the average over those attacks of the group that were run for every key of the rule (see `_terms`).

    - `below`: ours (minus other) is below `limit`, with its whole interval; `at_least`: at or above it;
    - `lower_than`: ours minus other is below zero, with its whole interval;
    - `lowers_more`: ours minus to is at least other minus other_to, with its whole interval;
    - `within`: ours is within `points` percentage points of the paper's value. The interval does not count: paper and
      book read the same responses, so that which questions were asked moves both alike.

    All but `within` fail when the whole interval is on the wrong side, and are open when it reaches across. Below a
    limit is not at it: two rates of zero leave `lower_than` open.
    """

    rule: str
    ours: str
    to: str = ""
    other: str = ""
    other_to: str = ""
    limit: float = 0.0
    points: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise DertaError(f"claims: there is no rule '{self.rule}'; the rules are {', '.join(RULES)}.")
        if missing := [name for name in RULES[self.rule] if not getattr(self, name)]:
            raise DertaError(f"claims: the rule '{self.rule}' for {self.ours} needs '{missing[0]}'.")

    def signs(self) -> dict[str, int]:
        """Result keys with their sign in the quantity that the rule looks at."""
        return {key: sign for name, sign in SIGNS.items() if (key := getattr(self, name))}

    def of_seeds(self) -> "Rule":
        """The same rule for the kept seeds (`seeds.Seeds`)."""
        keys: dict[str, Any] = {name: f"seeds/{key}" for name in SIGNS if (key := getattr(self, name))}
        return replace(self, **keys)

    def words(self) -> str:
        difference = " minus ".join(filter(None, (self.ours, self.other)))
        limit = f"{self.limit * 100:g} {'points' if self.other else '%'}" if self.limit else "0"
        return {
            "below": f"{difference} below {limit}, whole interval",
            "at_least": f"{difference} at least {limit}, whole interval",
            "lower_than": f"{self.ours} lower than {self.other}, whole interval of the difference",
            "lowers_more": f"drop from {self.ours} to {self.to} larger than from {self.other} to {self.other_to}, "
            "whole interval of the difference",
            "within": f"{difference} within {self.points:g} points of the paper's value",
        }[self.rule]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper; `kind` is 'statement', 'cell', or 'question' for one of our own, which no summary counts.

    `paper` refers to the paper's values (`table[column=value;column=value].column`); `release` and `small` are the
    rules for the authors' generations and for small models (the kept seeds', else this run's own); `gap` says how far
    they are from the paper, where that is not what it is for all of them.
    """

    id: str
    where: str
    statement: str
    paper: tuple[str, ...] = ()
    release: Rule | None = None
    small: Rule | None = None
    gap: str = ""
    kind: str = "statement"


def paper_value(reference: str) -> str:
    """The value in the paper that `table4_components[method=derta].PAIR` refers to, as printed there (percent)."""
    match = re.fullmatch(r"(\w+)\[(.*)\]\.(\w+)", reference)
    if not match:
        raise DertaError(f"claims: '{reference}' is no reference; write table[column=value;column=value].column.")
    frame = paper.table(match[1])
    for condition in filter(None, match[2].split(";")):
        column, _, value = condition.partition("=")
        frame = frame[frame[column].astype(str) == value]
    if len(frame) != 1 or match[3] not in frame:
        raise DertaError(f"claims: '{reference}' names {len(frame)} rows of the paper's tables; it must name one.")
    return str(frame[match[3]].iloc[0])


def _bounds(value: str) -> tuple[float, float]:
    """The paper's value as an interval of shares: `>80` is 80 to 100 %, `45-50` is 45 to 50 %."""
    low, high = (value[1:], "100") if value[0] == ">" else value.split("-") if "-" in value else (value, value)
    return float(low) / 100, float(high) / 100


def _terms(rule: Rule, results: Results) -> dict[str, Number] | None:
    """The number behind each key of the rule; None when something was not measured.

    A group is averaged, unless the results hold a rate over all its attacks under the key without braces (the kept
    seeds' rates pool each seed's responses).
    """
    signs = rule.signs()
    whole = {key: re.sub("[{}]", "", key) for key in signs}
    members = {key: [name] for key, name in whole.items() if name == key or name in results}
    for group, attacks in paper.GROUPS.items():
        keys = [key for key in signs if f"{{{group}}}" in key and key not in members]
        run = [attack for attack in attacks if all(_member(key, group, attack) in results for key in keys)]
        members |= {key: [_member(key, group, attack) for attack in run] for key in keys}
    if any(not names or not results.keys() >= set(names) for names in members.values()):
        return None
    return {key: _average([results[name] for name in members[key]]) for key in signs}


def _average(numbers: Sequence[Number]) -> Number:
    """The mean, its bounds the means of the bounds: attacks on the same questions may rise and fall together."""
    if len(numbers) == 1:
        return numbers[0]
    value = fmean(number.value for number in numbers)
    bounds = [(number.low, number.high) for number in numbers if number.low is not None and number.high is not None]
    if len(bounds) < len(numbers):
        return Number(value)
    low, high = map(fmean, zip(*bounds, strict=True))
    return Number(value, low=low, high=high)


def _member(key: str, group: str, attack: str) -> str:
    """A group's key for one attack, which our own results write in lower case."""
    return key.replace(f"{{{group}}}", attack if key.startswith("release/") else attack.lower())


def _judge(rule: Rule, numbers: Mapping[str, Number], printed: Sequence[str]) -> bool | None:
    """Whether the rule holds; None where the interval that it asks for reaches across its limit, or is not there."""
    total = combine([(numbers[key], sign) for key, sign in rule.signs().items()])
    if rule.rule == "within":
        first, last = _bounds(printed[0])
        margin = rule.points / 100 + 1e-9
        return first - margin <= total.value <= last + margin
    if total.low is None or total.high is None:
        return None
    if rule.rule in ("below", "lower_than"):
        return True if total.high < rule.limit else False if total.low > rule.limit else None
    return True if total.low >= rule.limit else False if total.high < rule.limit else None


def _measured(claim: Claim, results: Results) -> list[tuple[Rule, dict[str, Number], str, str]]:
    """Those of a claim's rules that the run has numbers for: rule, numbers, the verdict when it holds, the gap.

    Where the kept seeds have numbers for the rule for small models, they stand for this run's own: several trainings
    say more than one.
    """
    found = []
    if claim.release and (numbers := _terms(claim.release, results)):
        found.append((claim.release, numbers, REPRODUCED, RELEASE_GAP))
    if claim.small:
        for rule, gap in ((claim.small.of_seeds(), SEEDS_GAP), (claim.small, SMALL_GAP)):
            if numbers := _terms(rule, results):
                return [*found, (rule, numbers, SAME_DIRECTION, gap)]
    return found


def verdict(claim: Claim, results: Results) -> tuple[str, str]:
    """The verdict and why: the authors' generations first, small models where those do not decide."""
    printed = [paper_value(reference) for reference in claim.paper]
    reasons = []
    for rule, numbers, positive, _ in _measured(claim, results):
        holds = _judge(rule, numbers, printed)
        if holds is not None:
            return positive if holds else NOT_REPRODUCED, f"rule: {rule.words()}"
        reasons.append(f"rule: {rule.words()}; the interval leaves it open")
    unmeasured = claim.release or claim.small
    return NOT_TESTED, "; ".join(reasons) or (
        f"rule: {unmeasured.words()}; not measured" if unmeasured else "no rule applies"
    )


def ledger(results: Results) -> pd.DataFrame:
    """One row a claim: id, kind, where, statement, paper, ours, gap, verdict, why (the rule in words)."""
    rows = []
    for claim in all_claims():
        said, why = verdict(claim, results)
        measured = _measured(claim, results)
        printed = "; ".join(_printed(claim.paper)) or "in words only"
        ours = "; ".join(f"{key}: {number}" for _, numbers, *_ in measured for key, number in numbers.items()) or "–"
        gaps = [gap for *_, gap in measured if not claim.gap or gap == SEEDS_GAP]
        gap = " ".join(filter(None, (claim.gap, *gaps))) or UNMEASURED_GAP
        rows.append((claim.id, claim.kind, claim.where, claim.statement, printed, ours, gap, said, why))
    return pd.DataFrame(rows, columns=["id", "kind", "where", "statement", "paper", "ours", "gap", "verdict", "why"])


def _printed(references: Sequence[str]) -> list[str]:
    """The paper's values as it prints them, each led by what tells it from the others."""
    parts = [[value or column for value, column in re.findall(r"=([^;\]]+)|\.(\w+)$", name)] for name in references]
    said = []
    for reference, words in zip(references, parts, strict=True):
        apart = [w for i, w in enumerate(words) if any(other[i] != w for other in parts)]
        lead = f"{', '.join(in_words(word) for word in apart)}: " if apart else ""
        said.append(f"{lead}{paper_value(reference)} %")
    return said


def closeness(results: Results) -> str:
    """In words: how many of the paper's cells the authors' responses come near to."""
    rows = []
    for claim in (claim for claim in all_claims() if claim.kind == "cell"):
        printed = [paper_value(reference) for reference in claim.paper]
        rows += [(rule.ours, _judge(rule, numbers, printed)) for rule, numbers, *_ in _measured(claim, results)]
    cells = pd.DataFrame(rows, columns=["rate", "near"])
    once = cells.drop_duplicates("rate")
    return (
        f"Of the {len(cells)} cells with released responses, {cells.near.sum()} differ from the paper by at most "
        f"{CELL_POINTS:g} points. It prints some rates in several tables; each counted once, they are "
        f"{once.near.sum()} of {len(once)}."
    )


def summary(results: Results) -> pd.DataFrame:
    """How many statements and how many cells got each verdict: verdict, statement, cell."""
    frame = ledger(results)
    table = pd.crosstab(frame["verdict"], frame["kind"]).reindex(
        index=VERDICTS, columns=["statement", "cell"], fill_value=0
    )
    return table.rename_axis(columns=None).reset_index()


@cache
def all_claims() -> tuple[Claim, ...]:
    """The statements of `claims.json`, then one claim a cell of the paper's tables and figures."""
    claims = []
    for row in read_json(Path(__file__).with_name("claims.json")):
        rules = {name: Rule(**row[name]) for name in ("release", "small") if name in row}
        claims.append(Claim(**(row | rules | {"paper": tuple(row.get("paper", ()))})))
    return (*claims, *_cells())


def _cells() -> list[Claim]:
    """Absolute values: comparable with the authors' generations alone, so that no small-scale rule applies."""
    cells = []

    def cell(where: str, reference: str, statement: str, key: str) -> None:
        name = re.sub(r"[^a-z0-9+-]+", "_", f"{where}_{statement}".lower())
        rule = Rule("within", key, points=CELL_POINTS) if key else None
        statement = re.sub(r"[^\s,:]+", lambda word: in_words(word[0]), statement)
        cells.append(Claim(name, where, statement, (reference,), rule, kind="cell"))

    wide = paper.table("table2_main_results")
    for _, row in wide.iterrows():
        for measure in (*paper.ATTACKS, *paper.HELPFULNESS):
            if pd.notna(row[measure]):
                kind = "asr" if measure in paper.ATTACKS else "helpfulness"
                where = f"table2_main_results[family={row['family']};method={row['method']}].{measure}"
                key = f"release/{kind}/{row['family']}/{row['method']}/{measure}"
                cell(f"Table {row['table']}", where, f"{row['family']}, {row['method']}: {measure}", key)
    for name, title in (("table4_components", "Table 4"), ("figure5_dpo", "Figure 5")):
        for _, row in paper.table(name).iterrows():
            for column in row.index.drop(["method", "n_data"], errors="ignore"):
                ours = row["method"] in ("vanilla", "derta", "dpo")
                group = {"black_box_avg": "black-box", "white_box_avg": "white-box"}.get(column)
                rate, of = ("average", group) if group else ("asr", column)
                key = f"release/{rate}/LLaMA3-70B/{row['method']}/{of}" if ours else ""
                cell(title, f"{name}[method={row['method']}].{column}", f"LLaMA3-70B, {row['method']}: {column}", key)
    for _, row in paper.table("figure6_model_size").iterrows():
        for method in ("vanilla", "derta"):
            key = f"release/average/{row['model']}/{method}"
            reference = f"figure6_model_size[model={row['model']}].{method}"
            cell("Figure 6", reference, f"{row['model']}, {method}: average", key)
    return cells
