"""AutoDAN-HGA: a hierarchical genetic algorithm over jailbreak prompts, guided by the target's own likelihoods.

Liu et al. 2024, "AutoDAN: Generating Stealthy Jailbreak Prompts on Aligned Large Language Models" (ICLR, arXiv
2310.04451). Fitness of a prompt: mean log-likelihood of the tokens of an affirmative opening after it. Paragraph level:
elites stay, parents by roulette over the softmax of their fitness, multi-point crossover between sentences,
mutation. Sentence level: words replaced by synonyms according to word scores that carry momentum. As in the authors'
code, every fifth generation works on paragraphs and the others on sentences.

Departures:
- The mutation model is whatever the caller gives (GPT-4 in the authors' code and in the paper that is re-run here); the
  book has none. Targets here decode greedily, so each order to reword has a number of its own instead of temperature 1.
- Short, harmless prototypes of our own, varied by the mutation model or, without one, by synonyms; the query follows
  the evolved text instead of standing at a mark inside it.
- Synonyms come from the small table in `autodan.yaml`, not from WordNet. With probability `crossover` a word is
  replaced by one of its kind that has a score, drawn in proportion to exp(score); the paper's ratio of scores favours
  the worst when, as here, they are negative (the authors' code subtracts the least). Theirs may take a word without a
  score, too, so that new words enter at this step; here they enter by mutation alone.
- Fitness is remembered for texts already seen, and the best text is sent only when it is new.
- Success is a judge's verdict of unsafe on a greedy answer; the authors look for the absence of refusal phrases in a
  sampled one.
- Only the TOP_WORDS best words are kept with their scores, and any number of them may be replaced; the authors' code
  keeps all, and replaces at most five in a paragraph.
- Crossover cuts between sentences (theirs at commas, too), at any inner border of the shorter parent; an odd last
  parent stays as it is. The authors' code returns pairs with too few sentences unchanged, and pairs an odd last parent
  with the first.
- The opening is that of the behaviour's own harmful response where it has one (`behaviours.target_opening`).
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from scipy.special import softmax
from tqdm.auto import tqdm

from derta_lib.attacks.base import Access, Attempt, prompt_text, read_texts, rng_for
from derta_lib.behaviours import target_opening
from derta_lib.chat import Prompt, ask
from derta_lib.data import Behaviour
from derta_lib.errors import UsageError
from derta_lib.judges import Item, Judge
from derta_lib.target import Target, WhiteBoxTarget

_TEXTS = read_texts("autodan")
PROTOTYPES = tuple(_TEXTS["prototypes"])
SYNONYMS = tuple(tuple(group.split()) for group in _TEXTS["synonyms"])
KIND = {word: group for group in SYNONYMS for word in group}
REVISE = _TEXTS["revise"]
MUTATED_WORDS = 10
TOP_WORDS = 30

Scores = dict[str, float]


@dataclass(frozen=True)
class AutoDAN:
    """AutoDAN-HGA for `steps` generations of `population` prompts at most (100 of 256 in the published code).

    `judge` decides when to stop; `mutator` rewords texts (None: synonyms only). `elites` is the share that stays
    unchanged; `crossover` the probability for a pair of parents and for a word's replacement; `mutation` that of a
    child; `points` the number of cuts in a crossover; `sentence_steps` the period of paragraph-level generations.
    """

    judge: Judge
    max_new_tokens: int
    mutator: Target | None = None
    population: int = 256
    steps: int = 100
    elites: float = 0.05
    crossover: float = 0.5
    mutation: float = 0.01
    points: int = 5
    sentence_steps: int = 5
    name: ClassVar[str] = "autodan"
    access: ClassVar[Access] = "white-box"

    def fingerprint(self, behaviour: Behaviour, seed: int) -> Any:
        numbers = [self.max_new_tokens, self.population, self.steps, self.elites, self.crossover, self.mutation]
        texts = [PROTOTYPES, SYNONYMS, REVISE, MUTATED_WORDS, TOP_WORDS]
        about = [behaviour.query, target_opening(behaviour), rng_for(self.name, behaviour, seed).random()]
        models = [self.judge.name, self.mutator.name if self.mutator else None]
        return [self.name, texts, numbers, self.points, self.sentence_steps, models, about]

    def run(self, behaviours: Sequence[Behaviour], target: Target, *, seed: int) -> Iterator[Attempt]:
        if not isinstance(target, WhiteBoxTarget):
            raise UsageError(
                f"autodan reads likelihoods, and the target '{target.name}' gives none; use a local model."
            )
        for behaviour in behaviours:
            yield self._attack(behaviour, target, rng_for(self.name, behaviour, seed))

    def _attack(self, behaviour: Behaviour, target: WhiteBoxTarget, rng: random.Random) -> Attempt:
        count: Counter[str] = Counter()
        texts = self._first(rng, count)
        seen: Scores = {}
        words: Scores = {}
        course: list[float] = []
        best: Attempt | None = None
        for step in tqdm(range(self.steps), "autodan", leave=False, unit="generation", disable=None):
            scores = self._fitness(behaviour, texts, target, seen)
            ranked = [text for _, text in sorted(zip(scores, texts, strict=True), key=lambda pair: -pair[0])]
            course.append(max(scores))
            prompt = embed(ranked[0], behaviour.query)
            if best is None or prompt != best.prompt:
                [response] = target.respond([prompt], self.max_new_tokens)
                count["target_calls"] += 1
                [verdict] = self.judge.judge([Item(behaviour.id, behaviour.query, response, prompt_text(prompt))])
                best = Attempt(behaviour, prompt, response, {"success": verdict.unsafe is True})
            if best.details["success"] or step == self.steps - 1:
                break
            elites = max(1, int(self.elites * self.population))
            others = ranked[elites:]
            if step % self.sentence_steps == 0:
                children = self._bred(texts, scores, len(others), rng)
            else:
                words = word_scores(texts, scores, words)
                children = [reword(text, words, self.crossover, rng) for text in others]
            texts = ranked[:elites] + self._mutate(children, self.mutation, rng, count)
        assert best is not None
        budget = {"population": self.population, "steps": self.steps, "steps_used": len(course), "fitness": course}
        counted = ("target_calls", "mutator_calls", "mutations_failed")
        found = best.details | budget | {"likelihoods": len(seen)} | {name: count[name] for name in counted}
        return replace(best, details=found)

    def _first(self, rng: random.Random, count: Counter[str]) -> list[str]:
        """The prototypes, and mutations of them up to the size of the population."""
        kept = list(PROTOTYPES[: self.population])
        copies = [PROTOTYPES[index % len(PROTOTYPES)] for index in range(len(kept), self.population)]
        return kept + self._mutate(copies, 1.0, rng, count)

    def _fitness(self, behaviour: Behaviour, texts: Sequence[str], target: WhiteBoxTarget, seen: Scores) -> list[float]:
        """Mean log-likelihood (nats a token) of the opening after each text; texts not seen yet go in one call."""
        new = sorted(set(texts) - seen.keys())  # neighbours share their starts, which a local model computes once
        prompts = [embed(text, behaviour.query) for text in new]
        found = target.log_likelihood(prompts, [target_opening(behaviour)] * len(new)) if new else []
        seen.update(zip(new, found, strict=True))
        return [seen[text] for text in texts]

    def _bred(self, texts: list[str], scores: list[float], many: int, rng: random.Random) -> list[str]:
        """Children of parents drawn by the softmax of their fitness, crossed in pairs."""
        parents = rng.choices(texts, softmax(scores), k=many)
        children: list[str] = []
        for first, second in zip(parents[::2], parents[1::2], strict=False):
            children += cross(first, second, self.points, rng) if rng.random() < self.crossover else (first, second)
        return children + parents[len(children) :]

    def _mutate(self, texts: list[str], rate: float, rng: random.Random, count: Counter[str]) -> list[str]:
        """Each text with probability `rate` in other words; a mutator's empty answer leaves it as it was."""
        chosen = [index for index in range(len(texts)) if rng.random() < rate]
        texts = list(texts)
        if self.mutator is None or not chosen:
            for index in chosen:
                texts[index] = mutate_words(texts[index], rng)
            return texts
        numbers = range(count["mutator_calls"] + 1, count["mutator_calls"] + len(chosen) + 1)
        prompts = [ask(REVISE.format(text=texts[i], number=number)) for i, number in zip(chosen, numbers, strict=True)]
        answers = self.mutator.respond(prompts, 2 * max(len(texts[index].split()) for index in chosen))
        count["mutator_calls"] += len(prompts)
        for index, answer in zip(chosen, answers, strict=True):
            revised = " ".join(answer.split()).strip("'\" ")
            count["mutations_failed"] += not revised
            texts[index] = revised or texts[index]
        return texts


def embed(text: str, query: str) -> Prompt:
    return ask(f"{text}\n\n{query}")


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part]


def cross(first: str, second: str, points: int, rng: random.Random) -> tuple[str, str]:
    """Two children that share out the parents' sentences: between the cuts, each takes one parent's part at random."""
    one, two = sentences(first), sentences(second)
    borders = range(1, min(len(one), len(two)))
    cuts = [0, *sorted(rng.sample(borders, min(points, len(borders))))]
    left: list[str] = []
    right: list[str] = []
    for start, end in zip(cuts, [*cuts[1:], None], strict=True):
        parts = (one[start:end], two[start:end])
        a, b = parts if rng.random() < 0.5 else parts[::-1]
        left += a
        right += b
    return " ".join(left), " ".join(right)


def word_scores(texts: Sequence[str], scores: Sequence[float], before: Scores) -> Scores:
    """Mean fitness of the texts that hold a word, averaged with the word's score before; the best 30 are kept."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for text, score in zip(texts, scores, strict=True):
        for word in {word.lower() for word in re.findall(r"[\w-]+", text)} & KIND.keys():
            found[word].append(score)
    now = {word: sum(values) / len(values) for word, values in found.items()}
    merged = before | {word: (score + before[word]) / 2 if word in before else score for word, score in now.items()}
    return dict(sorted(merged.items(), key=lambda item: (-item[1], item[0]))[:TOP_WORDS])


def reword(text: str, words: Scores, rate: float, rng: random.Random) -> str:
    """Words that have synonyms are, with probability `rate`, drawn anew among those of known score."""

    def draw(match: re.Match[str]) -> str:
        known = [word for word in KIND.get(match[0].lower(), ()) if word in words]
        if not known or rng.random() >= rate:
            return match[0]
        [word] = rng.choices(known, softmax([words[word] for word in known]))
        return _like(match[0], word)

    return re.sub(r"[\w-]+", draw, text)


def mutate_words(text: str, rng: random.Random) -> str:
    """Up to ten of the words that have synonyms, each replaced by another of its kind."""
    places = [match for match in re.finditer(r"[\w-]+", text) if match[0].lower() in KIND]
    chosen = rng.sample(places, min(MUTATED_WORDS, len(places)))
    for match in sorted(chosen, key=lambda match: -match.start()):
        others = [word for word in KIND[match[0].lower()] if word != match[0].lower()]
        text = text[: match.start()] + _like(match[0], rng.choice(others)) + text[match.end() :]
    return text


def _like(model: str, word: str) -> str:
    return word.capitalize() if model[0].isupper() else word
