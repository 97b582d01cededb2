"""The DPO baseline (Rafailov et al., NeurIPS 2023; the paper's Figure 5 and appendix), through TRL's DPOTrainer.

The paper's recipe: from the vanilla checkpoint; the safe response is chosen and the harmful one rejected. What it does
not state is TRL's default: β, and the vanilla checkpoint as the frozen reference. Departures: a rejected helpful answer
is that of another pair of the same kind (the paper lets Qwen1.5-0.5B-chat write them), LoRA learns at a rate of its
own, and the steps are STEPS at most, not one epoch.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from derta_lib import lora, training
from derta_lib.chat import chat_of
from derta_lib.checkpoints import made_once, processes
from derta_lib.data import Pair, Triple
from derta_lib.errors import UsageError
from derta_lib.models import load_model, load_tokenizer
from derta_lib.records import code_key, content_key
from derta_lib.supervision import Encoder

STEPS = 12
"""Steps at most: the reference model needs few, and each costs twice a step of the other methods."""
TRIPLES = 2
"""Triples a step; two helpful pairs go with each."""
LEARNING_RATE = {"lora": 3e-4, "full": 5e-7}
"""The paper's 5e-7 is for the 8B model, all parameters; its 70B model has 2e-6."""
LOGGED = ("loss", "rewards/accuracies", "rewards/margins")


class PreferenceTrainer(DPOTrainer):
    """DPOTrainer over ids that `chat` has made: TRL would tokenise the joined text again."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def preferences(
    triples: Sequence[Triple], pairs: Sequence[Pair], encoder: Encoder, recipe: training.Recipe
) -> list[dict[str, list[int]]]:
    """A run's preference pairs in order, as TRL's columns `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Responses end in the template's end token; both are cut at their right end where the encoder's `max_length` asks for
    it, and counted in its report. Raises UsageError when no other pair's response can be rejected, and DertaError as
    `Encoder.rows` does.
    """
    rng = random.Random(f"dpo/{recipe.seed}")
    examples: list[dict[str, list[int]]] = []
    for example in training.schedule(triples, pairs, replace(recipe, method="vanilla_half")):
        if isinstance(example, Triple):
            texts = {"safe response": example.safe, "harmful response": example.harmful}
        else:
            texts = {"response": example.response, "rejected response": rng.choice(other_responses(example, pairs))}
        prompt, room = encoder.prompt(example)
        sides = []
        for what, text in texts.items():
            ids = [*encoder.response(what, example.id, text), encoder.chat.end]
            encoder.count_cut(what, len(ids), room)
            sides.append(ids[:room])
        examples.append({"prompt_ids": list(prompt), "chosen_ids": sides[0], "rejected_ids": sides[1]})
    return examples


def other_responses(pair: Pair, pairs: Sequence[Pair]) -> list[str]:
    """Responses of the other pairs of the same kind (the id up to its last slash), of all kinds where there is none."""
    others = [other for other in pairs if other.response != pair.response]
    alike = [other for other in others if other.id.rpartition("/")[0] == pair.id.rpartition("/")[0]]
    if not others:
        raise UsageError("DPO needs at least two helpful pairs with different responses, to reject one for the other.")
    return [other.response for other in alike or others]


def train_dpo(vanilla: Path | str, triples: Sequence[Triple], pairs: Sequence[Pair], recipe: training.Recipe) -> Path:
    """Train the vanilla checkpoint on preferences; the checkpoint folder is cached by the content of all inputs.

    Of `recipe` count the steps (at most STEPS), LoRA's shape, max_length, dtype and seed. An interrupted run resumes.
    Raises DertaError for a training that diverges.
    """
    if processes() > 1:
        raise UsageError("The DPO baseline trains in one process; start it without torchrun.")
    rate = LEARNING_RATE["lora" if recipe.lora_rank else "full"]
    recipe = replace(recipe, steps=min(recipe.steps, STEPS), triples=TRIPLES, helpful=1, learning_rate=rate)
    request = training.checkpoint_key(recipe, str(vanilla), triples, pairs)
    key = content_key(request, code_key([Path(__file__)], "trl"))

    def make(folder: Path, work: Path, card: dict[str, Any]) -> None:
        tokenizer = load_tokenizer(str(vanilla))
        encoder = Encoder(chat_of(tokenizer), "vanilla_half", recipe.preset, recipe.max_length)
        examples = preferences(triples, pairs, encoder, recipe)
        card["cut"] = dict(encoder.report)
        per_step = len(examples) // recipe.steps
        arguments = training.trainer_arguments(
            DPOConfig,
            work,
            recipe,
            beta=0.1,
            max_length=None,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=1,  # a pair at a time: less padding, and logits of whole rows are large
            gradient_accumulation_steps=per_step,
            learning_rate=rate,
            save_steps=10,
        )
        trainer = PreferenceTrainer(
            load_model(str(vanilla), recipe.dtype if recipe.lora_rank else "float32"),
            args=arguments,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            peft_config=lora.config(recipe.lora_rank, recipe.lora_alpha) if recipe.lora_rank else None,
            callbacks=[training.Progress("dpo", LOGGED, "dpo.LEARNING_RATE")],
        )
        training.fit(trainer, work)
        training.save(trainer, folder, tokenizer, recipe, card, LOGGED)

    return made_once("dpo", key, str(vanilla), make)
