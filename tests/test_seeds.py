"""Seeds as repeats: rates and changes by hand, the file that is written, a whole measurement of a tiny model."""

import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats
from tiny import tiny_folder

from derta_lib import models, seeds
from derta_lib.errors import UsageError
from derta_lib.evaluation import KINDS
from derta_lib.runs import environment
from derta_lib.stats import rate

ROOT = Path(__file__).parents[1]
SAID = {("vanilla", 0): "0000", ("vanilla", 1): "0030", ("derta", 0): "1112", ("derta", 1): "1110"}
"""Steps given to all but one under vanilla tuning, to one under DeRTa, which repeats itself once."""


def fake(methods, seed, budget):
    return [
        {"seed": seed, "method": m, "attack": a, "kinds": SAID[m, seed], "twins": "0000"}
        for m in methods
        for a in ("prefilling-16", "direct")
    ]


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "measure", fake)
    monkeypatch.setattr(seeds, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    return seeds.make_seeds(tmp_path / "seeds.json", ROOT, "smoke", 2, 3)


def test_rates_and_changes_by_hand(made):
    rates = made.rates("gives the steps").set_index(["method", "attack"]).number
    assert rates["derta", "direct"].value == 1 / 8
    assert rates["vanilla", "direct"].value == 7 / 8
    assert rates["derta", "direct"].n == 8
    assert [made.rate("derta", ["direct"], kind).value for kind in KINDS] == [1 / 8, 6 / 8, 1 / 8, 0]
    assert made.rates("twin refused").number.iloc[0] == replace(rate(0, 2), n=8)  # two seeds, alike


def test_a_change_by_hand(made):
    """From 100 and 75 % to 0 and 25 %, so by −100 and −50 points in the two seeds."""
    change = made.change("derta", ["direct"], "gives the steps")
    assert (change.value, change.unit, change.n) == (-75, "points", 8)
    assert (change.low, change.high) == (-100, 100)  # t₁ alone would reach beyond
    kept = seeds.read_seeds()
    of = kept.records[kept.records.attack.isin(["direct", "codeattack"])]
    steps = of.assign(k=of.kinds.str.count("0"), n=of.kinds.str.len()).pivot_table(("k", "n"), "seed", "method", "sum")
    apart = 100 * (steps.k / steps.n).eval("dpo - vanilla")
    number = kept.change("dpo", ["direct", "codeattack"], "gives the steps")
    assert (number.value, number.n) == (pytest.approx(apart.mean()), steps.n.dpo.sum())
    by_seed = stats.t.interval(0.95, len(apart) - 1, apart.mean(), stats.sem(apart))
    assert (number.low, number.high) == pytest.approx(by_seed, abs=0.25 * (by_seed[1] - by_seed[0]))
    both = made.change("derta", ["direct", "prefilling-16"], "gives the steps")
    assert (both.value, both.n) == (-75, 16)
    assert made.change("derta", ["direct"], "twin refused").low < 0  # nothing seen on either side is not certainty
    assert made.change("derta", ["selfcipher"], "gives the steps") is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_workers_compute_as_their_parent_does(tmp_path, monkeypatch, dtype):
    """In the precision that it found, whatever they would find under load, and on the threads that the file names."""
    pools = []

    def pool(*arguments, **named):
        pools.append(ProcessPoolExecutor(*arguments, **named))
        found.extend(pools[-1].submit(ask).result() for ask in (models.precision, torch.get_num_threads))
        return ThreadPoolExecutor(1)

    found = []
    monkeypatch.setenv("DERTA_PRECISION", dtype)
    monkeypatch.setattr(seeds, "measure", fake)
    monkeypatch.setattr(seeds, "ProcessPoolExecutor", pool)
    environment.cache_clear()
    made = seeds.make_seeds(tmp_path / "seeds.json", ROOT, "smoke", 2, 1)
    environment.cache_clear()
    pools[0].shutdown()
    assert found == [dtype, made.machine["threads"]] == [made.machine["precision"], 1]


def test_the_file_holds_all_in_order_with_its_machine(made, tmp_path):
    kept = json.loads((tmp_path / "seeds.json").read_text())
    order = [(r["method"], r["seed"], r["attack"]) for r in kept["records"]]
    attacks = ("prefilling-16", "direct")
    assert order == [(m, s, a) for m in ("vanilla", "derta") for s in (0, 1) for a in attacks]
    assert kept["request"]["steps"] == 2
    assert {"date", "machine"} <= kept.keys()
    assert "2 seeds, 2 steps" in made.says


def test_dpo_is_made_where_its_vanilla_checkpoint_is(tmp_path, monkeypatch):
    asked = []

    def measure(methods, seed, budget):
        asked.append((tuple(methods), seed))
        return []

    monkeypatch.setattr(seeds, "measure", measure)
    monkeypatch.setattr(seeds, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(seeds, "read_seeds", lambda path: None)
    seeds.make_seeds(tmp_path / "seeds.json", ROOT, "cpu", 1, 1)
    assert asked[0] == (("vanilla", "dpo"), 0)
    assert sorted(name for methods, _ in asked for name in methods) == sorted(
        ["vanilla", "harmful_prefix", "rto", "derta", "recaug", "dpo"]
    )


def test_a_failure_leaves_what_has_not_begun(tmp_path, monkeypatch):
    """An error does not wait for the other trainings, and nothing is written."""
    begun = []

    def measure(methods, seed, budget):
        begun.append(seed)
        time.sleep(0.01)
        raise ValueError("no room")

    monkeypatch.setattr(seeds, "measure", measure)
    monkeypatch.setattr(seeds, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(1))
    with pytest.raises(ValueError, match="no room"):
        seeds.make_seeds(tmp_path / "seeds.json", ROOT, "smoke", 500, 1)
    assert len(begun) < 500
    assert not (tmp_path / "seeds.json").exists()


def test_a_profile_without_vanilla_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "measure", lambda *_: pytest.fail("nothing may be trained"))
    folder = tmp_path / "notebooks" / "profiles"
    folder.mkdir(parents=True)
    (folder.parent / "05_components.ipynb").write_bytes((ROOT / "notebooks" / "05_components.ipynb").read_bytes())
    (folder / "odd.yaml").write_text("components: [derta, dpo]\n")
    with pytest.raises(UsageError, match="lack vanilla"):
        seeds.make_seeds(tmp_path / "seeds.json", tmp_path, "odd", 1, 1)


def test_a_mistyped_name_of_a_profile_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "measure", lambda *_: pytest.fail("nothing may be trained"))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "notebooks" / "profiles" / "odd.yaml").write_text("learningrate: 1.0e-4\n")
    with pytest.raises(UsageError, match=r"unknown parameter 'learningrate'\. Did you mean 'learning_rate'"):
        seeds.make_seeds(tmp_path / "seeds.json", tmp_path, "odd", 1, 1)
    with pytest.raises(UsageError, match="is not a checkout"):
        seeds.make_seeds(tmp_path / "new" / "seeds.json", tmp_path / "notebooks", "odd", 1, 1)
    assert not (tmp_path / "new").exists()


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--seeds 0"):
        seeds.make_seeds(tmp_path / "seeds.json", ROOT, "smoke", 0, 1)
    with pytest.raises(UsageError, match="there is no profile 'smoek'"):
        seeds.make_seeds(tmp_path / "seeds.json", ROOT, "smoek", 1, 1)


def test_a_measurement_of_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path / "cache"))
    budget = {
        "model": tiny_folder(tmp_path),
        "data": "",
        "steps": 1,
        "learning_rate": 1e-3,
        "behaviours": 2,
        "max_new_tokens": 2,
        "attacks": ["direct", "prefilling-4"],
    }
    records = seeds.measure(["base", "derta"], 0, budget)
    assert [(r["method"], r["attack"]) for r in records] == [
        (m, a) for m in ("base", "derta") for a in ("direct", "prefilling-4")
    ]
    assert all(len(r["kinds"]) == 2 and set(r["kinds"]) <= set("0123") for r in records)
    assert all(len(r["twins"]) == 2 and set(r["twins"]) <= set("01") for r in records)


def test_the_kept_file_reads():
    kept = seeds.read_seeds()
    assert kept.records.seed.nunique() == kept.request["seeds"] >= 5
    lengths = {len(each) for column in ("kinds", "twins") for each in kept.records[column]}
    assert lengths == {kept.request["behaviours"]}
