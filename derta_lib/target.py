"""What attacks are aimed at and judges ask: anything that answers prompts, and what lets its likelihoods be read."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from derta_lib.chat import Prompt


@runtime_checkable
class Target(Protocol):
    """Anything that answers prompts: a local model, an endpoint, a scripted stand-in in tests."""

    name: str

    def respond(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt (without the prompt itself), in order."""
        ...


@runtime_checkable
class WhiteBoxTarget(Target, Protocol):
    """A target whose likelihoods can be read as well."""

    def log_likelihood(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """Mean log-probability (nats a token) of each continuation after its prompt, in order."""
        ...
