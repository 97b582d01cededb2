"""The three ways to a training step that are compared, each on the same triples, weights, LoRA and precision.

`authors`: the authors' computation, written from its description: two padded rows a triple, a Python loop that
relabels the harmful row, fp32 logits at every position. `trl`: TRL's SFTTrainer on the MLE rows alone (it has no RTO).
`ours`: the library, with the paper's LoRA preset, so that the objective is that of `authors` to the last site;
`ours_fixed`: the same with the project's default preset.
"""

import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch.nn import functional as F

from derta_lib import lora, loss, training, tree
from derta_lib.chat import chat_of
from derta_lib.corpus import concord
from derta_lib.models import REFERENCE, load_model, load_tokenizer
from derta_lib.supervision import PRESETS, Encoder
from derta_lib.tree import Row

NAMES = ("authors", "trl", "ours", "ours_fixed")
RECIPE = training.Recipe()
LLAMA3_8B = "llama3-8b"
"""An 8B LLaMA-3-shaped model of random weights, for GPUs."""
DTYPE = getattr(torch, RECIPE.dtype)
"""What all of them compute in: the faster one here."""
MIXED = DTYPE is torch.bfloat16


@dataclass(frozen=True)
class Work:
    """A triple as tokens, under each preset: its MLE row (r behind q and r̂_{<k}) and its RTO row (q and r̂)."""

    paper: tuple[Row, ...]
    fixed: tuple[Row, ...]


def corpus_work(count: int) -> list[Work]:
    """The first triples of the Concord corpus in the reference tokenizer, whatever the model."""
    chat = chat_of(load_tokenizer(REFERENCE))
    encoders = [Encoder(chat, "derta", PRESETS[name], 4096) for name in ("paper-lora", "fixed")]
    return [
        Work(*(tuple(encoder.rows(triple, f"bench/{triple.id}")) for encoder in encoders))
        for triple in concord(0).triples[:count]
    ]


def synthetic_tokens(harmful: int) -> int:
    """Tokens of a triple of `synthetic_work`."""
    return 20 + 30 + harmful


def synthetic_work(count: int, harmful: int) -> list[Work]:
    """Triples of random tokens: a query of 20, a safe response of 30 and `harmful` tokens of r̂, forked halfway.

    35 % of the tokens are sites whatever the length (all of r, the rest spread over r̂), so that the head's share is
    the same.
    """
    rng, sites = random.Random(harmful), round(0.35 * synthetic_tokens(harmful))

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(10, 500) for _ in range(length))

    def one() -> tuple[Row, Row]:
        query, safe, bad = ids(20), ids(30), ids(harmful)
        before = (*query, *bad[: harmful // 2])
        mle = tuple(tree.Site(len(before) - 1 + i, token, 1.0, "mle") for i, token in enumerate(safe))
        kept = sites - len(safe)
        rto = tuple(tree.Site(19 + harmful * i // kept, 7, 1.0, "rto") for i in range(kept))
        return Row((*before, *safe), mle, len(mle)), Row((*query, *bad), rto, len(rto))

    return [Work(rows, rows) for rows in (one() for _ in range(count))]


def base_model(name: str, device: str) -> Any:
    """A model by name, in DTYPE on the device; `llama3-8b` has LLaMA-3's shape and random weights."""
    if name != LLAMA3_8B:
        return load_model(name).to(device)
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE)


def twin(model: Any) -> Any:
    """A copy with modules of its own and the same weights, which LoRA leaves as they are: an 8B model fits once."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


Step = Callable[[], float]
"""Forward and backward of one micro-batch; returns the loss and leaves the gradients."""


def authors_batch(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows padded at the right: ids, attention mask and labels (−100 where none), all int64 [B, L].

    An MLE row gets its last target (the end token) as its last id.
    """
    full = [(*row.ids, row.sites[-1].target) if row.sites[-1].task == "mle" else row.ids for row in rows]
    length = max(len(ids) for ids in full) + 1
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):  # the loop of their forward, which relabels r̂ as the refusal token
        ids[number, : len(full[number])] = torch.tensor(full[number])
        for site in row.sites:
            labels[number, site.position + 1] = site.target
    mask = (torch.arange(length)[None] < torch.tensor([len(each) for each in full])[:, None]).long()
    return ids, mask, labels


def authors_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One mean over all labels of the micro-batch, from fp32 logits [B, L, V]."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    shifted = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(shifted, labels[:, 1:].reshape(-1), ignore_index=-100)


def authors(model: Any, work: Sequence[Work]) -> Step:
    model = get_peft_model(model, lora.config(RECIPE.lora_rank, RECIPE.lora_alpha))
    rows = [row for mle, rto in (each.paper for each in work) for row in (mle, rto)]
    batch = [tensor.to(model.device) for tensor in authors_batch(rows)]

    def step() -> float:
        model.zero_grad()
        with torch.autocast(model.device.type, DTYPE, enabled=MIXED):
            value = authors_loss(model, *batch)
        value.backward()
        return value.item()

    return step


def trl(model: Any, work: Sequence[Work]) -> Step:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    examples = []
    for row, _ in (each.paper for each in work):
        labels = [-100] * (len(row.ids) + 1)
        for site in row.sites:
            labels[site.position + 1] = site.target
        examples.append({"input_ids": [*row.ids, row.sites[-1].target], "labels": labels})
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            bf16=MIXED,
            use_cpu=model.device.type == "cpu",
            gradient_checkpointing=False,
            per_device_train_batch_size=len(examples),
            max_length=None,
            report_to=[],
        )
        trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list(examples),
            processing_class=load_tokenizer(REFERENCE),
            peft_config=lora.config(RECIPE.lora_rank, RECIPE.lora_alpha),
        )
    batch = trainer.data_collator(examples)
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    labelled = (batch["labels"] != -100).sum().to(model.device)

    def step() -> float:
        model.zero_grad()
        return trainer.training_step(wrapped, batch, labelled).item()

    return step


def step_on(model: Any, groups: Sequence[Sequence[Row]]) -> Step:
    """Our step of a prepared model; as in training, the packs are made in each, and on a CPU one for each core."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    most = training.side_by_side(model)

    def losses(packed: tree.Pack) -> torch.Tensor:
        with torch.autocast(model.device.type, DTYPE, enabled=MIXED):
            return model(packed)

    def step() -> float:
        model.zero_grad()
        packs = tree.parts(groups, most)
        total, _ = loss.micro_batch_sum(losses, packs, trained)
        value = total / sum(packed.count for packed in packs)
        value.backward()
        return value.item()

    return step


def make(name: str, model: Any, work: Sequence[Work]) -> Step:
    if name == "authors":
        return authors(model, work)
    if name == "trl":
        return trl(model, work)
    return step_on(training.prepare(model, RECIPE), groups_of(name, work))


def groups_of(name: str, work: Sequence[Work]) -> list[list[Row]]:
    """Rows of each triple under the preset of a method."""
    return [list(each.fixed if name == "ours_fixed" else each.paper) for each in work]


@dataclass(frozen=True)
class Size:
    """What a method's step must process: `tokens` without padding, `context` (keys seen by all of them), `sites`."""

    tokens: int
    context: int
    sites: int


def size_of(name: str, work: Sequence[Work]) -> Size:
    rows = groups_of(name, work)
    if name in ("authors", "trl"):
        flat = [row for group in rows for row in (group if name == "authors" else group[:1])]
        return Size(
            sum(len(row.ids) for row in flat),
            sum(len(row.ids) * (len(row.ids) + 1) // 2 for row in flat),
            sum(len(row.sites) for row in flat),
        )
    packed = tree.pack(rows)
    return Size(len(packed.ids), int((packed.positions + 1).sum()), len(packed.sites))


def flops(model: Any, size: Size) -> float:
    """Model FLOPs of a LoRA step: 4·N·T + 6·P·T + 12·layers·d·context + 4·V·h·sites.

    N: weights of the decoder's linear layers (forward, and backward to the activations), P: LoRA's parameters (their
    own gradients as well), d: width of all query heads together, h: hidden width, V: vocabulary. Nothing that is made
    again, and no padding, counts.
    """
    config, decoder = model.config, model.get_decoder()
    layers = [module for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    linear = sum(layer.weight.numel() for layer in layers)
    adapter = RECIPE.lora_rank * sum(layer.in_features + layer.out_features for layer in layers)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return float(
        (4 * linear + 6 * adapter) * size.tokens
        + 12 * config.num_hidden_layers * width * size.context
        + 4 * config.vocab_size * config.hidden_size * size.sites
    )
