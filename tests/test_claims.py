"""The claims ledger: verdicts follow the results file, rules follow hand-worked cases, the paper is covered whole."""

import re
from dataclasses import asdict
from importlib.resources import files

import pytest
from docutils import nodes
from explorer_demo import HOSTILE
from statsmodels.stats.proportion import confint_proportions_2indep

from derta_lib import claims, paper, results
from derta_lib.claims import NOT_REPRODUCED, NOT_TESTED, REPRODUCED, SAME_DIRECTION, Claim, Rule, verdict
from derta_lib.errors import DertaError
from derta_lib.records import write_json
from derta_lib.results import Number
from derta_lib.stats import combine, rate


def ruled(release: Rule | None = None, small: Rule | None = None, reference: str = "") -> Claim:
    return Claim("c", "here", "a claim", (reference,) if reference else (), release, small)


LOWER = Rule("lower_than", "asr/derta/pair", other="asr/vanilla/pair")
VANILLA_STARTS = "figure4_refusal_position[method=vanilla;kind=text].value_pct"  # printed: >80
DERTA_STARTS = "figure4_refusal_position[method=derta_variants].value_pct"  # printed: 45-50
PAIR = "table4_components[method=derta].PAIR"  # printed: 24.0
MORE = Rule("lowers_more", "a", to="b", other="c", other_to="d")


def four(*percents: int) -> results.Results:
    return {key: rate(percent, 100) for key, percent in zip("abcd", percents, strict=True)}


def test_a_difference_is_newcombes():
    for a, m, b, n in ((3, 40, 30, 40), (0, 24, 24, 24), (50, 200, 61, 200)):
        ours = combine([(rate(a, m), 1), (rate(b, n), -1)])
        low, high = confint_proportions_2indep(a, m, b, n, method="newcomb", compare="diff")
        assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-9)


def test_an_average_is_worked_by_hand():
    ours = claims._average([Number(0.2, low=0.1, high=0.4), Number(0.6, low=0.5, high=0.8)])
    assert (ours.value, ours.low, ours.high) == pytest.approx((0.4, 0.3, 0.6))
    part = claims._average([Number(0.2, low=0.1, high=0.4), Number(0.6)])
    assert (part.value, part.low, part.high) == (pytest.approx(0.4), None, None)  # one interval is none of both


@pytest.mark.parametrize(
    ("rule", "numbers", "expected"),
    [
        (LOWER, {"asr/derta/pair": rate(0, 40), "asr/vanilla/pair": rate(36, 40)}, SAME_DIRECTION),
        (LOWER, {"asr/derta/pair": rate(38, 40), "asr/vanilla/pair": rate(20, 40)}, NOT_REPRODUCED),
        (LOWER, {"asr/derta/pair": rate(1, 16), "asr/vanilla/pair": rate(0, 16)}, NOT_TESTED),  # one craft more
        (LOWER, {"asr/derta/pair": rate(2, 6), "asr/vanilla/pair": rate(4, 6)}, NOT_TESTED),  # too few to tell
        (LOWER, {"asr/derta/pair": rate(0, 40)}, NOT_TESTED),  # a key is missing
        (Rule("below", "a", limit=0.1), {"a": rate(0, 40)}, SAME_DIRECTION),
        (Rule("below", "a", limit=0.1), {"a": rate(0, 10)}, NOT_TESTED),
        (Rule("below", "a", limit=0.1), {"a": rate(5, 40)}, NOT_TESTED),
        (Rule("below", "a", limit=0.1), {"a": rate(12, 40)}, NOT_REPRODUCED),
        (LOWER, {"asr/derta/pair": rate(0, 16), "asr/vanilla/pair": rate(0, 16)}, NOT_TESTED),  # no room to differ
        (LOWER, {"asr/derta/pair": Number(0.5), "asr/vanilla/pair": Number(0.5)}, NOT_TESTED),  # exactly equal
        (Rule("at_least", "a", limit=0.8), {"a": rate(40, 40)}, SAME_DIRECTION),
        (Rule("at_least", "a", limit=0.8), {"a": rate(31, 40)}, NOT_TESTED),
        (Rule("at_least", "a", limit=0.8), {"a": rate(22, 40)}, NOT_REPRODUCED),
        (Rule("below", "a", other="b", limit=0.1), {"a": rate(30, 200), "b": rate(20, 200)}, NOT_TESTED),
        (Rule("below", "a", other="b", limit=0.1), {"a": rate(20, 200), "b": rate(22, 200)}, SAME_DIRECTION),
        (MORE, four(95, 5, 90, 80), SAME_DIRECTION),
        (MORE, four(95, 90, 90, 10), NOT_REPRODUCED),
    ],
)  # fmt: skip
def test_rules_on_hand_worked_cases(rule, numbers, expected):
    assert verdict(ruled(small=rule), numbers)[0] == expected


@pytest.mark.parametrize(
    ("reference", "number", "points", "expected"),
    [
        (PAIR, Number(0.27, low=0, high=1), 2, NOT_REPRODUCED),  # whatever the interval
        (PAIR, Number(0.27, low=0.26, high=1), 3, REPRODUCED),
        (PAIR, Number(0.21), 3, REPRODUCED),
        (VANILLA_STARTS, Number(0.9, low=0.85, high=0.95), 0, REPRODUCED),
        (VANILLA_STARTS, Number(0.6, low=0.5, high=0.7), 5, NOT_REPRODUCED),
        (DERTA_STARTS, Number(0.42, low=0.41, high=0.43), 3, REPRODUCED),
        (DERTA_STARTS, Number(0.6, low=0.55, high=0.7), 3, NOT_REPRODUCED),
    ],
)  # fmt: skip
def test_within_reads_the_papers_value_and_its_ranges(reference, number, points, expected):
    claim = ruled(Rule("within", "k", points=points), reference=reference)
    assert verdict(claim, {"k": number})[0] == expected


def test_the_authors_generations_speak_before_the_small_models():
    claim = ruled(Rule("below", "release/a", limit=0.1), Rule("below", "a", limit=0.1))
    good, bad = rate(0, 200), rate(150, 200)
    assert verdict(claim, {"release/a": good, "a": bad})[0] == REPRODUCED
    assert verdict(claim, {"release/a": bad, "a": good})[0] == NOT_REPRODUCED
    assert verdict(claim, {"a": good})[0] == SAME_DIRECTION


def test_the_kept_seeds_stand_for_the_runs_one_training():
    claim = ruled(small=Rule("lower_than", "asr/derta/{white-box}", other="asr/vanilla/{white-box}"))
    own = {"asr/derta/autodan": rate(4, 4), "asr/vanilla/autodan": rate(0, 4)}
    clear = {"seeds/asr/derta/autodan": rate(0, 80), "seeds/asr/vanilla/autodan": rate(80, 80)}
    unclear = {"seeds/asr/derta/autodan": rate(1, 4), "seeds/asr/vanilla/autodan": rate(2, 4)}
    assert verdict(claim, own)[0] == NOT_REPRODUCED
    said, why = verdict(claim, own | clear)
    assert said == SAME_DIRECTION
    assert "seeds/asr/derta/{white-box} lower than seeds/asr/vanilla/{white-box}" in why
    assert verdict(claim, own | unclear)[0] == NOT_TESTED
    assert verdict(claim, {"seeds/asr/derta/autodan": rate(0, 80)} | own)[0] == NOT_REPRODUCED


def test_what_the_seeds_measured_is_named_beside_a_claims_own_gap():
    key = "asr/{}/completingattack"
    measured = {key.format(method): rate(n, 20) for method, n in (("derta", 0), ("vanilla", 20))}
    own = claims.ledger(measured).set_index("id").gap
    kept = claims.ledger({f"seeds/{name}": number for name, number in measured.items()}).set_index("id").gap
    assert own["derta-completingattack"] == claims.SMALL_GAP
    assert kept["derta-completingattack"] == claims.SEEDS_GAP
    twins = {f"seeds/benign_refusal/{method}/direct": rate(0, 20) for method in ("derta", "vanilla")}
    assert claims.ledger(twins).set_index("id").gap["benign-answered"].endswith(claims.SEEDS_GAP)


def test_a_group_averages_the_attacks_run_for_every_key():
    rule = Rule("lower_than", "asr/derta/{black-box}", other="asr/vanilla/{black-box}")
    numbers = {"asr/derta/pair": rate(20, 40), "asr/derta/selfcipher": rate(40, 40), "asr/vanilla/pair": rate(40, 40)}
    assert verdict(ruled(small=rule), numbers)[0] == SAME_DIRECTION
    assert verdict(ruled(small=rule), numbers | {"asr/vanilla/selfcipher": rate(0, 40)})[0] == NOT_REPRODUCED


def test_verdicts_change_when_the_results_file_is_altered(tmp_path):
    path = tmp_path / "results.json"
    good = {f"asr/{m}/{a}": rate(k, 60) for m, k in (("vanilla", 45), ("derta", 1)) for a in ("codeattack", "pair")}
    write_json(path, {key: asdict(number) for key, number in good.items()})
    before = claims.ledger(results.load(path)).set_index("id")["verdict"]
    assert before["derta-codeattack"] == before["derta-pair"] == SAME_DIRECTION
    assert before["derta-selfcipher"] == NOT_TESTED
    altered = path.read_text(encoding="utf-8").replace("asr/derta/pair", "asr/derta/selfcipher")
    path.write_text(altered.replace("asr/vanilla/codeattack", "asr/derta/x"), encoding="utf-8")
    after = claims.ledger(results.load(path)).set_index("id")["verdict"]
    assert after["derta-pair"] == after["derta-codeattack"] == NOT_TESTED
    good |= {"asr/derta/pair": rate(59, 60), "release/asr/LLaMA3-70B/derta/PAIR": rate(48, 200)}
    write_json(path, {key: asdict(number) for key, number in good.items()})
    last = claims.ledger(results.load(path)).set_index("id")["verdict"]
    assert last["derta-pair"] == NOT_REPRODUCED
    assert last["table_2_llama3-70b_derta_pair"] == REPRODUCED
    counts = claims.summary(results.load(path)).set_index("verdict")
    [question] = [claim for claim in claims.all_claims() if claim.kind == "question"]
    assert not question.paper
    assert counts["statement"].sum() + counts["cell"].sum() + 1 == len(claims.all_claims())
    assert counts.loc[REPRODUCED, "cell"] >= 1


def test_every_value_of_the_papers_files_is_a_claim():
    claimed = {reference for claim in claims.all_claims() for reference in claim.paper}
    told = {}
    for reference in claimed:
        name, column = re.fullmatch(r"(\w+)\[.*\]\.(\w+)", reference).groups()
        told[name, column] = told.get((name, column), 0) + 1
        assert claims.paper_value(reference) not in ("", "nan")
    values = {*paper.ATTACKS, *paper.HELPFULNESS, "black_box_avg", "white_box_avg", "ratio_pct", "value_pct"}
    values |= {"before", "after", "halted_pct", "vanilla", "derta"}
    names = [path.name.removesuffix(".csv") for path in (files("derta_lib") / "paper").iterdir()]
    assert len(names) >= 8
    for name in names:
        frame = paper.table(name)
        assert values & set(frame.columns)
        for column in values & set(frame.columns):
            assert told.get((name, column)) == frame[column].notna().sum(), (name, column)


def test_claims_are_well_formed():
    every = claims.all_claims()
    assert len({claim.id for claim in every}) == len(every)
    assert all(re.fullmatch(r"[a-z0-9_+-]+", claim.id) for claim in every)
    assert all(claim.release is None or claim.release.ours.startswith("release/") for claim in every)
    assert all(claim.small is None or not claim.small.ours.startswith("release/") for claim in every)
    unmeasured = claims.ledger({})
    assert set(unmeasured["verdict"]) == {NOT_TESTED}
    assert set(unmeasured["gap"]) == {claims.UNMEASURED_GAP} | {claim.gap for claim in every if claim.gap}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("about", "a"), "there is no rule 'about'"),
        (lambda: Rule("lower_than", "a"), "needs 'other'"),
        (lambda: claims.paper_value("table4_components.PAIR"), "is no reference"),
        (lambda: claims.paper_value("table4_components[method=magic].PAIR"), "names 0 rows"),
        (lambda: claims.paper_value("table4_components[].PAIR"), "names 5 rows"),
    ],
)
def test_mistakes_in_the_claims_file_are_sentences(make, message):
    with pytest.raises(DertaError, match=message):
        make()


def test_cards_hold_text_only_whatever_a_results_file_says():
    from derta_lib.sphinx_pages import _card
    from derta_lib.sphinx_results import table

    row = dict.fromkeys(("statement", "paper", "ours", "gap", "why"), HOSTILE[0]) | {"id": "x", "verdict": NOT_TESTED}
    for made in (_card(row), table(["a"], [[HOSTILE[0]], [HOSTILE[1]]])):
        assert not list(made.findall(nodes.raw))
        assert "<script>" in made.astext()


def test_the_papers_values_say_what_tells_them_apart():
    frame = claims.ledger({}).set_index("id")
    assert frame.loc["dpo-pair", "paper"] == "DPO: 72.0 %; DeRTa: 24.0 %"
    assert frame.loc["both-white-box", "paper"] == "RTO only: 8.5 %; DeRTa: 3.0 %"
    assert frame.loc["first-5-llama3-8b-instruct", "paper"] == "99.5 %"
    assert not frame["statement"].str.contains("_avg|vanilla-|_prefix").any()


def test_how_near_the_cells_lie_is_counted_by_hand():
    printed = float(claims.paper_value("table2_main_results[family=LLaMA3-70B;method=derta].CodeAttack")) / 100
    key = "release/asr/LLaMA3-70B/derta/CodeAttack"
    of = [c for c in claims.all_claims() if c.kind == "cell" and c.release and c.release.ours == key]
    far = claims.closeness({key: Number(printed + 0.06, low=printed - 0.01, high=printed + 0.1)})
    assert far.startswith(f"Of the {len(of)} cells with released responses, 0 differ")
    assert len(of) > 1
    assert far.endswith("each counted once, they are 0 of 1.")
    just = claims.closeness({key: Number(printed + 0.05, low=printed - 0.01, high=printed + 0.1)})
    assert f"responses, {len(of)} differ" in just
    assert just.endswith("each counted once, they are 1 of 1.")


def test_a_group_that_the_results_hold_is_taken_as_it_stands() -> None:
    """Two attacks, 1 and 3 of 10: their average has the mean of their bounds, a pooled rate its own."""
    [claim] = [claim for claim in claims.all_claims() if claim.id == "rto-black-box"]
    results = {f"asr/{m}/{a}": rate(k, 10) for m in ("rto", "vanilla") for a, k in (("codeattack", 1), ("pair", 3))}
    frame = claims.ledger(results).set_index("id")
    assert frame.loc[claim.id, "ours"].startswith("asr/rto/{black-box}: 20.0 % [")
    pooled = {f"asr/{m}/black-box": rate(k, 200) for m, k in (("rto", 10), ("vanilla", 100))}
    assert frame.loc[claim.id, "verdict"] == NOT_TESTED
    held = claims.ledger(results | pooled).set_index("id").loc[claim.id]
    assert held["verdict"] == SAME_DIRECTION
    assert f"asr/rto/{{black-box}}: {rate(10, 200)}" in held["ours"]
