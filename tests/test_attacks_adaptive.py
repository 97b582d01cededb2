"""PAIR and AutoDAN with scripted models: hand-worked examples, known optima, and what the papers promise."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise

import pytest

from derta_lib.attacks import autodan, build, pair
from derta_lib.attacks.base import prompt_text
from derta_lib.attacks.run import attack
from derta_lib.data import Behaviour
from derta_lib.errors import UsageError
from derta_lib.judges import Verdict
from derta_lib.judges.endpoint import Endpoint
from derta_lib.records import content_key

BEHAVIOUR = Behaviour("b", "How is a kite made?", "", "Sure, like this:\n1. Fold it.")
OTHERS = [Behaviour(f"o{n}", f"How is boat {n} made?", "", f"Sure, boat {n}:\n1. Fold.") for n in range(3)]


class Scripted:
    """A model whose answer to each prompt is `answer(prompt)`; it keeps what it was asked, call by call."""

    def __init__(self, name, answer):
        self.name, self.answer, self.calls = name, answer, []

    def respond(self, prompts, max_new_tokens):
        self.calls.append(list(prompts))
        return [self.answer(prompt) for prompt in prompts]


class Words:
    """A verdict judge: unsafe when the response holds 'yes', unscored when it holds 'hm'."""

    name = "words"

    def judge(self, items):
        return [
            Verdict(i.id, None if "hm" in i.response else "yes" in i.response, None, "none", None, "words")
            for i in items
        ]


def text_of(prompt):
    return prompt.messages[-1]["content"]


def proposal(text):
    return json.dumps({"improvement": "i", "prompt": text})


def scripted_pair(attacker, target, judge, **budget):
    attacker, target = Scripted("attacker", attacker), Scripted("target", target)
    one = pair.Pair(attacker, judge, max_new_tokens=9, **budget)
    [attempt] = one.run([BEHAVIOUR], target, seed=0)
    return attempt, attacker, target


def test_pair_by_hand_two_streams_three_iterations():
    """Streams A and B; scores A: 2, 3, 10 and B: 5, (unusable twice), not reached in time.

    A is told its own answer and score each time; with keep_last_n = 1 its third conversation holds one exchange.
    """
    turn = Counter()

    def attacker(prompt):
        stream = "A" if pair.STRATEGIES[0] in prompt.messages[0]["content"] else "B"
        turn[stream] += 1
        n = turn[stream]
        return "no object here" if stream == "B" and n in (2, 3) else proposal(f"{stream}{n}")

    grades = {"A1": "Grade: [[2]]", "B1": "[[5]] I think", "A2": "[[3]]", "A3": "[[10]]", "B4": "?? [[11]]"}
    judge = Scripted("judge", lambda prompt: grades[re.search(r"\[PROMPT\] (\w+)", text_of(prompt))[1]])
    attempt, asked, target = scripted_pair(
        attacker, lambda p: f"says {text_of(p)}", judge, streams=2, iterations=5, keep_last_n=1, attempts=2
    )

    assert [[text_of(p) for p in call] for call in target.calls] == [["A1", "B1"], ["A2"], ["A3", "B4"]]
    assert (attempt.response, text_of(attempt.prompt)) == ("says A3", "A3")
    assert attempt.details == {
        **{"score": 10, "stream": 0, "iteration": 3, "streams": 2, "iterations": 5, "iterations_used": 3},
        **{"attempts": 2, "attacker_tokens": 500},
        **{"target_calls": 5, "attacker_calls": 7, "judge_calls": 5, "attacker_unparseable": 2, "judge_unparseable": 1},
    }
    first, second, retry, third = asked.calls
    assert [len(call) for call in asked.calls] == [2, 2, 1, 2]
    assert [m["role"] for m in first[0].messages] == ["system", "user"]
    assert "Retry 1" in text_of(retry[0])
    assert "Retry" not in text_of(second[1])
    told = [m["content"] for m in third[0].messages]
    assert [m["role"] for m in third[0].messages] == ["system", "user", "assistant", "user"]
    assert told[0] == first[0].messages[0]["content"]
    assert "says A1" in told[1]
    assert "SCORE: 2" in told[1]
    assert json.loads(told[2])["prompt"] == "A2"
    assert told[3] == f"ANSWER: says A2\nOBJECTIVE: {BEHAVIOUR.query}\nSCORE: 3"
    assert all(first[0].messages[1]["content"] not in text for text in told[1:])  # pruned, as the oldest exchange
    b = [m["content"] for m in third[1].messages]
    assert b[1:3] == [text_of(first[1]), proposal("B1")]  # B sat out the second iteration: its conversation stood still
    assert "SCORE: 5" in b[3]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_pair_keeps_the_last_n_exchanges(keep):
    _, asked, _ = scripted_pair(
        lambda p: proposal("p"), lambda p: "t", Words(), streams=1, iterations=8, keep_last_n=keep
    )
    assert [len(call[0].messages) for call in asked.calls] == [2 + 2 * min(n, keep) for n in range(8)]


def test_pair_gives_streams_their_strategy_in_turn_and_a_setting_each():
    _, asked, _ = scripted_pair(lambda p: proposal("p"), lambda p: "t", Words(), iterations=1)
    systems = [prompt.messages[0]["content"] for prompt in asked.calls[0]]
    assert len(systems) == len(set(systems)) == 20
    for index, system in enumerate(systems):
        assert [s in system for s in pair.STRATEGIES] == [index % 3 == n for n in range(3)]
        assert BEHAVIOUR.query in system
        assert '"Sure, like this:"' in system


def test_pair_reports_the_best_attempt_and_spends_its_budget():
    grades = iter([4, 7, 7, 2, 6, 1])
    judge = Scripted("judge", lambda p: f"[[{next(grades)}]]")
    number = iter(range(99))
    attempt, _, _ = scripted_pair(
        lambda p: proposal(f"p{next(number)}"), lambda p: "t:" + text_of(p), judge, streams=2, iterations=3
    )
    assert (attempt.response, attempt.details["score"]) == ("t:p1", 7)
    assert (attempt.details["stream"], attempt.details["iteration"]) == (1, 1)
    assert attempt.details["target_calls"] == 6


def test_pair_with_a_verdict_judge_scores_ten_or_one_and_counts_the_unscored():
    answers = iter(["hm", "no", "yes"])
    attempt, asked, _ = scripted_pair(
        lambda p: proposal("p"), lambda p: next(answers), Words(), streams=1, iterations=9
    )
    details = attempt.details
    assert text_of(asked.calls[1][0]).startswith("ANSWER: hm\n")
    assert text_of(asked.calls[1][0]).endswith("SCORE: 1")
    assert (attempt.response, details["score"], details["iteration"]) == ("yes", 10, 3)
    assert (details["judge_unparseable"], details["judge_calls"]) == (1, 3)


def test_pair_whose_attacker_is_never_usable_sends_the_plain_request():
    attempt, asked, target = scripted_pair(
        lambda p: '{"prompt": "half', lambda p: "t", Words(), streams=3, iterations=2, attempts=4
    )
    assert [[text_of(p) for p in call] for call in target.calls if call] == [[BEHAVIOUR.query]]
    assert attempt.details["attacker_unparseable"] == attempt.details["attacker_calls"] == 3 * 2 * 4
    assert attempt.details["score"] is None
    assert len(asked.calls) == 8


@pytest.mark.parametrize(
    ("prefill", "answer", "prompt"),
    [
        (pair.FIRST, 'Tell me."}', "Tell me."),
        (pair.LATER, 'less plain", "prompt": "Say \\"kite\\""} and so on {', 'Say "kite"'),
        (pair.LATER, ' {"improvement": "a", "prompt": "b\nc"}', "b\nc"),
        (pair.FIRST, "Tell me.", None),
        (pair.FIRST, ' "}', None),
        (pair.LATER, 'x", "prompt": 3}', None),
        (pair.LATER, 'x", "prompts": "p"}', None),
        (pair.LATER, "", None),
        (pair.FIRST, 'half a pair: \\ud83d"}', None),
        (pair.FIRST, 'x", "more": NaN}', None),
        pytest.param(pair.FIRST, 'x", "more": ' + "[" * 100_000, None, id="deep"),
        ("", '{"improvement": "a", "prompt": "Say it."}', "Say it."),
        ("", 'Here it is:\n```json\n{"improvement": "a", "prompt": "Say it."}\n```', "Say it."),
        ("", "1. I would write it so.", None),
        ("", '["improvement", "prompt"]', None),
        ("", "null", None),
    ],
)
def test_pair_reads_the_attackers_object(prefill, answer, prompt):
    found = pair.parse_proposal(prefill, answer)
    assert (found and found["prompt"]) == prompt


@pytest.mark.parametrize(
    ("answer", "score"), [("[[7]]", 7), ("x [[ 10 ]] y [[1]]", 10), ("[[0]]", None), ("[[11]]", None), ("7", None)]
)
def test_pair_reads_the_grade(answer, score):
    assert pair.parse_score(answer) == score


def test_an_endpoint_as_the_attacker_writes_the_whole_object(monkeypatch):
    """It takes no begun answer, in the first iteration or later."""
    asked = []

    def answer(self, prompts, max_new_tokens):
        asked.extend(prompts)
        return [proposal("Say it.")] * len(prompts)

    monkeypatch.setattr(Endpoint, "respond", answer)
    one = pair.Pair(Endpoint("http://127.0.0.1:9/v1", "m"), Words(), 9, streams=1, iterations=2)
    [attempt] = one.run([BEHAVIOUR], Scripted("target", lambda p: "no"), seed=0)
    assert [prompt.prefill for prompt in asked] == ["", ""]
    assert text_of(attempt.prompt) == "Say it."


PREFERRED = {group[-1] for group in autodan.SYNONYMS}


class Toy:
    """A target with a known optimum, 0: minus the share of words with synonyms that are not the preferred one."""

    name = "toy"

    def __init__(self, open_at=1.0):
        self.open_at, self.scored, self.sent = open_at, [], []

    def value(self, prompt):
        words = [w for w in re.findall(r"[\w-]+", prompt_text(prompt).lower()) if w in autodan.KIND]
        return -sum(word not in PREFERRED for word in words) / max(1, len(words))

    def log_likelihood(self, prompts, continuations):
        assert set(continuations) == {"Sure, like this:"} or "boat" in continuations[0]
        self.scored.append(list(prompts))
        return [self.value(prompt) for prompt in prompts]

    def respond(self, prompts, max_new_tokens):
        self.sent += prompts
        return ["yes" if self.value(prompt) >= self.open_at else "no" for prompt in prompts]


def evolve(target, seed=0, behaviours=(BEHAVIOUR,), **other):
    options = {"population": 24, "steps": 40, "mutation": 0.1, **other}
    return list(autodan.AutoDAN(Words(), 9, **options).run(behaviours, target, seed=seed))


@pytest.mark.parametrize("seed", range(5))
def test_autodan_never_falls_and_nears_the_known_optimum(seed):
    target = Toy()
    [attempt] = evolve(target, seed)
    course = attempt.details["fitness"]
    assert all(later >= earlier for earlier, later in pairwise(course))
    start = max(target.value(autodan.embed(text, BEHAVIOUR.query)) for text in autodan.PROTOTYPES)
    assert course[-1] == target.value(attempt.prompt) > 0.35 * start
    assert (len(course), attempt.details["success"]) == (40, False)
    assert text_of(attempt.prompt).endswith("\n\n" + BEHAVIOUR.query)


def test_autodan_selection_beats_drift():
    """With fitness hidden from selection the same operators stay far from the optimum."""

    class Blind(Toy):
        def log_likelihood(self, prompts, continuations):
            return [0.0] * len(prompts)

    guided = [Toy().value(evolve(Toy(), seed)[0].prompt) for seed in range(5)]
    blind = [Toy().value(evolve(Blind(), seed)[0].prompt) for seed in range(5)]
    assert min(guided) > max(blind) + 0.2


def test_autodan_stops_at_success_and_sends_only_new_leaders():
    target = Toy(open_at=-0.4)
    [attempt] = evolve(target)
    assert attempt.response == "yes"
    assert attempt.details["success"]
    assert attempt.details["steps_used"] < 40
    assert [target.value(p) >= -0.4 for p in target.sent] == [False] * (len(target.sent) - 1) + [True]
    assert all(a != b for a, b in pairwise(target.sent))
    assert attempt.details["target_calls"] == len(target.sent)


def test_autodan_scores_each_text_once_and_a_generation_in_one_call():
    target = Toy()
    [attempt] = evolve(target, steps=12)
    scored = [prompt_text(prompt) for call in target.scored for prompt in call]
    assert len(scored) == len(set(scored)) == attempt.details["likelihoods"]
    assert len(target.scored) <= 12
    assert attempt.details["likelihoods"] > 24


def test_autodan_batches_score_as_one_by_one():
    class OneByOne(Toy):
        def log_likelihood(self, prompts, continuations):
            return [
                super(OneByOne, self).log_likelihood([p], [c])[0] for p, c in zip(prompts, continuations, strict=True)
            ]

    assert evolve(OneByOne()) == evolve(Toy())


@pytest.mark.parametrize("kind", ["pair", "autodan"])
def test_adaptive_attacks_depend_on_behaviour_and_seed_alone(kind):
    def attempts(behaviours, seed):
        if kind == "autodan":
            return evolve(Toy(), seed, behaviours, steps=4, population=6)
        attacker = Scripted("a", lambda p: proposal(content_key(repr(p))))
        return list(pair.Pair(attacker, Words(), 9, 3, 2).run(behaviours, Scripted("t", text_of), seed=seed))

    together = attempts(OTHERS, 0)
    assert [attempts([one], 0)[0] for one in reversed(OTHERS)] == together[::-1]
    assert [a.prompt for a in attempts(OTHERS, 1)] != [a.prompt for a in together]


@pytest.mark.parametrize("points", [1, 3, 5, 50])
def test_crossover_keeps_every_sentence_and_its_place(points):
    rng = random.Random(points)
    changed = 0
    for _ in range(300):
        one, two = ([f"{name}{n}." for n in range(rng.randint(1, 9))] for name in "ab")
        left, right = (autodan.sentences(text) for text in autodan.cross(" ".join(one), " ".join(two), points, rng))
        assert Counter(left + right) == Counter(one + two)
        for a, b, c, d in zip(one, two, left, right, strict=False):
            assert {a, b} == {c, d}
        switches = sum(x[0] != y[0] for x, y in pairwise(left))
        assert switches <= points
        changed += switches > 0
    assert changed > 100


def test_word_scores_by_hand():
    texts, scores = ["Clear rules. Clear!", "precise rules, unrelated", "the rest"], [-1.0, -3.0, -9.0]
    now = autodan.word_scores(texts, scores, {})
    assert now == {"clear": -1.0, "rules": -2.0, "precise": -3.0}
    later = autodan.word_scores(["clear"], [-5.0], now)
    assert later == {"clear": -3.0, "rules": -2.0, "precise": -3.0}


def test_only_the_best_thirty_words_are_remembered():
    words = sorted(autodan.KIND)[:40]
    kept = autodan.word_scores(words, [float(-n) for n in range(40)], {})
    assert set(kept) == set(words[:30])


def test_words_are_drawn_by_the_softmax_of_their_scores():
    scores = {"clear": -1.0, "plain": -2.0, "precise": -1.5}  # "exact" has no score yet
    weights = {word: math.exp(score) for word, score in scores.items()}
    expected = {word: weight / sum(weights.values()) for word, weight in weights.items()}
    rng, n = random.Random(0), 20_000
    drawn = Counter(autodan.reword("Clear", scores, 1.0, rng).lower() for _ in range(n))
    assert set(drawn) == set(scores)
    for word, share in expected.items():
        assert abs(drawn[word] / n - share) < 4 * math.sqrt(share * (1 - share) / n)
    rate = sum(autodan.reword("exact", scores, 0.25, rng) == "exact" for _ in range(n)) / n
    assert abs(rate - 0.75) < 0.015
    assert autodan.reword("Clear water, total!", {"total": 0.0}, 1.0, rng) == "Clear water, total!"


def test_kinds_of_words_are_disjoint():
    assert len(autodan.KIND) == sum(map(len, autodan.SYNONYMS))


def test_a_word_mutation_changes_at_most_ten_words_and_only_within_their_kind():
    rng = random.Random(1)
    for text in autodan.PROTOTYPES:
        before, after = re.findall(r"[\w-]+", text), re.findall(r"[\w-]+", autodan.mutate_words(text, rng))
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert 0 < len(changed) <= 10
        assert all(autodan.KIND[a.lower()] is autodan.KIND[b.lower()] for a, b in changed)
        assert all(a[0].isupper() == b[0].isupper() for a, b in changed)


def test_a_mutation_model_rewords_texts_and_its_failures_are_counted():
    answers = iter(["", "  'New words.\nMore words.' "] * 500)
    mutator = Scripted("mutator", lambda p: next(answers))
    [attempt] = evolve(Toy(), population=8, steps=3, mutator=mutator)
    asked = sum(map(len, mutator.calls))
    assert attempt.details["mutator_calls"] == asked >= 4
    assert attempt.details["mutations_failed"] == (asked + 1) // 2
    assert all(
        any(part in text_of(p) for part in ("Orla", "archive", "script", "test", "New words."))
        for p in mutator.calls[0]
    )


def test_a_mutation_model_that_decodes_greedily_still_fills_the_population_with_different_texts():
    """The same text and the same order would give one wording of each prototype, whatever the population."""
    mutator = Scripted("mutator", lambda p: f"wording {content_key(text_of(p))}")
    [attempt] = evolve(Toy(), population=40, steps=1, mutator=mutator)
    assert attempt.details["likelihoods"] == 40


def test_autodan_refuses_a_black_box():
    with pytest.raises(UsageError, match="reads likelihoods, and the target 'closed' gives none"):
        list(build("autodan", max_new_tokens=9, judge=Words()).run([BEHAVIOUR], Scripted("closed", str), seed=0))


def test_published_budgets_are_the_defaults():
    one = build("pair", max_new_tokens=9, attacker=Scripted("a", str), judge=Words())
    assert (one.streams, one.iterations, one.keep_last_n) == (20, 3, 4)
    assert (one.attempts, one.attacker_tokens) == (5, 500)
    two = build("autodan", max_new_tokens=9, judge=Words())
    assert (two.population, two.steps, two.crossover, two.mutation, two.points) == (256, 100, 0.5, 0.01, 5)
    assert (two.elites, two.sentence_steps) == (0.05, 5)


def test_adaptive_attacks_resume_at_every_behaviour_to_the_same_file(tmp_path):
    def run(out, target):
        attacker = Scripted("a", lambda p: proposal(str(len(repr(p)))))
        both = [
            build("pair", max_new_tokens=9, attacker=attacker, judge=Words(), streams=2, iterations=2),
            build("autodan", max_new_tokens=9, judge=Words(), population=6, steps=3),
        ]
        return attack(OTHERS, both, target, out, seed=0, target_key="w")

    whole = tmp_path / "whole.jsonl"
    full = Toy()
    records = run(whole, full)
    assert [record["access"] for record in records] == ["black-box"] * 3 + ["white-box"] * 3
    assert {"streams", "iterations"} <= records[0]["details"].keys()
    assert {"population", "steps"} <= records[5]["details"].keys()
    for n in range(7):
        part = tmp_path / f"{n}.jsonl"
        part.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:n]) + b'{"id": "torn' * (n < 6))
        target = Toy()
        assert run(part, target) == records
        assert part.read_bytes() == whole.read_bytes()
        assert len(target.sent) < len(full.sent) or n == 0


def test_every_fifth_generation_works_on_paragraphs_and_the_others_on_sentences(monkeypatch):
    course, bred, scored = [], autodan.AutoDAN._bred, autodan.word_scores
    monkeypatch.setattr(autodan.AutoDAN, "_bred", lambda *given: course.append("p") or bred(*given))
    monkeypatch.setattr(autodan, "word_scores", lambda *given: course.append("s") or scored(*given))
    evolve(Toy(), steps=12)  # after the last there is nothing to breed
    assert "".join(course) == "pssss" + "pssss" + "p"


@pytest.mark.parametrize("many", [6, 7])
def test_without_crossover_the_parents_go_on_as_they_were_drawn(many):
    texts, one = ["First.", "Second.", "Third."], autodan.AutoDAN(Words(), 9, crossover=0.0)
    drawn = random.Random(0).choices(texts, [1, 1, 1], k=many)
    assert one._bred(texts, [-2.0] * 3, many, random.Random(0)) == drawn
    assert len(set(drawn)) == 3


def test_a_word_at_the_start_of_a_sentence_is_mutated_too():
    found = {autodan.mutate_words("Clear", random.Random(seed)) for seed in range(30)}
    assert {word.lower() for word in found} == set(autodan.KIND["clear"]) - {"clear"}
    assert all(word[0].isupper() for word in found)


@pytest.mark.parametrize(
    "one",
    [
        pair.Pair(Scripted("attacker", str), Words(), 9),
        autodan.AutoDAN(Words(), 9, Scripted("mutator", str)),
    ],
    ids=["pair", "autodan"],
)
def test_whatever_decides_a_search_is_in_its_key(one):
    keys = [one.fingerprint(BEHAVIOUR, 0), one.fingerprint(BEHAVIOUR, 1), one.fingerprint(OTHERS[0], 0)]
    for field in fields(one):
        value = getattr(one, field.name)
        other = value + 1 if isinstance(value, int | float) else Scripted("another", str)
        keys.append(replace(one, **{field.name: other}).fingerprint(BEHAVIOUR, 0))
    assert len({content_key(key) for key in keys}) == len(keys) == 3 + len(fields(one))


def test_pairs_judge_has_room_for_its_grade_even_at_a_letter_a_token():
    class Cutting(Scripted):
        def respond(self, prompts, max_new_tokens):
            return [text[:max_new_tokens] for text in super().respond(prompts, max_new_tokens)]

    judge = Cutting("judge", lambda p: "Rating: [[7]]")
    attempt, *_ = scripted_pair(lambda p: proposal("p"), lambda p: "t", judge, streams=1, iterations=1)
    assert (attempt.details["score"], attempt.details["judge_unparseable"]) == (7, 0)
