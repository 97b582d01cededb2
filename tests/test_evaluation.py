"""Evaluation on a tiny random model: what is asked, what is counted, and what a second call reuses."""

import pandas as pd
import pytest
from tiny import tiny_folder

from derta_lib import evaluation
from derta_lib.corpus import concord
from derta_lib.evaluation import Suite, loops, responses, searched_responses

CORPUS = concord(0)
BEHAVIOURS = CORPUS.behaviours["test"][:2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path / "cache"))
    return tiny_folder(tmp_path / "tiny")


def same_again(ask, monkeypatch):
    """A call's frame, made once and read again without any model."""
    first = ask()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "local_target", None)
        pd.testing.assert_frame_equal(ask(), first)
    return first


def test_each_attack_meets_each_behaviour_once(folder, monkeypatch):
    suite = Suite(("direct", "prefilling-4", "selfcipher"), BEHAVIOURS, CORPUS.triples[:3], max_new_tokens=4)
    frame = same_again(lambda: responses(folder, suite), monkeypatch)
    assert list(zip(frame.attack, frame.behaviour, strict=True)) == [
        (attack, behaviour.id) for attack in suite.attacks for behaviour in BEHAVIOURS
    ]
    assert frame.benign.tolist() == [False, True] * 3
    assert frame.pair.nunique() == 1
    longer = responses(folder, Suite(("direct",), BEHAVIOURS, (), max_new_tokens=8))
    assert (longer.response.str.len() > frame[frame.attack == "direct"].response.str.len()).all()


def test_searches_are_two_attacks_with_the_same_columns(folder, monkeypatch):
    budget = {"streams": 2, "iterations": 1, "population": 4, "steps": 2}
    frame = same_again(lambda: searched_responses(folder, folder, BEHAVIOURS, 4, 0, **budget), monkeypatch)
    assert frame.attack.tolist() == ["pair"] * 2 + ["autodan"] * 2
    assert set(frame.behaviour) == {behaviour.id for behaviour in BEHAVIOURS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Sorry, but no. " * 9, True), ("Sorry, but I cannot help you with that request.", False), ("no no no", False)],
)
def test_a_text_that_repeats_itself_loops(text, expected):
    assert loops(text) == expected
