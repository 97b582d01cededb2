"""The explorer's data: what goes in comes out, hostile text stays inside the string, bad records are sentences."""

import json
import re

import pytest
from explorer_demo import DEPTHS, HOSTILE, METHODS, demo_records
from tiny import tiny_folder

from derta_lib import explorer, position
from derta_lib.chat import ask
from derta_lib.data import Behaviour
from derta_lib.errors import DertaError
from derta_lib.generation import local_target


def test_data_hold_every_probability_and_continuation_once():
    data = explorer.build_data(demo_records(queries=2))
    assert [method["name"] for method in data["methods"]] == list(METHODS)
    assert [query["id"] for query in data["queries"]] == ["q0", "q1"]
    run = data["queries"][1]["runs"]["vanilla"]
    assert run["p"][:3] == [1.0, round(2.718281828459045 ** (-1 / 6), 4), round(2.718281828459045 ** (-2 / 6), 4)]
    assert data["queries"][1]["depths"] == list(DEPTHS)
    assert run["goes_on"] == [f"Sorry, said by vanilla. [{depth}]" for depth in DEPTHS]


def test_the_script_is_one_statement_that_no_text_can_leave(tmp_path):
    path = explorer.write(tmp_path, explorer.build_data(demo_records()))
    assert path.name == "explorer.js"
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"[<>&\u2028\u2029\x00-\x09\x0b-\x1f]", text)
    found = re.fullmatch(r"window\.DERTA_EXPLORER=(\{.*\});\n", text)
    tokens = json.loads(found[1])["queries"][0]["tokens"]
    assert tokens[1] == HOSTILE[0]
    assert tokens[3].startswith("␛[31mred␛[0m <U+202E>right to left")
    assert tokens[4] == HOSTILE[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "the field 'tokens' is missing"),
        ({"p_refusal": [0.5]}, "40 tokens but 1 probabilities"),
        ({"p_refusal": [float("nan")] * 40}, "not between 0 and 1"),
        ({"p_refusal": [1.5] * 40}, "not between 0 and 1"),
        ({"method": "magic"}, "'magic' is not known"),
        ({"continuations": {}}, "continuations need depths"),
        ({"continuations": {41: "x"}}, "continuations need depths from 0 to 40"),
        ({"query": "another"}, "differ from those of another method"),
        ({"method": "base"}, "a second record for 'base'"),
    ],
)
def test_a_bad_record_is_named(change, message):
    records = demo_records(queries=1)[:2]
    records[1] = {key: value for key, value in (records[1] | change).items() if value is not None}
    with pytest.raises(DertaError, match=f"record 2.*{re.escape(message)}"):
        explorer.build_data(records)


def test_no_records_is_a_sentence():
    with pytest.raises(DertaError, match="no records"):
        explorer.build_data([])


def test_models_are_measured_at_the_depths_that_a_response_reaches(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    boat = Behaviour("a", "How do I fold a boat?", "", harmful="Step 1: fold the paper. Step 2: wait.")
    kite = Behaviour("b", "How do I fold a kite?", "", harmful="Sure")
    records = list(explorer.measure({"vanilla": folder, "derta": folder}, [boat, kite], [0, 2, 8], 3))
    assert [(r["method"], r["query_id"]) for r in records] == [
        *(("vanilla", "a"), ("vanilla", "b"), ("derta", "a"), ("derta", "b"))
    ]
    target = local_target(folder)
    long = records[0]
    assert list(long["continuations"]) == [0, 2, 8]
    [alone] = target.respond([ask(boat.query, target.chat.cut(boat.harmful, 2))], 3)
    assert long["continuations"][2] == alone
    frame = position.refusal_probability(target, [boat])
    assert long["p_refusal"] == pytest.approx(frame.p.tolist()[:-1])
    assert max(records[1]["continuations"]) <= len(records[1]["tokens"])
    explorer.build_data(records)
