"""Attacks: from a behaviour to the responses a model gives under attack. One file an attack, each with its paper."""

from collections.abc import Sequence

from derta_lib.attacks import autodan, codeattack, completingattack, direct, jailbreakchat, pair, prefilling, selfcipher
from derta_lib.attacks.base import Access, Attack, Attempt
from derta_lib.data import Triple
from derta_lib.errors import UsageError, check_whole
from derta_lib.judges import Judge
from derta_lib.target import Target

__all__ = ["NAMES", "Access", "Attack", "Attempt", "build", "check", "check_once"]

NAMES = ("direct", "prefilling-<d>", "completingattack", "selfcipher", "codeattack", "jailbreakchat", "pair", "autodan")


def build(
    name: str,
    *,
    max_new_tokens: int,
    cut: prefilling.Cut | None = None,
    demonstrations: Sequence[Triple] = (),
    k: int = 5,
    templates: Sequence[str] = jailbreakchat.TEMPLATES,
    attacker: Target | None = None,
    judge: Target | Judge | None = None,
    streams: int = 20,
    iterations: int = 3,
    attempts: int = 5,
    attacker_tokens: int = 500,
    mutator: Target | None = None,
    population: int = 256,
    steps: int = 100,
) -> Attack:
    """The attack called `name` (`prefilling-16`: 16 tokens of r̂), responses of at most `max_new_tokens` tokens.

    What each needs beside: prefilling `cut`; selfcipher `demonstrations`, of which it shows `k`; jailbreakchat
    `templates`; pair `attacker`, `judge`, `streams`, `iterations`, `attempts` for one usable answer, `attacker_tokens`
    of each; autodan a verdict `judge`, `population`, `steps` and a `mutator` or None. The defaults are the published
    budgets.
    Raises UsageError for an unknown name and for a need that is not met.
    """
    search = {"streams": streams, "iterations": iterations, "attempts": attempts, "attacker_tokens": attacker_tokens}
    check([name], max_new_tokens=max_new_tokens, k=k, population=population, steps=steps, **search)
    match name:
        case "direct":
            return direct.make(max_new_tokens)
        case "completingattack":
            return completingattack.make(max_new_tokens)
        case "selfcipher":
            return selfcipher.make(demonstrations, k, max_new_tokens)
        case "codeattack":
            return codeattack.make(max_new_tokens)
        case "jailbreakchat":
            return jailbreakchat.make(templates, max_new_tokens)
        case "pair":
            if attacker is None or judge is None:
                raise UsageError("pair: it needs a model that writes prompts and one that grades; pass both.")
            return pair.Pair(attacker, judge, max_new_tokens, **search)
        case "autodan":
            if judge is None or isinstance(judge, Target):
                raise UsageError("autodan: it stops at a judge's verdict; pass a verdict judge.")
            return autodan.AutoDAN(judge, max_new_tokens, mutator, population, steps)
    if cut is None:
        raise UsageError(f"{name}: the target's tokenizer must cut r̂; pass `cut`.")
    return prefilling.make(int(name.removeprefix("prefilling-")), cut, max_new_tokens)


def check(names: Sequence[str], **budgets: int) -> None:
    """Raise UsageError for an unknown attack (the known ones are listed), one named twice, and a budget that is no
    whole number from 1 on.
    """
    for name in names:
        kind, _, depth = name.partition("-")
        if name not in NAMES[:1] + NAMES[2:] and not (kind == "prefilling" and depth.isdecimal() and int(depth)):
            raise UsageError(f"attack '{name}': there is none of this name; the attacks are {', '.join(NAMES)}.")
    check_once(names)
    for budget, value in budgets.items():
        check_whole(budget, value, 1)


def check_once(names: Sequence[str]) -> None:
    """Raise UsageError for an attack that is named twice, whoever wrote it."""
    if len(set(names)) < len(names):
        raise UsageError(f"attacks: {', '.join(names)}: an attack is named twice; name it once.")
