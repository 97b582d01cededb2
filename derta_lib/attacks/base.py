"""The protocol of attacks, and the attacks of one prompt a behaviour."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from itertools import groupby
from typing import Any, Literal, Protocol

import yaml

from derta_lib.chat import Prompt
from derta_lib.data import Behaviour
from derta_lib.records import content_key
from derta_lib.target import Target

Access = Literal["black-box", "white-box"]
PROMPTS_A_CALL = 256
"""Prompts of single-turn attacks sent at once; finished calls are kept when a run is interrupted."""


@dataclass(frozen=True)
class Attempt:
    """One response under attack; `details` holds what the attack tells of itself (budget, iterations, score)."""

    behaviour: Behaviour
    prompt: Prompt
    response: str
    details: dict[str, Any] = field(default_factory=dict)


class Attack(Protocol):
    """An attack yields one attempt a behaviour, in order; the same seed gives the same attempts.

    What it does to one behaviour depends on that behaviour and the seed alone, never on the others, so that
    an interrupted run can go on with those that are left. `fingerprint` is a JSON value with all that a
    response depends on beside the target: two runs with equal fingerprints would do the same.
    """

    @property
    def name(self) -> str: ...
    @property
    def access(self) -> Access: ...
    def fingerprint(self, behaviour: Behaviour, seed: int) -> Any: ...
    def run(self, behaviours: Sequence[Behaviour], target: Any, *, seed: int) -> Iterator[Attempt]: ...


def read_texts(attack: str) -> dict[str, Any]:
    """What an attack says, from the YAML file of its name."""
    return yaml.safe_load((files("derta_lib.attacks") / f"{attack}.yaml").read_text(encoding="utf-8"))


def rng_for(attack: str, behaviour: Behaviour, seed: int) -> random.Random:
    """Random numbers of one behaviour; a benign twin draws the same as its counterpart, so the two are paired."""
    pair = min(behaviour.id, behaviour.twin or behaviour.id)
    return random.Random(content_key(attack, pair, seed))


def prompt_text(prompt: Prompt) -> str:
    """A prompt as readable text: the raw text, or the turns one after the other (the prefill is not part of it)."""
    return prompt.raw if prompt.raw is not None else "\n\n".join(turn["content"] for turn in prompt.messages)


@dataclass(frozen=True)
class SingleTurn:
    """An attack that wraps each behaviour in one prompt; the target gets many prompts a call."""

    name: str
    wrap: Callable[[Behaviour, random.Random], Prompt]
    max_new_tokens: int
    access: Access = "black-box"

    def prompt(self, behaviour: Behaviour, seed: int) -> Prompt:
        return self.wrap(behaviour, rng_for(self.name, behaviour, seed))

    def fingerprint(self, behaviour: Behaviour, seed: int) -> Any:
        return [self.name, asdict(self.prompt(behaviour, seed)), self.max_new_tokens]

    def run(self, behaviours: Sequence[Behaviour], target: Target, *, seed: int) -> Iterator[Attempt]:
        return (attempt for _, attempt in run_together([(self, b) for b in behaviours], target, seed=seed))


def run_together(
    asked: Sequence[tuple[SingleTurn, Behaviour]], target: Target, *, seed: int
) -> Iterator[tuple[SingleTurn, Attempt]]:
    """Attempts of single-turn attacks, in order; one call holds prompts of several attacks, which decode as one."""
    for length, grouped in groupby(asked, key=lambda pair: pair[0].max_new_tokens):
        alike = list(grouped)
        for start in range(0, len(alike), PROMPTS_A_CALL):
            some = alike[start : start + PROMPTS_A_CALL]
            prompts = [one.prompt(behaviour, seed) for one, behaviour in some]
            responses = target.respond(prompts, length)
            for (one, behaviour), prompt, response in zip(some, prompts, responses, strict=True):
                yield one, Attempt(behaviour, prompt, response, {"target_calls": 1})
