"""Direct request: the query alone, in the chat format. The baseline of every other attack; it follows no paper."""

from derta_lib.attacks.base import SingleTurn
from derta_lib.chat import ask


def make(max_new_tokens: int) -> SingleTurn:
    return SingleTurn("direct", lambda behaviour, rng: ask(behaviour.query), max_new_tokens)
