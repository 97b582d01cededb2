"""Training: examples in a fixed order → packs → the loss at their sites, through transformers' Trainer and PEFT."""

import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from derta_lib import lora, loss, norm, tree
from derta_lib.chat import chat_of
from derta_lib.checkpoints import last_checkpoint, made_once, processes, seal
from derta_lib.data import Pair, Triple
from derta_lib.errors import DertaError, UsageError, check_whole
from derta_lib.models import CHECKPOINT_CARD, load_model, load_tokenizer, model_key, precision
from derta_lib.records import code_key, content_key, folder_hashes, write_json
from derta_lib.supervision import METHODS, PRESETS, Encoder, Preset

Example = Triple | Pair
SOURCES = ("chat", "lora", "loss", "models", "norm", "refusal", "supervision", "training", "tree")
"""Modules whose code decides what a checkpoint is."""


@dataclass(frozen=True)
class Recipe:
    """What a training run is, apart from its data and its model.

    `triples` a step (a baseline sees twice as many, `supervision.METHODS`), `helpful` pairs for each
    of those triples, `micro_batch` examples packed into one sequence; `lora_rank` 0 trains all parameters.
    Raises UsageError for a number that no training could have.
    """

    method: str = "derta"
    preset: Preset = PRESETS["fixed"]
    steps: int = 40
    triples: int = 3
    helpful: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.1
    lora_rank: int = 16
    lora_alpha: int = 32
    max_length: int = 512
    micro_batch: int = 12
    seed: int = 0
    dtype: str = field(default_factory=precision)
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        least = {"steps": 1, "triples": 1, "helpful": 0, "max_length": 2, "micro_batch": 1, "seed": 0}
        least |= {"lora_rank": 0, "lora_alpha": 1}
        for name, low in least.items():
            check_whole(name, getattr(self, name), low)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be above 0 and finite.")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is {self.warmup}; it is the share of the steps in which the rate rises, below 1.")
        if self.seed >= 2**32:
            raise UsageError(f"seed is {self.seed}; it must be below 2**32.")


def schedule(triples: Sequence[Triple], pairs: Sequence[Pair], recipe: Recipe) -> list[Example]:
    """All examples of a run in order: each step holds the same number of triples and of helpful pairs, mixed.

    Triples and pairs are dealt from shuffled decks, so none comes again before all have come.
    Raises UsageError when there is nothing to deal from.
    """
    if not triples or (recipe.helpful and not pairs):
        raise UsageError("Training needs at least one triple, and one helpful pair unless helpful is 0.")
    rng = random.Random(f"schedule/{recipe.seed}")

    def deal(deck: Sequence[Any], count: int) -> list[Any]:
        dealt: list[Any] = []
        while len(dealt) < count:
            dealt.extend(rng.sample(deck, len(deck)))
        return dealt[:count]

    each = recipe.triples * METHODS[recipe.method].triples
    helpful = recipe.triples * 2 * recipe.helpful
    safety, manners = deal(triples, each * recipe.steps), deal(pairs, helpful * recipe.steps)
    order: list[Example] = []
    for step in range(recipe.steps):
        batch = [*safety[step * each : (step + 1) * each], *manners[step * helpful : (step + 1) * helpful]]
        rng.shuffle(batch)
        order.extend(batch)
    return order


class _Packs(torch.utils.data.Dataset):
    """Micro-batches of the schedule, each a list of packs (`tree.parts`) made when asked for.

    The draws depend on seed and place alone.
    """

    def __init__(self, order: Sequence[Example], encoder: Encoder, recipe: Recipe, processes: int) -> None:
        self.encoder, self.recipe, self.parts = encoder, recipe, 1
        per_step = len(order) // recipe.steps
        steps = [order[start : start + per_step] for start in range(0, len(order), per_step)]
        self.per_step = -(-per_step // (recipe.micro_batch * processes)) * processes
        if self.per_step > per_step:
            raise UsageError(
                f"{processes} processes cannot share the {per_step} examples of a step in micro-batches of "
                f"{recipe.micro_batch}; raise micro_batch or use fewer processes."
            )
        # Every step has the same number of micro-batches, whatever micro_batch is: the loss is summed over the step.
        named = [_named(step, f"{recipe.seed}/{number}") for number, step in enumerate(steps)]
        self.micro = [step[i :: self.per_step] for step in named for i in range(self.per_step)]

    def __len__(self) -> int:
        return len(self.micro)

    def rows(self, place: int) -> list[list[tree.Row]]:
        return [self.encoder.rows(example, seed) for example, seed in self.micro[place]]

    def __getitem__(self, place: int) -> list[tree.Pack]:
        return tree.parts(self.rows(place), self.parts)

    def census(self) -> dict[str, int]:
        """Counts of rows and cuts over the whole run; a bad row stops here, before any training."""
        for place in range(len(self)):
            self.rows(place)
        return dict(self.encoder.report)


def _named(step: Sequence[Example], seed: str) -> list[tuple[Example, str]]:
    """Each example with the seed of its draws, another one where it comes again within the step."""
    seen: Counter[str] = Counter()
    named = []
    for example in step:
        again = f"/{seen[example.id]}" if seen[example.id] else ""
        named.append((example, f"{seed}/{example.id}{again}"))
        seen[example.id] += 1
    return named


def side_by_side(model: Any) -> int:
    """How many packs of a micro-batch run at once (`loss.micro_batch_sum`): on a CPU as many as it has cores.

    One on a GPU, with several processes (DDP takes one backward pass), and with dropout (its draws would depend on
    timing).
    """
    dropped = [getattr(module, "attention_dropout", 0.0) or getattr(module, "p", 0.0) for module in model.modules()]
    alone = model.device.type != "cpu" or processes() > 1 or any(dropped)
    return 1 if alone else torch.get_num_threads()


class SiteTrainer(Trainer):
    """transformers' Trainer with the loss at the sites of a pack and one denominator for the whole optimiser step."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is already scaled for gradient accumulation
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.task_sums = torch.zeros(len(tree.TASKS), 2, device=self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        count = torch.tensor(sum(packed.count for sample in batch_samples for packed in sample["packs"]), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        total, found = loss.micro_batch_sum(model, inputs["packs"], self.trained)
        for losses, packed in zip(found, inputs["packs"], strict=True):
            self.task_sums += loss.task_sums(losses, packed)
        # DDP averages gradients over processes, the objective sums them
        return total * self.args.world_size / num_items_in_batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        sums = self.task_sums
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(0)
        means = {task: total / count for task, (total, count) in zip(tree.TASKS, sums.tolist(), strict=True) if count}
        self.task_sums = torch.zeros_like(sums)
        super().log({**logs, **means}, *args, **kwargs)


class Progress(TrainerCallback):
    """A progress bar with the numbers `logged`, and the seconds of each step in the log. Raises DertaError for a number
    that is not finite, and at the end for such a weight, and says that the `rate` is to be lowered.
    """

    def __init__(self, name: str, logged: Sequence[str], rate: str = "learning_rate") -> None:
        self.name, self.logged, self.rate = name, logged, rate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.monotonic()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: logs[name] for name in self.logged if name in logs}
        for name, value in shown.items():
            if not math.isfinite(value):
                raise DertaError(
                    f"'{name}' is {value} at step {state.global_step}: the training diverged; lower {self.rate}."
                )
        # kept with the steps, so that a resumed training counts those of its earlier part
        now = time.monotonic()
        state.log_history[-1]["seconds"], self.since = now - self.since, now
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.bar.close()
        if not all(weight.isfinite().all() for weight in model.parameters() if weight.requires_grad):
            raise DertaError(
                f"The last step, {state.global_step}, left weights that are not finite: the training diverged; lower "
                f"{self.rate}."
            )


def prepare(model: Any, recipe: Recipe) -> Any:
    """The model as it is trained: LoRA on all linear layers (attention and MLP) or all parameters, tree attention,
    norms with gradients by hand.
    """
    if recipe.lora_rank:
        model = lora.adapted(model, recipe.lora_rank, recipe.lora_alpha)
    base = model.get_base_model() if recipe.lora_rank else model
    tree.use_tree_attention(base)
    norm.by_hand(base)
    # The Trainer's wrappers (DDP, autocast) go through forward, so that is where the sites' losses are.
    model.forward = partial(loss.site_losses, base)
    return model


Arguments = TypeVar("Arguments", bound=TrainingArguments)


def trainer_arguments(kind: type[Arguments], work: Path, recipe: Recipe, **given: Any) -> Arguments:
    """What every training of `recipe` tells its Trainer. Raises UsageError for several GPUs in one process."""
    arguments = kind(
        output_dir=str(work),
        max_steps=recipe.steps,
        # warming up begins at a learning rate of 0, which would be wasted on a run of a few steps
        warmup_steps=recipe.warmup if recipe.warmup * recipe.steps >= 1 else 0,
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        bf16=recipe.dtype == "bfloat16",
        activation_checkpointing=recipe.gradient_checkpointing,
        save_total_limit=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=recipe.seed,
        **given,
    )
    if arguments.n_gpu > 1:  # the Trainer would wrap the model in DataParallel, which splits a pack
        raise UsageError(
            f"One process sees {arguments.n_gpu} GPUs, and a pack cannot be split over them; show it one GPU with "
            "CUDA_VISIBLE_DEVICES=0 in the environment, or, on the command line alone, start one process a GPU with "
            f"torchrun --nproc-per-node {arguments.n_gpu} -m derta_lib.cli train."
        )
    return arguments


def fit(trainer: Trainer, work: Path) -> None:
    """Train on from the last whole checkpoint under `work`; a training that diverges leaves none."""
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(work))
    except DertaError:
        shutil.rmtree(work, ignore_errors=True)
        raise


def checkpoint_key(recipe: Recipe, model: str, triples: Sequence[Triple], pairs: Sequence[Pair]) -> str:
    data = [[asdict(record) for record in records] for records in (triples, pairs)]
    sources = [Path(__file__).with_name(f"{name}.py") for name in SOURCES]
    made_of = [asdict(recipe), asdict(METHODS[recipe.method])]
    return content_key(made_of, model_key(model), data, code_key(sources, "torch", "transformers", "peft"))


def train(model: str, triples: Sequence[Triple], pairs: Sequence[Pair], recipe: Recipe) -> Path:
    """Train `model` by `recipe`; the checkpoint folder (safetensors) is cached by the content of all inputs.

    An interrupted run resumes from its last saved step and gives the same weights. The folder's `derta.json`
    holds the recipe, the log (loss a term and step, in nats) and the counts of what was cut. Raises DertaError for a
    training that diverges.
    """

    def make(folder: Path, work: Path, card: dict[str, Any]) -> None:
        set_seed(recipe.seed)
        tokenizer = load_tokenizer(model)
        encoder = Encoder(chat_of(tokenizer), recipe.method, recipe.preset, recipe.max_length)
        packs = _Packs(schedule(triples, pairs, recipe), encoder, recipe, processes())
        card["cut"] = packs.census()
        arguments = trainer_arguments(
            TrainingArguments,
            work,
            recipe,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=packs.per_step // processes(),
            learning_rate=recipe.learning_rate,
            save_steps=20,
            logging_first_step=True,
            remove_unused_columns=False,
        )
        prepared = prepare(load_model(model, recipe.dtype if recipe.lora_rank else "float32"), recipe)
        trainer = SiteTrainer(
            prepared,
            args=arguments,
            train_dataset=packs,
            data_collator=lambda items: {"packs": items[0]},
            callbacks=[Progress(recipe.method, tree.TASKS)],
        )
        packs.parts = side_by_side(prepared)
        fit(trainer, work)
        if trainer.is_world_process_zero():
            save(trainer, folder, tokenizer, recipe, card, tree.TASKS)
        trainer.accelerator.wait_for_everyone()

    return made_once(recipe.method, checkpoint_key(recipe, model, triples, pairs), model, make)


def save(
    trainer: Trainer, folder: Path, tokenizer: Any, recipe: Recipe, card: dict[str, Any], logged: Sequence[str]
) -> None:
    """Write the checkpoint folder whole (weights, tokenizer, and the card with recipe, log and seconds) and drop what
    an interrupted run would have resumed from.
    """
    model: Any = trainer.model
    history = trainer.state.log_history
    work = Path(str(trainer.args.output_dir))
    made = work / "made"
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed here
    if recipe.lora_rank:
        model.peft_config["default"].base_model_name_or_path = card["base"]
    model.save_pretrained(made, **({"save_embedding_layers": False} if recipe.lora_rank else {}))
    tokenizer.save_pretrained(made)
    log = [{k: e[k] for k in ("step", *logged) if k in e} for e in history if logged[0] in e]
    seconds = round(sum(entry.get("seconds", 0.0) for entry in history), 1)
    files = folder_hashes(made)
    files.pop("adapter_config.json", None)  # it names the base, which may move
    told = {"recipe": asdict(recipe), "log": log, "seconds": seconds, "files": files}
    write_json(made / CHECKPOINT_CARD, card | told)
    shutil.rmtree(folder, ignore_errors=True)  # one that is not whole
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, folder)
    shutil.rmtree(work, ignore_errors=True)
