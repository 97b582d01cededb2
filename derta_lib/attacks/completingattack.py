"""CompletingAttack: a declarative text to go on with, without any chat format.

Yuan et al. 2025, "Refuse Whenever You Feel Unsafe" (arXiv 2407.09121), section 3.1 of version 1: the query is turned
from a question into a statement that ends in "Step 1:", and the model sees neither roles nor chat tokens.

Departures: the statements come from the corpus, or for other data from a rule of three cases
(`behaviours.declarative`), where the authors had GPT-3.5 rewrite their questions; all of them end in "Step 1:", nearly
all of theirs do; the break before "Step 1:" is a newline alone.
"""

from derta_lib.attacks.base import SingleTurn
from derta_lib.chat import Prompt


def make(max_new_tokens: int) -> SingleTurn:
    return SingleTurn(
        "completingattack", lambda behaviour, rng: Prompt(raw=behaviour.declarative), max_new_tokens, "white-box"
    )
