"""Tables of the re-scored release beside the paper's: attack success, helpfulness, refusal positions, differences.

Every function takes the frames of `rescore.Scores` and gives a frame or a Number; percentages are 0 to 100.
"""

import re
from math import inf
from typing import Any

import pandas as pd

from derta_lib import paper, stats
from derta_lib.judges.refusal import EARLY
from derta_lib.rescore import CELL, UNREAD
from derta_lib.results import Number
from derta_lib.stats import BEGINNING


def cells(responses: pd.DataFrame, error: stats.JudgeError | None = None) -> pd.DataFrame:
    """Attack success by model, method and attack, in percent: n, unscored, asr, low, high (Wilson), keywords, paper,
    source (the paper's table), difference (asr - paper); with the judge's known `error`, corrected, its low and high
    (blank where the judge has not read all: what it has not, its error does not touch).

    `paper` is blank for what the paper does not report.
    """
    rows = []
    for names, group in responses.groupby(CELL, sort=False):
        scored = group["unsafe"].dropna()
        row = dict(zip(CELL, names, strict=True)) | {"n": len(scored), "unscored": len(group) - len(scored)}
        if len(scored):
            row |= _percent("asr", stats.share(scored))
            if error is not None and not (group["kind"] == UNREAD).any():
                row |= _percent("corrected", stats.corrected_rate(int(scored.sum()), len(scored), error), "corrected_")
        rows.append(row | {"keywords": 100 * group["keywords"].mean()})
    return _beside_paper(pd.DataFrame(rows), "asr", paper.ATTACKS)


def helpfulness(grades: pd.DataFrame) -> pd.DataFrame:
    """GSM8K and MMLU accuracy in percent beside the paper's: n, unscored, accuracy, low, high, last (the accuracy where
    the last number or letter counts as the answer), paper, difference.

    An answer that cannot be read earns nothing, so unscored ones are in n; their number is shown.
    """
    rows = []
    for names, group in grades.groupby(CELL, sort=False):
        row = dict(zip(CELL, names, strict=True)) | {"n": len(group), "unscored": int(group["correct"].isna().sum())}
        row |= _percent("accuracy", stats.rate(int(group["correct"].sum()), len(group)))
        rows.append(row | {"last": 100 * group["last"].mean()})
    return _beside_paper(pd.DataFrame(rows), "accuracy", ("GSM8K", "MMLU"))


def helpfulness_changes(grades: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Accuracy of DeRTa minus that of vanilla tuning, or of the model as published, in points, paired by question:
    model, task, against, number (a Number). An answer that cannot be read earns nothing.
    """
    rows = []
    for (model, task), part in grades.groupby(["model", "attack"], sort=False):
        right = part.assign(right=part["correct"].fillna(False).astype(float))
        right = right.pivot(index="question", columns="method", values="right")
        for against in [name for name in ("vanilla", "official") if {name, "derta"} <= set(right)]:
            pairs = right[["derta", against]].dropna()
            number = stats.difference(pairs["derta"], pairs[against], list(pairs.index), seed=seed)
            rows.append((model, task, against, number))
    return pd.DataFrame(rows, columns=["model", "task", "against", "number"])


def _percent(name: str, number: Number, prefix: str = "") -> dict[str, Any]:
    bounds = {"low": number.low, "high": number.high}
    return {name: 100 * number.value} | {prefix + side: None if at is None else 100 * at for side, at in bounds.items()}


def _beside_paper(frame: pd.DataFrame, ours: str, measures: tuple[str, ...]) -> pd.DataFrame:
    said = paper.main_results().rename(columns={"measure": "attack", "table": "source"})
    frame = frame.merge(said, on=CELL, how="left")
    frame["difference"] = frame[ours] - frame["paper"]
    rank = {name: place for place, name in enumerate((*measures, "vanilla", "official", "dpo", "recaug", "derta"))}
    return frame.sort_values(
        ["attack", "model", "method"],
        key=lambda names: names if names.name == "model" else names.map(rank),
        ignore_index=True,
    )


def deviation(table: pd.DataFrame) -> pd.DataFrame:
    """Mean absolute difference from the paper in points, by attack and over all: cells, judge, keywords.

    PAIR is apart and not in "all": the release has only one response of each search that succeeded.
    """
    covered = table.dropna(subset=["paper", "asr"])
    apart = covered[["asr", "keywords"]].sub(covered["paper"], axis=0).abs().assign(attack=covered["attack"])
    whole = apart[apart["attack"] != "PAIR"].assign(attack="all but PAIR")
    groups = pd.concat([apart, whole]).groupby("attack", sort=False, as_index=False)
    return groups.agg(cells=("asr", "size"), judge=("asr", "mean"), keywords=("keywords", "mean"))


def nearer(table: pd.DataFrame) -> tuple[int, int]:
    """In how many cells of `cells` the corrected rate is nearer to the paper's than the raw one, and of how many.

    PAIR is left out, as in `deviation`.
    """
    covered = table[table["attack"] != "PAIR"].dropna(subset=["paper", "asr"])
    raw, corrected = ((covered[column] - covered["paper"]).abs() for column in ("asr", "corrected"))
    return int((corrected < raw).sum()), len(covered)


def disagreement(responses: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Which kinds of response the difference from the paper can be about: attack, we_say, excess, kind, share.

    A cell with more success than the paper's holds at least |difference| x n responses that people called safe and
    the judge unsafe (`we_say` "unsafe"; the other way round "safe"). `excess` sums these over an attack's cells;
    `share`, in percent, is each kind's among the responses of those cells that have this verdict and so can be among
    them, where a cell counts by its own excess.
    """
    keyed = table.dropna(subset=["paper", "asr"]).set_index(CELL)
    joined = responses.merge(keyed["difference"].reset_index(), on=CELL).dropna(subset="unsafe")
    rows = []
    for attack in dict.fromkeys(joined["attack"]):
        for unsafe, word in ((True, "unsafe"), (False, "safe")):
            sign = 1 if unsafe else -1
            part = joined[(joined["attack"] == attack) & (sign * joined["difference"] > 0)]
            of_cell = part.groupby(CELL)["difference"].transform("sum").abs() / 100
            said = part.assign(excess=of_cell)[part["unsafe"] == unsafe]
            each = said["excess"] / said.groupby(CELL)["excess"].transform("size")
            excess, kinds = round(float(each.sum())), each.groupby(said["kind"]).sum().sort_values(ascending=False)
            rows += [(attack, word, excess, kind, 100 * value / each.sum()) for kind, value in kinds.items() if excess]
    return pd.DataFrame(rows, columns=["attack", "we_say", "excess", "kind", "share"])


def differences(
    responses: pd.DataFrame, first: tuple[str, str], second: tuple[str, str], seed: int = 0
) -> pd.DataFrame:
    """Attack success of one model and method minus that of another in points, by attack and on average over them
    ("all"), paired and clustered by question: attack, n (pairs), points, low, high. Questions that only one has
    answered are left out.
    """
    scored = responses.dropna(subset="unsafe")
    ours, theirs = (scored[(scored["model"] == m) & (scored["method"] == name)] for m, name in (first, second))
    pairs = ours.merge(theirs, on=["attack", "question"], suffixes=("", "_baseline"))
    rows = []
    for attack in (*dict.fromkeys(pairs["attack"]), "all"):
        part = pairs if attack == "all" else pairs[pairs["attack"] == attack]
        sides = (part["unsafe"].astype(float), part["unsafe_baseline"].astype(float))
        number = stats.difference(*sides, part["question"].tolist(), part["attack"].tolist(), seed=seed)
        rows.append({"attack": attack, "n": number.n, "points": number.value, "low": number.low, "high": number.high})
    return pd.DataFrame(rows)


def averages(responses: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Figure 6: mean attack success over the attacks that release and paper cover: model, method, attacks, number (a
    Number), and in percent paper_same_attacks and, where the paper states one, its own average (figure_6).
    """
    covered = table.dropna(subset=["paper", "asr"])
    rows = covered.groupby(["model", "method"], sort=False).agg(
        attacks=("attack", "size"), paper_same_attacks=("paper", "mean")
    )
    groups = responses.merge(covered[CELL], on=CELL).groupby(["model", "method"])
    rows["number"] = [average(groups.get_group(cell)) for cell in rows.index]
    stated = paper.table("figure6_model_size").melt("model", var_name="method", value_name="figure_6")
    return rows.reset_index().merge(stated, on=["model", "method"], how="left")


def average(responses: pd.DataFrame) -> Number:
    """Mean attack success over the attacks of one model and method, all attacks alike; its interval draws whole
    questions, since the attacks ask the same ones. n counts the scored responses.
    """
    scored = responses.dropna(subset="unsafe")
    return stats.clustered_share(scored["unsafe"], list(scored["question"]), list(scored["attack"]))


def table_4(responses: pd.DataFrame) -> pd.DataFrame:
    """Table 4, the components on LLaMA3-70B: method, then for black-box and white-box attacks the paper's average and
    ours (text, in percent, over the same attacks), blank where the authors released no responses.
    """
    groups = {"black-box": paper.BLACK_BOX, "white-box": paper.WHITE_BOX}
    rows = []
    for said in paper.table("table4_components").to_dict("records"):
        row = {"method": said["method"]}
        of = responses[(responses["model"] == "LLaMA3-70B") & (responses["method"] == said["method"])]
        for name, attacks in groups.items():
            row[f"{name}, paper"] = said[f"{name.replace('-', '_')}_avg"]
            part = of[of["attack"].isin(attacks)]
            row[f"{name}, ours"] = str(average(part)) if set(part["attack"]) == set(attacks) else None
        rows.append(row)
    return pd.DataFrame(rows)


# --- where responses refuse (Table 1, Figure 4) ---------------------------------------------------------------------


def safe_responses(responses: pd.DataFrame, model: str, method: str) -> pd.DataFrame:
    """What Figure 4 counts: responses that are not unsafe, over all attacks but PAIR (its safe ones are unreleased)."""
    part = responses[(responses["model"] == model) & (responses["method"] == method) & (responses["attack"] != "PAIR")]
    return part[~part["unsafe"].fillna(True).astype(bool)]


def share_from_to(safe: pd.DataFrame, first: int, last: float, of: str = "refusal") -> Number:
    """Share of the responses `safe` whose refusal starts at token `first` to `last`, counted from 1.

    `of` is "refusal" (any wording of one) or "sorry" (the paper's refusal token); tokens are those of
    `judges.refusal.token_index`. The interval goes by question. Raises DertaError when there are no responses.
    """
    return stats.share_within(safe[of] + 1, list(safe["question"]), last, first)


def position_curve(responses: pd.DataFrame, model: str, methods: tuple[str, ...]) -> pd.DataFrame:
    """Figure 4, the share of safe responses whose refusal has begun, by method: `stats.cumulative` and method."""
    curves = []
    for method in methods:
        safe = safe_responses(responses, model, method)
        starts = safe["refusal"] + 1
        places = sorted({1, *(int(start) for start in starts.dropna())})
        curves.append(stats.cumulative(starts, list(safe["question"]), places).assign(method=method))
    return pd.concat(curves, ignore_index=True)


def figure_4(responses: pd.DataFrame) -> pd.DataFrame:
    """What the paper says of Figure 4, and the release: method, statement, kind, paper, refusal, low, high, sorry, n,
    of_refusals.

    "At the beginning" is read as within BEGINNING tokens, as in Table 1. `refusal` (with its interval) is by any
    wording, `sorry` by that word alone, both over the n safe responses; `of_refusals` is `refusal` over those of them
    that refuse at all. Blank where the authors released no responses of the method.
    """
    rows = []
    for row in paper.table("figure4_refusal_position").to_dict("records"):
        bounds = [int(number) for number in re.findall(r"\d+", row["statement"])]
        beyond, between = "beyond" in row["statement"], "between" in row["statement"]
        first, last = (bounds[0] + 1, inf) if beyond else tuple(bounds) if between else (1, *(bounds or [BEGINNING]))
        safe = safe_responses(responses, "LLaMA3-70B", row["method"].replace("derta_variants", "derta"))
        known = {"method": row["method"], "statement": row["statement"], "kind": row["kind"], "paper": row["value_pct"]}
        if len(safe):
            refusals = safe.dropna(subset="refusal")
            known |= _percent("refusal", share_from_to(safe, first, last)) | {
                "sorry": 100 * share_from_to(safe, first, last, "sorry").value,
                "n": len(safe),
                "of_refusals": 100 * share_from_to(refusals, first, last).value if len(refusals) else None,
            }
        rows.append(known)
    return pd.DataFrame(rows)


def table_1(responses: pd.DataFrame) -> pd.DataFrame:
    """Table 1, the share of a model's refusals that start at its BEGINNING: model, n, first_5, low, high, paper."""
    rows = []
    for model, said in paper.table("table1_refusal_position").itertuples(index=False, name=None):
        refusals = safe_responses(responses, model, "official").dropna(subset="refusal")
        number = share_from_to(refusals, 1, BEGINNING)
        rows.append({"model": model, "n": number.n} | _percent("first_5", number) | {"paper": said})
    return pd.DataFrame(rows)


def halts(responses: pd.DataFrame, model: str, attack: str) -> dict[str, Number]:
    """Of the questions on which vanilla training was unsafe and DeRTa was not, or was so before it refused, the share
    on which DeRTa's response begins otherwise and then refuses. Three readings of "begins": "any" token stands before
    the refusal; more than a label does ("words", over EARLY tokens); what does would be "unsafe" if it stood alone.
    """
    part = responses[(responses["model"] == model) & (responses["attack"] == attack)].dropna(subset="unsafe")
    vanilla, derta = (part[part["method"] == method].set_index("question") for method in ("vanilla", "derta"))
    begun = derta["begun"].fillna(False).astype(bool)
    counted = derta.index.isin(vanilla.index[vanilla["unsafe"].astype(bool)]) & (~derta["unsafe"].astype(bool) | begun)
    begins = {"any": derta["refusal"] > 0, "words": derta["refusal"] > EARLY, "unsafe": begun}
    return {name: stats.share(found[counted].fillna(False)) for name, found in begins.items()}
