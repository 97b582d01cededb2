"""Users' files: whatever is wrong with one, a sentence names the file and its line."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from derta_lib.attacks.jailbreakchat import read_templates
from derta_lib.behaviours import load_behaviours
from derta_lib.data import Pair, Triple, read_records
from derta_lib.errors import DertaError, UsageError
from derta_lib.experiment import experiment, load_data
from derta_lib.judges.files import judge_file, read_items
from derta_lib.params import read_profile
from derta_lib.records import (
    append_jsonl,
    content_key,
    read_csv,
    read_json,
    read_jsonl,
    resume_jsonl,
    write_in_parts,
    write_json,
    write_jsonl,
    write_text,
)
from derta_lib.results import Number, load

TRIPLE = {"id": "a", "query": "¿q?", "safe": "Sorry", "harmful": "1. Fold"}
PAIR = {"id": "a", "query": "q", "response": "r"}
READERS = {
    "triples.jsonl": (lambda path: read_records(Triple, path), TRIPLE),
    "pairs.jsonl": (lambda path: read_records(Pair, path), PAIR),
    "behaviours.jsonl": (lambda path: load_behaviours(str(path)), {"query": "q"}),
    "items.jsonl": (read_items, PAIR),
    "templates.jsonl": (read_templates, {"template": "{query}"}),
    "any.jsonl": (lambda path: list(read_jsonl(path)), {}),
    "behaviours.csv": (lambda path: load_behaviours(str(path)), "query\nq"),
    "any.json": (read_json, {}),
    "cpu.yaml": (read_profile, "steps: 3"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_file_and_line(tmp_path, name):
    read, good = READERS[name]
    good = (good if isinstance(good, str) else json.dumps(good, ensure_ascii=False)).encode()
    path = tmp_path / name

    def says(data, said):
        path.write_bytes(data)
        with pytest.raises(DertaError, match=re.escape(f"{path}{said}")):
            read(path)

    path.write_bytes(good + b"\n")
    plain = read(path)
    path.write_bytes(b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n") + b"\r\n")
    assert read(path) == plain
    lines = good.count(b"\n") + 2
    says(good + b"\n\xe9t\xe9\n", f", line {lines}: not UTF-8 text")
    says(b"\xef\xbb\xbf" + good + b"\n\n\xff\n", f", line {lines + 1}: not UTF-8 text")
    says(good.decode().encode("utf-16"), ", line 1: not UTF-8 text")
    if path.suffix != ".yaml":  # an empty profile leaves all parameters at their defaults
        says(b"", "")
        says(b"\n \n", "")
    if path.suffix == ".jsonl":
        for bad in (b"{", b'"text', b'{"id": NaN}', b'{"id": "\\ud83d"}', b"[" * 100_000, b"1" * 5000):
            says(good + b"\n" + bad + b"\n", f", line {lines}: not valid JSON")
    path.unlink()
    path.mkdir()
    with pytest.raises(DertaError, match="this is a folder"):
        read(path)
    path.rmdir()
    with pytest.raises(DertaError, match=r"there is no (such file|profile)"):
        read(path)


def test_json_names_the_line(tmp_path):
    (tmp_path / "a.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(DertaError, match=r"a\.json, line 3: not valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"safe": None}, "the key 'safe' is missing"),
        ({"safe": " "}, "'safe' must be text and not empty"),
        ({"harmful": 3}, "'harmful' must be text"),
        ({"id": ["b"]}, "'id' must be text"),
        ({"note": "x"}, "unknown field 'note'; Triple has id, query, safe, harmful"),
        ({"id": "a"}, "the id 'a' is repeated"),
    ],
)
def test_a_record_is_whole_or_named(tmp_path, change, said):
    row = {key: value for key, value in {**TRIPLE, "id": "b", **change}.items() if value is not None}
    path = write_jsonl(tmp_path / "t.jsonl", [TRIPLE, row])
    with pytest.raises(DertaError, match=f"t.jsonl, line 2: {said}"):
        read_records(Triple, path)
    assert read_records(Triple, write_jsonl(path, [TRIPLE])) == [Triple(**TRIPLE)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_names_the_file():
    with pytest.raises(DertaError, match=r"/dev/full: it could not be written \(No space left on device\); mend that"):
        append_jsonl("/dev/full", TRIPLE)


def test_a_folder_of_data_names_the_file_that_is_missing(tmp_path):
    write_jsonl(tmp_path / "triples.jsonl", [TRIPLE])
    write_jsonl(tmp_path / "behaviours.jsonl", [{"query": "q"}])
    with pytest.raises(DertaError, match=r"pairs\.jsonl: there is no such file"):
        load_data(str(tmp_path), 0)
    write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    assert [b.query for b in load_data(str(tmp_path), 0).behaviours["test"]] == ["q"]


BUDGET = {
    "model": "reference",
    "data": "",
    "seed": 0,
    "steps": 1,
    "learning_rate": 1e-3,
    "behaviours": 1,
    "max_new_tokens": 4,
}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("behaviours", 0, "behaviours is 0; it must be 1 or more"),
        ("max_new_tokens", -1, "max_new_tokens is -1; it must be 1 or more"),
        ("seed", -1, "seed is -1; it must be 0 or more"),
        ("steps", "twenty", "steps is 'twenty'; it must be a whole number"),
        ("learning_rate", 0.0, "learning_rate is 0.0; it must be above 0"),
        ("methods", ["vanilla", "nope"], "method 'nope' is not known"),
        ("components", [], r"components is \[\]; it must hold something"),
        ("components", ["derta", "derta"], "nothing twice"),
        ("attacks", ["direkt"], "attack 'direkt': there is none of this name"),
        ("probes", ["direct", "pair"], "probes: pair searches; notebook 4 runs it on `searched` requests"),
        ("presets", ["papr"], "preset 'papr' is not known; the presets are fixed, paper, paper-lora"),
        ("depths", [4, 0], "attack 'prefilling-0': there is none"),
        ("weights", [-0.5], "the weight λ is -0.5"),
        ("searched", -1, "searched is -1; it must be 0 or more"),
        ("streams", 0, "streams is 0; it must be 1 or more"),
    ],
)
def test_an_experiment_looks_at_every_parameter_before_it_begins(name, value, said):
    with pytest.raises(UsageError, match=said):
        experiment(BUDGET | {name: value})


def test_an_experiment_asks_harmful_and_benign_requests(tmp_path):
    write_jsonl(tmp_path / "triples.jsonl", [TRIPLE])
    write_jsonl(tmp_path / "pairs.jsonl", [PAIR])

    def begin(*behaviours):
        write_jsonl(tmp_path / "behaviours.jsonl", behaviours)
        return experiment(BUDGET | {"data": str(tmp_path)})

    bad = {"id": "a", "query": "q", "harmful": "r"}
    good = [{"id": name, "query": name, "harmful": "r", "benign": True} for name in "bc"]
    with pytest.raises(UsageError, match=r"behaviour 'd' has no 'harmful' in behaviours.jsonl \(1 lack it\)"):
        begin(bad, *good, {"id": "d", "query": "q"})
    for asked, kind in (([bad], "benign"), (good, "harmful")):
        with pytest.raises(UsageError, match=f"behaviours.jsonl holds no {kind} request"):
            begin(*asked)
    study = begin(bad, *good)
    assert [b.id for b in study.attacked()] == ["a", "b"]
    assert [b.id for b in begin(bad | {"twin": "c"}, *good).attacked()] == ["a", "c"]
    named = [row | {"twin": twin} for row, twin in zip(good, ("z", "a"), strict=True)]
    assert [b.id for b in begin(bad, *named).attacked()] == ["a", "c"]  # named on the benign side alone
    with pytest.raises(UsageError, match=r"method .dertaa. is not known; the methods are base, vanilla, .*, dpo"):
        study.checkpoint("dertaa")


@pytest.mark.parametrize("text", ["on: 3", "[]", "0", "steps: 2024-13-45", "steps: 0x_", "steps: !!bool x"])
def test_a_profile_has_names_and_values(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text + "\n")
    with pytest.raises(DertaError, match=r"name: value|not valid YAML"):
        read_profile(tmp_path / "odd.yaml")


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {"value": "1"},
        {"value": 0.5, "low": "0"},
        {"value": 99},
        {"value": 0.5, "low": 0.6, "high": 0.7},
        {"value": 0.5, "low": 0.4, "high": 0.45},
        {"value": 0.9, "low": 0.8, "high": 1.05},
        {"value": 0.1, "low": -0.05, "high": 0.2},
        {"value": -3.0, "unit": "points", "low": -2.0, "high": -4.0},
        {"value": 0.5, "unit": 3},
        {"value": None, "unit": "s"},
        {"value": True, "x": 1},
    ],
)
def test_a_results_file_holds_numbers(tmp_path, fields):
    path = write_json(tmp_path / "results.json", {"asr/derta/direct": fields})
    with pytest.raises(DertaError, match="the entry 'asr/derta/direct' is not a number record"):
        load(path)


def test_an_empty_text_is_a_missing_one(tmp_path):
    path = write_text(tmp_path / "b.jsonl", '{"query": "How can I fold a kite?", "declarative": ""}\n')
    assert load_behaviours(str(path))[0].declarative == "I will tell you how to fold a kite:\nStep 1:"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number(0.125, "rate", 8, 0.0222, 0.4709), "12.5 % [2.2, 47.1], n = 8"),
        (Number(-1e-9, "rate"), "0.0 %"),
        (Number(-0.0, "points"), "0.0 points"),
        (Number(-12.346, "points", 5, -20.0, 1.0), "-12.3 points [-20.0, 1.0], n = 5"),
        (Number(0.0873, "ms"), "0.087 ms"),
        (Number(12345.6, "s", 3, 1200.0, 15000.0), "12,346 s [1,200, 15,000], n = 3"),
        (Number(0.906, "", 50), "0.91, n = 50"),
        (Number(7, "count", 10), "7, n = 10"),
    ],
)
def test_a_number_as_text(number, text):
    assert str(number) == text


def test_an_output_is_checked_before_the_work(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [PAIR])
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    for out, said in ((source, "this is the input"), (link, "this is the input"), (source / "x", "cannot be written")):
        with pytest.raises(UsageError, match=said):
            judge_file(source, out, "labelled")
    with pytest.raises(UsageError, match="cannot be written"):
        write_text(tmp_path / ("x" * 300), "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "link.jsonl"]
    assert source.read_text() == json.dumps(PAIR, sort_keys=True, ensure_ascii=False) + "\n"


def test_a_name_that_stands_twice_is_refused(tmp_path):
    path = write_text(tmp_path / "x.jsonl", '{"id": 1, "query": "a", "query": "b"}\n')
    with pytest.raises(DertaError, match=r"line 1: .*'query' stands twice"):
        list(read_jsonl(path))
    path = write_text(tmp_path / "x.csv", "query,query\na,b\n")
    with pytest.raises(DertaError, match="line 1: the column 'query' stands twice"):
        list(read_csv(path))


def test_a_long_cell_of_a_csv_is_read(tmp_path):
    path = write_text(tmp_path / "x.csv", f"query\n{'a' * 200_000}\n")
    [(_, row)] = read_csv(path)
    assert len(row["query"]) == 200_000


def test_nothing_is_written_over_a_folder(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [PAIR])
    with pytest.raises(UsageError, match="this is a folder; name a file to write"):
        judge_file(source, tmp_path)
    with pytest.raises(UsageError, match="this is a folder"):
        write_text(tmp_path, "x")


def test_a_device_stays_and_a_link_leads_on(tmp_path):
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="no file but a device or pipe"):
        write_text(pipe, "x")
    link.symlink_to(file)
    write_text(link, "x")
    assert link.is_symlink()
    assert file.read_text() == "x"


@pytest.mark.parametrize("torn", [b'{"id": "b', b'{"id": "\xe2\x80', b"\xff"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + torn)
    assert resume_jsonl(path) == {"a": {"id": "a"}}
    path.write_bytes(torn)
    assert resume_jsonl(path) == {}
    assert path.read_bytes() == torn  # nothing is lost before it is known whose file this is
    path.write_bytes(b'{"id": "a"}\n{"id": "b"}')
    assert list(resume_jsonl(path)) == ["a", "b"]
    path.write_bytes(b'{"id": ["a"]}\n')
    with pytest.raises(DertaError, match="line 1: 'id' must be text"):
        resume_jsonl(path)


@dataclass(frozen=True)
class Sheet:
    length: int


def squares(calls, stop=None):
    """Square each length of a part, two records an item; the part that holds `stop` fails."""

    def make(part):
        if stop in [sheet.length for sheet in part]:
            raise KeyboardInterrupt
        calls.append([sheet.length for sheet in part])
        return ({"length": sheet.length, "area": sheet.length**power} for sheet in part for power in (1, 2))

    return make


def test_what_is_written_in_parts_goes_on_where_it_was_stopped(tmp_path):
    sheets, out, begun = [Sheet(n) for n in range(1, 8)], tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    expected = [{"length": n, "area": n**power} for n in range(1, 8) for power in (1, 2)]

    def run(request, calls, stop=None):
        return write_in_parts(out, sheets, request, squares(calls, stop), 3)

    def stopped(request, stop):
        with pytest.raises(KeyboardInterrupt):
            run(request, [], stop)
        assert not out.exists()

    stopped("a", 2)
    assert not begun.exists()  # nothing was made
    stopped("a", 7)
    calls = []
    assert run("a", calls) == expected
    assert calls == [[7]]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert not begun.exists()
    out.unlink()

    stopped("a", 7)
    with pytest.raises(UsageError, match="another request"):
        run("another", [])
    begun.write_bytes(begun.read_bytes()[:-9])  # torn in writing the second part
    calls = []
    assert run("a", calls) == expected
    assert calls == [[4, 5, 6], [7]]

    write_jsonl(begun, [PAIR])
    with pytest.raises(DertaError, match="line 1: the key 'records' is missing"):
        run("a", [])
    assert list(read_jsonl(begun)) == [(1, PAIR)]  # what is not ours is not written over


def test_a_key_does_not_hang_on_the_order_of_names():
    assert content_key({"a": 1, "b": {"c": 2, "d": 3}}) == content_key({"b": {"d": 3, "c": 2}, "a": 1})
    assert content_key("a", "b") != content_key("b", "a")


def test_what_is_written_can_be_read_by_everybody_and_a_failure_leaves_nothing(tmp_path):
    path = write_text(tmp_path / "page.html", "x")
    assert path.stat().st_mode & 0o777 == 0o644
    path.unlink()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(DertaError, match=r"x: it could not be read \(File name too long\)"):
        read_json(tmp_path / ("x" * 300))


def test_a_results_file_is_an_object(tmp_path):
    with pytest.raises(DertaError, match=r"results\.json: this is no results file"):
        load(write_json(tmp_path / "results.json", []))
