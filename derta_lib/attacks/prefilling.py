"""Prefilling: the first d tokens of the harmful response r̂ are already written when the model goes on.

Andriushchenko, Croce and Flammarion 2024, "Jailbreaking Leading Safety-Aligned LLMs with Simple Adaptive
Attacks" (arXiv 2404.02151), and Qi et al. 2024, "Safety Alignment Should Be Made More Than Just a Few Tokens
Deep" (arXiv 2406.05946), who vary the depth d as here.

Departures: the prefill is the opening of a known r̂, as in Qi et al., not a fixed "Sure, here is"; decoding is
greedy, without the random restarts of Andriushchenko et al. It is called white-box, since few services let their users
write the assistant's first words.
"""

import random
from collections.abc import Callable

from derta_lib.attacks.base import SingleTurn
from derta_lib.chat import Prompt, ask
from derta_lib.data import Behaviour
from derta_lib.errors import UsageError

Cut = Callable[[str, int], str]
"""`cut(text, n)` is the text of the first n tokens of `text`, by the target's tokenizer."""


def make(depth: int, cut: Cut, max_new_tokens: int) -> SingleTurn:
    """Prefill `depth` tokens of r̂ (all of a shorter one). Raises UsageError where nothing would be."""
    name = f"prefilling-{depth}"

    def wrap(behaviour: Behaviour, rng: random.Random) -> Prompt:
        if not (prefill := cut(harmful(name, behaviour), depth)):
            raise UsageError(
                f"{name}: the target's tokenizer does not write the beginning of the harmful response of "
                f"'{behaviour.id}' as it stands (it may change letters, or drop spaces before the first word), so "
                "nothing would be prefilled; mend the text, or leave this attack out."
            )
        return ask(behaviour.query, prefill=prefill)

    return SingleTurn(name, wrap, max_new_tokens, "white-box")


def harmful(name: str, behaviour: Behaviour) -> str:
    """The r̂ that the attack of that name begins with; UsageError where the behaviour has none."""
    if not behaviour.harmful:
        raise UsageError(
            f"{name}: the behaviour '{behaviour.id}' has no harmful response to prefill; "
            "give it one in the column 'harmful' or leave this attack out."
        )
    return behaviour.harmful
