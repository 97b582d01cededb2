"""An experiment of the book: one model, one data set, one budget; every stage is cached by the content of its inputs.

The notebooks share these few steps, so each stands alone and, run after another, finds what that one has made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from derta_lib import attacks
from derta_lib.behaviours import load_behaviours
from derta_lib.corpus import Corpus, concord
from derta_lib.data import Behaviour, Pair, Triple, read_records
from derta_lib.errors import UsageError, check_known, check_whole
from derta_lib.evaluation import Suite, responses
from derta_lib.supervision import METHODS, PRESETS, preset
from derta_lib.training import Recipe, train

BASE = "base"
"""The model before any tuning."""
DPO = "dpo"
"""Direct preference optimisation from the vanilla checkpoint, the paper's Figure 5."""
LEAST = {"behaviours": 1, "max_new_tokens": 1, "searched": 0, "generations": 1}
"""Smallest values of the notebooks' numbers that no recipe and no attack looks at itself."""


def load_data(data: str, seed: int) -> Corpus:
    """The Concord corpus, or a folder with triples.jsonl, pairs.jsonl, and behaviours.jsonl (used for both splits)."""
    if not data:
        return concord(seed)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"data '{data}': there is no such folder; give one with triples.jsonl, pairs.jsonl, behaviours.jsonl."
        )
    behaviours = tuple(load_behaviours(str(folder / "behaviours.jsonl")))
    return Corpus(
        triples=tuple(read_records(Triple, folder / "triples.jsonl")),
        pairs=tuple(read_records(Pair, folder / "pairs.jsonl")),
        behaviours={"validation": behaviours, "test": behaviours},
    )


def with_twins(behaviours: Sequence[Behaviour], count: int) -> tuple[Behaviour, ...]:
    """The first `count` requests that are not benign, then their twins, or as many others where none is named."""
    asked = [b for b in behaviours if not b.benign][:count]
    ids, twins = {b.id for b in asked}, {b.twin for b in asked}
    benign = [b for b in behaviours if b.benign]
    return (*asked, *([b for b in benign if b.id in twins or b.twin in ids] or benign[:count]))


@dataclass(frozen=True)
class Experiment:
    """What the notebooks' parameters say: `recipe` trains, `behaviours` crafts (and their twins) are attacked."""

    model: str
    corpus: Corpus = field(repr=False)
    recipe: Recipe
    behaviours: int
    max_new_tokens: int

    def checkpoint(self, method: str, weight: float | None = None) -> str:
        """The model after `method`, trained unless it has been; `weight` is another λ than the preset's."""
        if method == BASE:
            return self.model
        if method == DPO:
            try:
                from derta_lib.dpo import train_dpo
            except ModuleNotFoundError as error:
                raise UsageError(
                    f"dpo needs the package '{error.name}': install trl and datasets, or leave it out."
                ) from None

            vanilla = Path(self.checkpoint("vanilla"))
            return str(train_dpo(vanilla, self.corpus.triples, self.corpus.pairs, self.recipe))
        check_method(method)
        preset = self.recipe.preset if weight is None else replace(self.recipe.preset, weight=weight)
        recipe = replace(self.recipe, method=method, preset=preset)
        return str(train(self.model, self.corpus.triples, self.corpus.pairs, recipe))

    def attacked(self, split: str = "test") -> tuple[Behaviour, ...]:
        """The first `behaviours` held-out requests of a split, then their benign twins (`with_twins`)."""
        return with_twins(self.corpus.behaviours[split], self.behaviours)

    def responses(self, checkpoint: str, attacks: list[str], split: str = "test") -> pd.DataFrame:
        """Judged responses of a checkpoint under `attacks` (columns: `evaluation.responses`)."""
        suite = Suite(
            tuple(attacks), self.attacked(split), self.corpus.triples[:3], self.max_new_tokens, self.recipe.seed
        )
        return responses(checkpoint, suite)


def check_method(name: str) -> None:
    """Raise UsageError, listing the known ones, for a method that no checkpoint can be trained by."""
    check_known("method", name, (BASE, *METHODS, DPO))


def check_parameters(parameters: Mapping[str, Any]) -> Recipe:
    """The recipe of a notebook's parameters, all of them looked at before anything runs.

    Raises UsageError for a number that is too small, and for a list that is empty, or holds an unknown name or one
    twice.
    """
    for name, least in LEAST.items():
        check_whole(name, parameters.get(name, least), least)
    budgets = {name: parameters[name] for name in ("streams", "iterations", "population") if name in parameters}
    for name in ("attacks", "probes"):
        attacks.check(parameters.get(name, ()), **budgets)
        if searches := {"pair", "autodan"} & {*parameters.get(name, ())}:
            raise UsageError(f"{name}: {min(searches)} searches; notebook 4 runs it on `searched` requests instead.")
    for depth in parameters.get("depths", ()):
        attacks.check([f"prefilling-{depth}"])
    for name in ("methods", "components"):
        for method in parameters.get(name, ()):
            check_method(method)
    for each in parameters.get("presets", ()):
        preset(each)
    for weight in parameters.get("weights", ()):
        replace(PRESETS["fixed"], weight=weight)
    for name, values in parameters.items():
        if isinstance(values, list) and (not values or len({*values}) < len(values)):
            raise UsageError(f"{name} is {values}; it must hold something, and nothing twice.")
    return Recipe(**{name: parameters[name] for name in ("steps", "learning_rate", "seed") if name in parameters})


def experiment(parameters: Mapping[str, Any]) -> Experiment:
    """An experiment from the parameters that all notebooks share: model, data, seed, steps, learning_rate, behaviours
    and max_new_tokens. Others are looked at (`check_parameters`).

    Raises UsageError, too, for data without a request of either kind, since nothing could be said of attacks or their
    price, and for a request without a response to prefill.
    """
    recipe = check_parameters(parameters)
    data = parameters["data"]
    corpus = load_data(data, recipe.seed)
    for kind, held in {"harmful": False, "benign": True}.items():
        if all(behaviour.benign is not held for behaviour in corpus.behaviours["test"]):
            raise UsageError(
                f"data '{data}': behaviours.jsonl holds no {kind} request; the notebooks ask harmful ones and benign "
                'ones (those with "benign": true).'
            )
    if bare := [behaviour.id for behaviour in corpus.behaviours["test"] if not behaviour.harmful]:
        raise UsageError(
            f"data '{data}': behaviour '{bare[0]}' has no 'harmful' in behaviours.jsonl ({len(bare)} lack it); the "
            "notebooks prefill a response that answers the request, be it harmful or benign."
        )
    return Experiment(parameters["model"], corpus, recipe, parameters["behaviours"], parameters["max_new_tokens"])
