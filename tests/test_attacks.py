"""Single-turn attacks, the registry, and the run that writes and resumes a file of responses."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from derta_lib import attacks
from derta_lib.attacks.base import SingleTurn
from derta_lib.attacks.codeattack import program_around
from derta_lib.attacks.jailbreakchat import TEMPLATES, read_templates
from derta_lib.attacks.run import attack
from derta_lib.chat import Prompt, ask
from derta_lib.data import Behaviour, Triple
from derta_lib.errors import DertaError, UsageError
from derta_lib.records import write_jsonl

SINGLE_TURN = ("direct", "prefilling-2", "completingattack", "selfcipher", "codeattack", "jailbreakchat")
DEMONSTRATIONS = tuple(Triple(f"t{n}", f"Question {n}?", "No.", f"1. Take part {n}.\n2. Turn it.") for n in range(6))
BEHAVIOURS = tuple(
    Behaviour(f"b{n}", f"How is kite {n} made?", f"Making kite {n}. Step 1:", f"Sure: fold {n} twice and glue it.")
    for n in range(5)
)


class Echo:
    """A target that answers with a function of the prompt alone, and remembers what it was asked."""

    name = "echo"

    def __init__(self, calls_before_it_dies: int = 10**9) -> None:
        self.asked: list[Prompt] = []
        self.left = calls_before_it_dies

    def respond(self, prompts, max_new_tokens):
        if self.left < len(prompts):
            raise KeyboardInterrupt
        self.left -= len(prompts)
        self.asked += prompts
        return [
            f"{len(attacks.base.prompt_text(prompt))} ü\u2028 {prompt.prefill}"[:max_new_tokens] for prompt in prompts
        ]


def words_cut(text: str, n: int) -> str:
    return "".join(re.findall(r"\S+\s*", text)[:n])


def make(name, **other):
    return attacks.build(name, **{"max_new_tokens": 40, "cut": words_cut, "demonstrations": DEMONSTRATIONS} | other)


def prompts_of(name, behaviours=BEHAVIOURS, seed=0, **other):
    target = Echo()
    attempts = list(make(name, **other).run(behaviours, target, seed=seed))
    assert [attempt.behaviour for attempt in attempts] == list(behaviours)
    assert [attempt.prompt for attempt in attempts] == target.asked
    assert [attempt.response for attempt in attempts] == Echo().respond(target.asked, 40)
    return target.asked


@pytest.mark.parametrize("name", SINGLE_TURN)
def test_a_prompt_depends_on_behaviour_and_seed_alone(name):
    together = prompts_of(name)
    one_by_one = [prompts_of(name, [behaviour])[0] for behaviour in reversed(BEHAVIOURS)]
    assert together == one_by_one[::-1]
    assert len(set(map(repr, together))) == len(BEHAVIOURS)


@pytest.mark.parametrize("name", SINGLE_TURN)
def test_many_behaviours_go_in_few_calls_and_lose_none(name):
    many = [Behaviour(f"m{n}", f"Query {n}", f"Text {n}:", f"Answer number {n}") for n in range(300)]
    assert len(prompts_of(name, many)) == 300


@pytest.mark.parametrize(
    "query", ["How is it made?", "Say \"yes\" \\ or 'no' in 3\tlines\n please", "Çà et là – 🙂 {pushes} %s", "one"]
)
def test_codeattack_runs_as_python_and_gives_the_request_back(query):
    [prompt] = prompts_of("codeattack", [Behaviour("b", query, "")])
    text = prompt.messages[0]["content"]
    code = text.split("```python\n")[1].rsplit("```")[0]
    namespace = {}
    exec(code, namespace)
    task, manual = namespace["write_manual"]()
    assert task.split() == query.split()
    assert manual == []
    pushed = [eval(argument) for argument in re.findall(r"stack\.append\((.*)\)", code)]
    assert pushed == query.split()[::-1]
    if len(query.split()) > 1:
        assert query not in text


def test_codeattack_on_random_words_gives_them_back():
    rng = random.Random(5)
    for _ in range(200):
        query = " ".join(
            "".join(rng.choices("ab\"'\\{}#é`\x7f", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 9))
        )
        namespace = {}
        exec(program_around(query).split("```python\n", 1)[1].rsplit("```", 1)[0], namespace)
        assert namespace["write_manual"]()[0] == query


@pytest.mark.parametrize("k", [1, 3, 5])
def test_selfcipher_shows_k_demonstrations_then_the_query(k):
    texts = [prompt.messages[0]["content"] for prompt in prompts_of("selfcipher", k=k)]
    for text, behaviour in zip(texts, BEHAVIOURS, strict=True):
        exchanges = re.findall(r"user: (.*?)\nassistant: (.*?)\n\n", text, re.S)
        assert exchanges == [(triple.query, triple.harmful) for triple in DEMONSTRATIONS[:k]]
        assert text.endswith(f"\n\n{behaviour.query}")
    assert len({text.removesuffix(behaviour.query) for text, behaviour in zip(texts, BEHAVIOURS, strict=True)}) == 1


def test_selfcipher_needs_its_demonstrations():
    with pytest.raises(UsageError, match="7 demonstrations were asked for and 6 given"):
        make("selfcipher", k=7)


def test_completingattack_is_raw_text_and_the_others_are_one_user_turn():
    assert prompts_of("completingattack") == [Prompt(raw=behaviour.declarative) for behaviour in BEHAVIOURS]
    for name in set(SINGLE_TURN) - {"completingattack"}:
        assert all(p.raw is None and [m["role"] for m in p.messages] == ["user"] for p in prompts_of(name))


@pytest.mark.parametrize(("depth", "expected"), [(1, "Sure: "), (3, "Sure: fold 0 "), (99, BEHAVIOURS[0].harmful)])
def test_prefilling_gives_the_first_tokens_of_the_harmful_response(depth, expected):
    assert prompts_of(f"prefilling-{depth}")[0].prefill == expected


def test_prefilling_that_would_prefill_nothing_is_refused():
    """As by a tokenizer that writes other letters than it reads."""
    with pytest.raises(UsageError, match=f"prefilling-4: .* of '{BEHAVIOURS[0].id}' as it stands"):
        prompts_of("prefilling-4", cut=lambda text, tokens: "")
    with pytest.raises(UsageError, match="attack 'prefilling-0': there is none of this name"):
        prompts_of("prefilling-0")


def test_prefilling_needs_a_harmful_response():
    with pytest.raises(UsageError, match="'x' has no harmful response"):
        prompts_of("prefilling-4", [Behaviour("x", "How?", "")])


def test_jailbreakchat_draws_every_template_evenly_and_by_seed():
    many = [Behaviour(f"m{n}", f"<q{n}>", "") for n in range(6000)]
    texts = [prompt.messages[0]["content"] for prompt in prompts_of("jailbreakchat", many)]
    drawn = Counter(text.replace(behaviour.query, "{query}") for text, behaviour in zip(texts, many, strict=True))
    assert set(drawn) == set(TEMPLATES)
    assert len(TEMPLATES) >= 10
    # chi-square with 11 degrees of freedom: 31.3 is the 99.9 % point
    assert sum((count - 500) ** 2 / 500 for count in drawn.values()) < 31.3
    other = prompts_of("jailbreakchat", many, seed=1)
    assert 0.02 < sum(p.messages[0]["content"] == text for p, text in zip(other, texts, strict=True)) / 6000 < 0.15


def test_a_benign_twin_gets_the_wrapper_of_its_counterpart():
    for n in range(20):
        one, two = (Behaviour("a/x", "<q>", "", twin=f"b/{n}"), Behaviour(f"b/{n}", "<q̂>", "", twin="a/x"))
        first, second = prompts_of("jailbreakchat", [one, two], seed=n)
        assert first.messages[0]["content"].replace("<q>", "<q̂>") == second.messages[0]["content"]


def test_templates_of_a_users_own_file(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"template": "Well {query} then {x}", "votes": 3}\n')
    assert read_templates(file) == ("Well {query} then {x}",)
    assert (
        prompts_of("jailbreakchat", templates=read_templates(file))[1].messages[0]["content"]
        == "Well How is kite 1 made? then {x}"
    )
    for line, said in [
        ('{"template": "no place"}', "line 2: 'template' must be text that holds {query}"),
        ('{"text": "{query}"}', "line 2: the key 'template' is missing"),
        ("{", "line 2: not valid JSON"),
    ]:
        file.write_text('{"template": "{query}"}\n' + line + "\n")
        with pytest.raises(DertaError, match=re.escape(said)):
            read_templates(file)
    file.write_text("")
    with pytest.raises(DertaError, match="the file is empty"):
        read_templates(file)


@pytest.mark.parametrize(
    "name", ["directly", "prefilling", "prefilling-", "prefilling--1", "prefilling-2.5", "PAIR", ""]
)
def test_an_unknown_attack_is_an_error_that_lists_the_known(name):
    with pytest.raises(UsageError) as error:
        make(name)
    assert all(known in str(error.value) for known in attacks.NAMES)


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("prefilling-4", {"cut": None}, "pass `cut`"),
        ("pair", {}, "a model that writes prompts"),
        ("autodan", {}, "pass a verdict judge"),
        ("autodan", {"judge": Echo()}, "pass a verdict judge"),
        ("pair", {"streams": 0}, "streams is 0"),
        ("direct", {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_what_an_attack_needs_and_lacks_is_named(name, other, said):
    with pytest.raises(UsageError, match=said):
        attacks.build(name, **{"max_new_tokens": 9, **other})


NAMES = ("direct", "prefilling-2", "jailbreakchat")


def run(out, target=None, names=NAMES, behaviours=BEHAVIOURS, seed=3, target_key="weights-1"):
    return attack(behaviours, [make(name) for name in names], target or Echo(), out, seed=seed, target_key=target_key)


def test_a_record_holds_what_a_judge_and_a_reader_need(tmp_path):
    out = tmp_path / "new" / "responses.jsonl"
    records = run(out)
    assert [json.loads(line) for line in out.read_bytes().decode().split("\n")[:-1]] == records
    assert [(r["attack"], r["behaviour"]) for r in records] == [(name, b.id) for name in NAMES for b in BEHAVIOURS]
    assert len({record["id"] for record in records}) == 15
    assert len({record["prompt_hash"] for record in records}) == 15
    one = records[6]
    assert one["query"] == one["prompt"] == "How is kite 1 made?"
    assert (one["prefill"], one["benign"], one["seed"], one["model"]) == ("Sure: fold ", False, 3, "echo")
    assert one["versions"]["torch"]
    completed = run(tmp_path / "completed.jsonl", names=("completingattack", "direct"))
    told = {(r["attack"], r["continues"], r["access"]) for r in completed}
    assert told == {("completingattack", True, "white-box"), ("direct", False, "black-box")}


def test_stopped_at_any_record_or_within_one_it_goes_on_to_the_same_file(tmp_path):
    whole = tmp_path / "whole.jsonl"
    records = run(whole)
    data = whole.read_bytes()
    ends = [0, *(match.end() for match in re.finditer(rb"\n", data))]
    for done, end in enumerate(ends):
        for torn in {0, 1, 40, len(data[end:].split(b"\n")[0])} if end < len(data) else {0}:
            part = tmp_path / f"{end}-{torn}.jsonl"
            part.write_bytes(data[: end + torn])
            target = Echo()
            assert run(part, target) == records
            assert part.read_bytes() == data
            lacks_only_its_end = torn and torn == len(data[end:].split(b"\n")[0])
            assert len(target.asked) == len(records) - done - bool(lacks_only_its_end)


def test_killed_in_the_middle_of_a_call_nothing_finished_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(attacks.base, "PROMPTS_A_CALL", 4)
    run(tmp_path / "whole.jsonl")
    part = tmp_path / "part.jsonl"
    asked = []
    for budget in (7, 5):
        dying = Echo(budget)
        with pytest.raises(KeyboardInterrupt):
            run(part, dying)
        assert len(dying.asked) == 4
        asked += dying.asked
    last = Echo()
    run(part, last)
    asked += last.asked
    assert len(asked) == len(set(map(repr, asked))) == 15
    assert part.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_run_in_the_same_folder_takes_nothing_away(tmp_path):
    """It begins the file anew while the first one is writing."""
    records = run(tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"

    class Disturbed(Echo):
        def respond(self, prompts, max_new_tokens):
            if not self.asked:
                write_jsonl(out, [])
            return super().respond(prompts, max_new_tokens)

    assert run(out, Disturbed()) == records
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_prompts_of_single_turn_attacks_go_in_one_call_for_each_length(tmp_path):
    calls = []

    class Counting(Echo):
        def respond(self, prompts, max_new_tokens):
            calls.append((len(prompts), max_new_tokens))
            return super().respond(prompts, max_new_tokens)

    chosen = [make("direct"), make("jailbreakchat"), attacks.build("prefilling-2", max_new_tokens=9, cut=words_cut)]
    records = attack(BEHAVIOURS, chosen, Counting(), tmp_path / "r.jsonl", seed=0, target_key="w")
    assert calls == [(10, 40), (5, 9)]
    assert [record["attack"] for record in records] == ["direct"] * 5 + ["jailbreakchat"] * 5 + ["prefilling-2"] * 5


def test_more_attacks_or_another_order_reuse_what_is_there(tmp_path):
    out, target = tmp_path / "r.jsonl", Echo()
    run(out, names=("jailbreakchat",))
    run(out, target)
    assert len(target.asked) == 10
    run(tmp_path / "whole.jsonl")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"target_key": "weights-2"},
        {"names": ("direct",)},
        {"behaviours": [replace(b, benign=not b.benign) for b in BEHAVIOURS]},
        {"names": NAMES[2:], "behaviours": [replace(b, query=f"{b.query} ") for b in BEHAVIOURS]},
    ],
)
def test_records_of_another_request_are_refused_before_anything_is_asked(tmp_path, other):
    out, target = tmp_path / "r.jsonl", Echo()
    run(out)
    before = out.read_bytes()
    with pytest.raises(UsageError, match="responses of another request"):
        run(out, target, **other)
    assert out.read_bytes() == before
    assert not target.asked


def test_a_model_that_helps_one_attack_is_in_the_keys_of_that_attack_alone(tmp_path):
    def ids(**helpers):
        out = tmp_path / f"{helpers}.jsonl"
        chosen = [make(name) for name in NAMES]
        records = attack(BEHAVIOURS, chosen, Echo(), out, seed=0, target_key="w", helper_keys=helpers)
        return [{record["id"] for record in records if record["attack"] == name} for name in NAMES]

    one, two = ids(), ids(direct="attacker")
    assert not one[0] & two[0]
    assert one[1:] == two[1:]


def test_an_attack_of_ones_own_needs_no_known_name(tmp_path):
    own = SingleTurn("my-own", lambda behaviour, rng: ask(f"Please: {behaviour.query}"), 9)
    records = attack(BEHAVIOURS, [own], Echo(), tmp_path / "r.jsonl", seed=0, target_key="w")
    assert [record["attack"] for record in records] == ["my-own"] * len(BEHAVIOURS)
    with pytest.raises(UsageError, match="named twice"):
        attack(BEHAVIOURS, [own, own], Echo(), tmp_path / "r.jsonl", seed=0, target_key="w")


def test_the_key_covers_the_response_length(tmp_path):
    def ids(tokens):
        one = attacks.build("direct", max_new_tokens=tokens)
        records = attack(BEHAVIOURS, [one], Echo(), tmp_path / f"{tokens}.jsonl", seed=0, target_key="w")
        return {record["id"] for record in records}

    assert not ids(8) & ids(9)


def test_a_line_that_stands_twice_goes(tmp_path):
    out = tmp_path / "r.jsonl"
    records, target = run(out), Echo()
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"\n") + 1] + whole)
    assert run(out, target) == records
    assert out.read_bytes() == whole
    assert not target.asked


def test_repeated_ids_and_damaged_files_are_named(tmp_path):
    out = tmp_path / "r.jsonl"
    with pytest.raises(UsageError, match="occurs more than once"):
        run(out, behaviours=[*BEHAVIOURS, BEHAVIOURS[0]])
    with pytest.raises(UsageError, match="named twice"):
        run(out, names=("direct", "direct"))
    assert not out.exists()
    run(out)
    lines = out.read_text().split("\n")
    out.write_text("\n".join(["nonsense", *lines]))
    with pytest.raises(DertaError, match="line 1: not valid JSON"):
        run(out)


def test_selfcipher_shows_five_demonstrations_as_published():
    [prompt] = prompts_of("selfcipher", BEHAVIOURS[:1])
    assert prompt.messages[0]["content"].count("\nassistant: ") == 5
