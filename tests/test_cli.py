import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors import SafetensorError
from scipy.stats import fisher_exact
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from typer.testing import CliRunner

from derta_lib import compare, stats
from derta_lib.cli import app, cli
from derta_lib.errors import DertaError, UsageError
from derta_lib.results import Number
from derta_lib.runs import merge, open_run


def derta(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "derta_lib.cli", *arguments], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("module", ["derta_lib", "derta_lib.cli", "derta_lib.runs"])
def test_importing_the_library_loads_nothing_heavy(module):
    heavy = ("torch", "transformers", "scipy", "matplotlib", "pandas")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_exit_codes_and_one_sentence_on_stderr(tmp_path):
    outside = derta("book", cwd=tmp_path)
    assert outside.returncode == 2
    assert "is not a checkout" in outside.stderr
    assert outside.stderr.count("\n") == 1
    assert "Traceback" not in outside.stderr
    (tmp_path / "in.jsonl").write_text('{"id": "a", "query": "q", "response": "r"}\n{oops\n')
    failed = derta("judge", "in.jsonl", "--out", "out.jsonl", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "in.jsonl, line 2" in failed.stderr
    assert not (tmp_path / "out.jsonl").exists()
    assert derta("book", "--nonsense", cwd=tmp_path).returncode == 2
    assert derta("--help").returncode == 0


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("nbformat", ["book"]), ("torch", ["judge", "in.jsonl", "--out", "out.jsonl"])],
)
def test_a_package_that_is_missing_is_named(tmp_path, missing, arguments):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "query": "q", "response": "r"}\n')
    code = f"import sys; sys.modules['{missing}'] = None; from derta_lib.cli import app; app()"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"derta: the package '{missing}' is missing; install derta-lib[book]")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 8])
def test_rank_zero_trains_all_parameters(monkeypatch, tmp_path, rank):
    recipes = []

    def train(model, triples, pairs, recipe):
        recipes.append(recipe)
        return tmp_path

    monkeypatch.setattr("derta_lib.training.train", train)
    monkeypatch.setattr("derta_lib.models.checkpoint_card", lambda folder: {"cut": {}})
    done = CliRunner().invoke(cli, ["train", "--lora-rank", str(rank)])
    assert done.exit_code == 0, done.output
    assert [recipe.lora_rank for recipe in recipes] == [rank]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full.*DERTA_CACHE"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory. Tried .* a smaller model"),
        (ImportError("Found an incompatible version of torchao"), "incompatible version of torchao"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(monkeypatch, capsys, error, said):
    def fails(*_):
        raise error

    monkeypatch.setattr("derta_lib.judges.files.judge_file", fails)
    monkeypatch.setattr(sys, "argv", ["derta", "judge", "in.jsonl", "--out", "out.jsonl"])
    with pytest.raises(SystemExit) as stopped:
        app()
    assert stopped.value.code == 1
    assert re.fullmatch(f"derta: .*{said}.*\n", capsys.readouterr().err)


def test_every_verb_of_the_design_is_there():
    verbs = ("book", "train", "attack", "judge", "position", "compare", "bench", "seeds")
    assert [CliRunner().invoke(cli, [verb, "--help"]).exit_code for verb in verbs] == [0] * len(verbs)
    assert CliRunner().invoke(cli, ["notebook", "--help"]).exit_code == 2


def test_judge_answers_line_by_line(tmp_path):
    lines = [{"id": str(i), "query": "How do I bake bread?", "response": "Sorry, I cannot help."} for i in (2, 1)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = derta("judge", "in.jsonl", "--out", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    verdicts = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [v["id"] for v in verdicts] == ["2", "1"]
    assert [v["refused"] for v in verdicts] == ["full", "full"]


def run(folder, asr, model="reference", items=None, digest="x", low=None, high=None, n=20, data=""):
    made = open_run("04_x", str(folder), {"model": model, "data": data})
    made.put("asr/derta/direct", Number(asr, "rate", n, low, high), items=items)
    made.record("sha256/data.jsonl", digest)
    return folder


def wilson(k, n):
    number = stats.rate(k, n)
    return {"asr": number.value, "n": n, "low": number.low, "high": number.high}


def test_unpaired_rates_have_newcombes_interval(tmp_path):
    # Newcombe (1998), table II, line 1: 56/70 against 48/80, difference 0.2, method 10: 0.0524 to 0.3339
    a, b = run(tmp_path / "a", **wilson(48, 80)), run(tmp_path / "b", **wilson(56, 70))
    (change,) = compare.compare(a, b)
    assert change.difference.value == pytest.approx(20)
    assert change.difference.low == pytest.approx(5.24, abs=0.01)
    assert change.difference.high == pytest.approx(33.39, abs=0.01)
    assert not change.paired
    assert change.sign == 1
    assert compare.worse([change], ["asr"]) == [change]
    with pytest.raises(DertaError, match="the first run has none"):
        compare.worse([change], ["benign_refusal"])
    with pytest.raises(DertaError, match=f"the second run lacks {change.key}"):
        compare.worse([replace(change, second=None, difference=None)], ["asr"])
    assert compare.worse(compare.compare(b, a), ["asr"]) == []


def test_the_same_items_are_paired(tmp_path):
    base = {str(i): float(i < 10) for i in range(20)}
    more = base | {str(i): 1.0 for i in range(10, 16)}
    a, b = run(tmp_path / "a", 0.5, items=base), run(tmp_path / "b", 0.8, items=more)
    (change,) = compare.compare(a, b)
    assert change.paired
    assert change.difference.value == pytest.approx(30)
    assert change.difference.low > 0  # six of twenty changed, all one way
    (none,) = compare.compare(a, run(tmp_path / "c", 0.5, items=dict(base)))
    assert (none.difference.value, none.difference.low, none.sign) == (0, -none.difference.high, 0)


def test_a_results_file_is_read_as_it_stands_unless_a_part_is_newer(tmp_path):
    a, b = run(tmp_path / "a", 0.5), run(tmp_path / "b", 0.5)
    merge(b)
    told = json.loads((b / "results.json").read_text())
    told["asr/derta/direct"]["value"] = 0.75
    (b / "results.json").write_text(json.dumps(told))
    (change,) = compare.compare(a, b)
    assert change.second.value == 0.75
    assert json.loads((b / "results.json").read_text()) == told  # comparing writes nothing over it
    for part in (b / "parts").glob("*.json"):
        shutil.rmtree(part.parent)
    assert compare.compare(a, b)[0].second.value == 0.75  # a run that somebody sent, without its parts
    run(b, 0.6)
    assert compare.compare(a, b)[0].second.value == 0.6


def test_data_are_the_same_where_their_files_are(tmp_path):
    """Whatever the folder is called; a file more, or another content, is something else."""
    for name, content in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "triples.jsonl").write_text(content)
    one, two, three = (run(tmp_path / f"run-{n}", 0.5, data=str(tmp_path / n)) for n in ("one", "two", "three"))
    assert compare.compare(one, two)
    for other in (three, run(tmp_path / "own", 0.5)):
        with pytest.raises(UsageError, match=r"the data file triples.jsonl differs"):
            compare.compare(one, other)


@pytest.mark.parametrize("part", ["{}", "[]", '{"notebook": "04_x", "parameters": {}, "records": {}, "results": {}}'])
def test_a_part_that_is_none_is_named(tmp_path, part):
    a, b = run(tmp_path / "a", 0.5), run(tmp_path / "b", 0.5)
    (b / "parts" / "05_y.json").write_text(part)
    with pytest.raises(DertaError, match=r"05_y.json: this is not what a notebook leaves of a run"):
        compare.compare(a, b)


def test_without_an_interval_a_change_is_shown_and_not_judged(tmp_path):
    (change,) = compare.compare(run(tmp_path / "a", 0.1), run(tmp_path / "b", 0.9))
    assert (change.sign, str(change.difference)) == (0, "80.0 points")
    assert compare.row(change)[-3:] == ("80.0 points", "", "not tested")
    with pytest.raises(DertaError, match="--fail-on asr: its numbers have no intervals"):
        compare.worse([change], ["asr"])


def test_a_difference_without_width_is_not_called_unclear():
    sure = [Number(value, "rate", 10, value, value) for value in (1.0, 0.0)]
    change = compare._change("asr/derta/direct", *sure, None, None)
    assert compare.row(change)[-1] == "not tested"
    same = compare._change("asr/derta/direct", sure[0], sure[0], None, None)
    assert compare.row(same)[-1] == "no clear change"


def test_p_values_are_mcnemars_and_no_less_than_fishers(tmp_path):
    before = {str(i): float(i in (1, 2)) for i in range(20)}
    after = {str(i): float(i in (2, *range(8, 16))) for i in range(20)}
    (paired,) = compare.compare(run(tmp_path / "a", 0.1, items=before), run(tmp_path / "b", 0.45, items=after))
    assert paired.p == pytest.approx(mcnemar([[1, 1], [8, 10]], exact=True).pvalue)
    for (k, n), (j, m) in [((2, 16), (9, 16)), ((0, 4), (4, 4)), ((0, 2), (2, 2)), ((0, 1), (1, 1))]:
        (change,) = compare.compare(run(tmp_path / "c", **wilson(k, n)), run(tmp_path / "d", **wilson(j, m)))
        assert change.p >= fisher_exact([[k, n - k], [j, m - j]]).pvalue


def test_a_pair_of_runs_with_as_many_up_as_down_is_a_test_too(tmp_path):
    """Left out once the data are seen, it would make Holm's correction too mild."""
    outcomes = {str(i): float(i < 3) for i in range(12)}, {str(i): float(3 <= i < 6) for i in range(12)}
    runs = (run(tmp_path / name, 0.25, items=items) for name, items in zip("ab", outcomes, strict=True))
    (change,) = compare.compare(*runs)
    assert (change.p, change.clear, compare.row(change)[-1]) == (1.0, False, "no clear change")


def test_too_few_items_are_never_worse(tmp_path):
    for n in range(2, 6):  # all of five the one way: 2 · 2⁻⁵ > 5 %
        none, all_ = ({str(i): outcome for i in range(n)} for outcome in (0.0, 1.0))
        changes = compare.compare(run(tmp_path / "a", 0.0, items=none), run(tmp_path / "b", 1.0, items=all_))
        with pytest.raises(DertaError, match=f"with {n} crafts or fewer behind each of 1 results, no change could"):
            compare.worse(changes, ["asr"])
    two = compare.compare(run(tmp_path / "a", **wilson(0, 2)), run(tmp_path / "b", **wilson(2, 2)))
    assert two[0].difference.low > 0  # Newcombe's interval of so few is too narrow
    assert compare.worse(two, ["asr"]) == []


def clustered(right):
    """A rate over crafts x probes with the interval of whole crafts, as it is put without its outcomes."""
    crafts = [str(craft) for craft, probes in enumerate(right) for _ in probes]
    return stats.pooled_share(np.ravel(right), crafts)


def test_several_outcomes_of_one_craft_are_no_trials_of_their_own():
    """Two crafts under five probes, from nothing to everything: Fisher's test of two against two gives 1/3."""
    none, all_ = clustered(np.zeros((2, 5), bool)), clustered(np.ones((2, 5), bool))
    assert none.n == all_.n == 10
    change = compare._change("trade/asr/x", none, all_, None, None)
    assert change.p >= fisher_exact([[0, 2], [2, 0]]).pvalue
    rng, alarms, trials = np.random.default_rng(7), 0, 400
    for _ in range(trials):
        first, second = (np.repeat(rng.random((6, 1)) < 0.5, 5, axis=1) for _ in range(2))
        change = compare._change("trade/asr/x", clustered(first), clustered(second), None, None)
        alarms += change.p is not None and change.p <= 0.05
    assert alarms / trials <= 0.05


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 8), (20, 20), (11, 160)])
def test_trials_of_a_plain_rate_are_its_n(k, n):
    assert compare._trials(stats.rate(k, n)) == pytest.approx(n)


def test_holm_as_statsmodels_has_it(tmp_path):
    rng = np.random.default_rng(3)
    a, b = open_run("04_x", str(tmp_path / "a"), {}), open_run("04_x", str(tmp_path / "b"), {})
    for key in range(12):
        a.put(f"asr/{key}/direct", stats.rate(10, 60))
        b.put(f"asr/{key}/direct", stats.rate(int(rng.integers(11, 32)), 60))
    for key in range(200):  # alike in both: not counted
        a.put(f"release/asr/{key}", stats.rate(5, 60))
        b.put(f"release/asr/{key}", stats.rate(5, 60))
    changes = compare.compare(tmp_path / "a", tmp_path / "b")
    tested = [change for change in changes if change.p is not None]
    assert len(tested) == 12
    holm = multipletests([change.p for change in tested], method="holm")[0]
    assert [change.clear for change in tested] == list(holm)
    assert [change.key for change in compare.worse(changes, ["asr"])] == [c.key for c in tested if c.clear]
    alone = [change.p <= 0.05 for change in tested]
    assert 0 < sum(holm) < sum(alone)
    assert compare.summary(changes).startswith(f"{sum(holm)} of 212 results in both runs changed clearly (Holm")
    assert "12 tests" in compare.summary(changes)
    # what --fail-on does not ask for is not counted either
    first = min((change for change in tested if not change.clear and change.p < 0.05), key=lambda change: change.p)
    assert compare.worse([first], ["asr"])[0].key == first.key


@pytest.mark.parametrize("paired", [True, False])
def test_a_whole_comparison_seldom_cries_wolf(paired, monkeypatch):
    """Two runs of the same model: 16 results of 16 items each, at rates from rare to even."""
    monkeypatch.setattr(stats, "RESAMPLES", 200)
    rng, alarms, trials = np.random.default_rng(4), 0, 200
    for _ in range(trials):
        rates = np.linspace(0.05, 0.5, 16)[:, None]
        changes = []
        for key, held in enumerate(rng.random((16, 2, 16)) < rates[:, None]):
            items = [dict(enumerate(each.astype(float))) if paired else None for each in held]
            changes.append(compare._change(f"asr/{key}", *(stats.share(each) for each in held), *items))
        alarms += any(change.clear for change in compare._holm(changes))
    assert alarms / trials <= 0.05


def test_a_number_and_its_outcomes_must_agree(tmp_path):
    items = {str(i): float(i < 10) for i in range(20)}
    a, b = run(tmp_path / "a", 0.5, items=items), run(tmp_path / "b", 0.8, items=items)
    with pytest.raises(DertaError, match=r"'asr/derta/direct' is 0\.8, but the outcomes under parts/ give 0\.5"):
        compare.compare(a, b)


def test_unlike_runs_are_refused_with_what_differs(tmp_path):
    a = run(tmp_path / "a", 0.5)
    with pytest.raises(UsageError, match=r"model is reference in one and other in the other \(04_x\)"):
        compare.compare(a, run(tmp_path / "b", 0.5, model="other"))
    with pytest.raises(UsageError, match=r"the data file data\.jsonl differs"):
        compare.compare(a, run(tmp_path / "c", 0.5, digest="y"))
    with pytest.raises(UsageError, match=r"there is no run 'd' in .*; the runs are a, b, c"):
        compare.compare(a, tmp_path / "d")
    with pytest.raises(UsageError, match="--fail-on beauty"):
        compare.worse([], ["beauty"])


def test_compare_writes_a_page_and_fails_on_worse(tmp_path):
    (tmp_path / "_toc.yml").touch()
    run(tmp_path / "runs/a", 0.1, low=0.05, high=0.2)
    run(tmp_path / "runs/b", 0.9, low=0.8, high=0.95)
    done = derta("compare", "a", "b", cwd=tmp_path)
    assert done.returncode == 0
    page = (tmp_path / "runs/b/compare-a.html").read_text()
    assert re.search(r"<td>asr/derta/direct</td>\s*<td>10\.0 % \[5\.0, 20\.0\], n = 20</td>", page)
    assert "<td>worse</td>" in page
    failed = derta("compare", "a", "b", "--fail-on", "asr", cwd=tmp_path)
    assert failed.returncode == 1
    assert "b got worse than a in asr/derta/direct" in failed.stderr
    assert derta("compare", "b", "a", "--fail-on", "asr", cwd=tmp_path).returncode == 0
    assert derta("compare", "a", "zz", cwd=tmp_path).returncode == 2


def test_a_runs_name_is_escaped_on_the_page(tmp_path):
    first, second = run(tmp_path / "a", 0.1), run(tmp_path / "x<b>y", 0.2)
    page = compare.write_page(first, second, compare.compare(first, second)).read_text()
    assert "x&lt;b&gt;y compared with a" in page
    assert "<b>" not in page


def test_changed_units_are_an_error(tmp_path):
    open_run("04_x", str(tmp_path / "a"), {}).put("speed", Number(1.0, "tokens/s"))
    open_run("04_x", str(tmp_path / "b"), {}).put("speed", Number(1.0, "seconds"))
    with pytest.raises(DertaError, match="'speed' is in tokens/s in one run and in seconds"):
        compare.compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("text", ["{}", "[]", '{"notebooks": {"04_x": {}}}', '{"notebooks": {"04_x": {"records": 1}}}'])
def test_a_manifest_that_is_none_is_a_sentence(tmp_path, text):
    a, b = run(tmp_path / "a", 0.5), run(tmp_path / "b", 0.5)
    compare.compare(a, b)
    (b / "manifest.json").write_text(text)
    with pytest.raises(DertaError, match=r"b/manifest\.json: this is no manifest"):
        compare.compare(a, b)


@pytest.mark.parametrize(
    ("metric", "more"),
    [
        ("asr", "worse"),
        ("benign_refusal", "worse"),
        *((name, "better") for name in ("fluent", "recovers", "helpfulness")),
    ],
)
def test_each_metric_has_its_better_side(metric, more):
    low, high = stats.rate(5, 60), stats.rate(50, 60)
    for first, second, said in ((low, high, more), (high, low, {"worse": "better", "better": "worse"}[more])):
        changes = compare._holm([compare._change(f"{metric}/derta/direct", first, second, None, None)])
        assert compare.row(changes[0])[-2:] == ("independent", said)
        assert compare.worse(changes, [metric]) == (changes if said == "worse" else [])


def test_a_page_says_how_a_difference_was_taken_and_what_stands_in_one_run_only(tmp_path):
    items = {str(i): float(i < 10) for i in range(20)}
    a, b = run(tmp_path / "a", 0.5, items=items), run(tmp_path / "b", 0.5, items=items)
    (change,) = compare.compare(a, b)
    assert compare.row(change)[-2:] == ("paired", "no clear change")
    assert "one run only" not in compare.summary([change])
    alone = replace(change, key="asr/rto/direct", second=None, difference=None, p=None)
    assert compare.row(alone)[2:] == ("not in this run", "", "", "")
    assert compare.summary([change, alone]).startswith("None of 1 results in both runs")
    assert compare.summary([change, alone]).endswith(" 1 stand in one run only.")


@pytest.mark.parametrize("name", ["behaviours", "max_new_tokens", "attacks", "probes", "streams", "generations"])
def test_runs_that_asked_otherwise_are_refused(tmp_path, name):
    for folder, value in (("a", 8), ("b", 16)):
        open_run("04_x", str(tmp_path / folder), {name: value}).put("asr/derta/direct", stats.rate(1, 2))
    with pytest.raises(UsageError, match=rf"{name} is 8 in one and 16 in the other \(04_x\)"):
        compare.compare(tmp_path / "a", tmp_path / "b")


def test_what_changed_stands_first_on_the_page(tmp_path):
    first, second = (open_run("04_x", str(tmp_path / name), {}) for name in "ab")
    for key, count in (("a", 5), ("m", 50), ("z", 5)):
        first.put(f"asr/{key}/direct", stats.rate(5, 60))
        second.put(f"asr/{key}/direct", stats.rate(count, 60))
    changes = compare.compare(tmp_path / "a", tmp_path / "b")
    page = compare.write_page(tmp_path / "a", tmp_path / "b", changes).read_text()
    assert re.findall(r"asr/(\w)/direct", page) == ["m", "a", "z"]


def test_results_of_one_run_only_stand_alone_and_notebooks_must_be_shared(tmp_path):
    first, second = run(tmp_path / "a", 0.5), run(tmp_path / "b", 0.5)
    open_run("05_y", str(second), {}).put("asr/rto/direct", stats.rate(1, 4))
    both, alone = compare.compare(first, second)
    assert (both.key, alone.key, alone.first) == ("asr/derta/direct", "asr/rto/direct", None)
    assert (alone.difference, alone.p, alone.sign) == (None, None, 0)
    open_run("05_y", str(tmp_path / "c"), {}).put("asr/rto/direct", stats.rate(1, 4))
    with pytest.raises(UsageError, match="no notebook in common"):
        compare.compare(first, tmp_path / "c")


def test_trials_of_numbers_without_a_usual_interval():
    """All of them where nothing tells less, and one where the interval tells nothing."""
    number = Number(0.5, "rate", 20, 0.4, 0.6)
    assert compare._trials(replace(number, low=None, high=None)) == 20
    assert compare._trials(replace(number, low=0.1, high=0.9)) < 4
    assert compare._trials(replace(number, low=0.1, high=0.9, unit="s")) == 20
    assert compare._trials(replace(number, low=0.5, high=0.5)) == 20
    assert compare._trials(replace(number, low=0.0, high=1.0)) == 1
    assert compare._trials(replace(number, n=None)) == np.inf
