"""Generation: greedy continuations of many prompts. Shared starts are computed once, finished rows leave the batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

import torch

from derta_lib.cache import Bin, Plan, RowCache, States, plan_bins, shared_length
from derta_lib.chat import Chat, Prompt, chat_of, continued, plain_ids
from derta_lib.errors import DertaError, UsageError, check_whole
from derta_lib.loss import site_logits, site_losses
from derta_lib.models import load_model, load_tokenizer
from derta_lib.tree import Row, Site, check_length, hidden_states, pack, use_tree_attention

T = TypeVar("T")
PACK_TOKENS = 8192
"""Tokens of prompts computed in one forward pass."""
CACHE_TOKENS = 48 * 1024
"""Columns of the key-value cache over all rows that decode together."""


class LocalTarget:
    """A local model that answers prompts and whose likelihoods can be read (`target.WhiteBoxTarget`)."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        use_tree_attention(model)
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @cached_property
    def chat(self) -> Chat:
        """How the model chats, found out when a prompt needs it: a classifier (HarmBench's, Llama Guard) does not."""
        return chat_of(self.tokenizer)

    def cut(self, text: str, tokens: int) -> str:
        """`Chat.cut`, so that a model without a template meets attacks that need none."""
        return self.chat.cut(text, tokens)

    def start(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text, outside any chat."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return text if len(ids) <= tokens else self.tokenizer.decode(ids[:tokens])

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of all that stands before the continuation."""
        plain = plain_ids(self.tokenizer, prompt)
        return self.chat.prompt_ids(prompt) if plain is None else plain

    def respond(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt, without special tokens, in order."""
        ids = generate(self.model, [self.prompt_ids(prompt) for prompt in prompts], max_new_tokens, self.stops)
        return [
            continued(self.tokenizer, row)
            if prompt.raw is not None or prompt.prefill
            else self.tokenizer.decode(row, skip_special_tokens=True)
            for prompt, row in zip(prompts, ids, strict=True)
        ]

    def log_likelihood(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """Mean log-probability (nats a token) of each continuation after its prompt, in order."""
        rows = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            before = self.prompt_ids(prompt)
            previous = before[-1] if prompt.raw is not None or prompt.prefill else None
            after = self.chat.continuation_ids(continuation, previous)
            if not after:
                raise UsageError("A continuation is empty, so it has no likelihood; give it text.")
            rows.append(
                Row((*before, *after), tuple(Site(len(before) - 1 + i, t, 1.0, "mle") for i, t in enumerate(after)))
            )
        return [-losses.mean().item() for losses in row_losses(self.model, rows)]

    @cached_property
    def stops(self) -> set[int]:
        """Ids that end an answer: the template's end of turn and the model's own end tokens."""
        configured = self.model.generation_config.eos_token_id
        try:
            end = self.chat.end
        except DertaError:  # a classifier, whose template writes no chats
            end = self.tokenizer.eos_token_id
        return {end, *(configured if isinstance(configured, list) else [configured])} - {None}


def local_target(model: str, dtype: str | None = None) -> LocalTarget:
    """The target for a model name, hub id, folder or checkpoint, in `models.precision` unless a dtype is given."""
    return LocalTarget(load_model(model, dtype), load_tokenizer(model), model)


@torch.inference_mode()
def row_losses(model: Any, rows: Sequence[Row]) -> list[torch.Tensor]:
    """−log P(target) at the sites of each row, one float32 tensor a row, in order."""
    losses: list[torch.Tensor] = []
    for batch in _filled(rows, _added, PACK_TOKENS):
        packed = site_losses(model, pack([[row] for row in batch])).cpu()
        _refuse_nan(model, packed)
        losses.extend(packed.split([len(row.sites) for row in batch]))
    return losses


@torch.inference_mode()
def row_states(model: Any, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
    """Last hidden states [length, d] of each row, float32, in order."""
    for batch in _filled(rows, _added, PACK_TOKENS):
        packed = pack([[row] for row in batch])
        states = hidden_states(model, packed).float().cpu()
        _refuse_nan(model, states)
        yield from (states[torch.from_numpy(path)] for path in packed.paths)


def _refuse_nan(model: Any, numbers: torch.Tensor) -> None:
    """Raise DertaError for a model that computes NaN, whose answers would be empty and look safe."""
    if numbers.isnan().any():
        raise DertaError(
            f"The model '{model.name_or_path or model.config.model_type}' computes NaN, so it answers nothing; its "
            "weights are damaged, or its training diverged."
        )


def _added(before: Row | None, row: Row) -> int:
    """Tokens that a row brings to a pack behind the row before."""
    return len(row.ids) - (shared_length(before.ids, row.ids) if before else 0)


def _filled(items: Iterable[T], size: Callable[[T | None, T], int], limit: int) -> Iterator[list[T]]:
    """Neighbours whose sizes fill a limit; an item's size may depend on the one before it in the same batch."""
    batch: list[T] = []
    total = 0
    for item in items:
        added = size(batch[-1] if batch else None, item)
        if batch and total + added > limit:
            yield batch
            batch, total, added = [], 0, size(None, item)
        batch.append(item)
        total += added
    if batch:
        yield batch


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: set[int]) -> list[list[int]]:
    """New token ids of each prompt's greedy continuation, without the stop token, in order.

    Equal to `model.generate(do_sample=False)` prompt by prompt in fp32, for a generation_config that changes no scores
    (a repetition penalty, as some models' files ask for, is not applied). Raises UsageError for no new tokens, and
    DertaError for an empty prompt, and where one and its continuation are longer than the model's context.
    """
    check_whole("max_new_tokens", max_new_tokens, 1)
    if not all(len(prompt) for prompt in prompts):
        raise DertaError("A prompt has no tokens, so there is nothing to go on from; give it text.")
    check_length(model, max(map(len, prompts), default=0) + max_new_tokens - 1)  # the last token is not read again
    answers: list[list[int]] = [[] for _ in prompts]
    bins = plan_bins(prompts, PACK_TOKENS, CACHE_TOKENS // max_new_tokens)
    for batch in _filled(bins, lambda _, plan: plan.columns + len(plan.prompts) * max_new_tokens, CACHE_TOKENS):
        _decode(model, prompts, batch, max_new_tokens, stops, answers)
    return answers


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    bins: Sequence[Plan],
    max_new_tokens: int,
    stops: set[int],
    answers: list[list[int]],
) -> None:
    """Fill the answers of the prompts in the bins. Finished rows run along until they are an eighth of all."""
    cache, states = _prefill(model, prompts, bins, max_new_tokens - 1)
    numbers = [number for plan in bins for number in plan.prompts]
    going = [True] * len(numbers)
    for step in range(max_new_tokens):
        likeliest, tokens = site_logits(model, states).max(-1)  # several times as fast as argmax in bf16
        _refuse_nan(model, likeliest)
        for row, token in enumerate(tokens.tolist()):
            going[row] = going[row] and token not in stops
            if going[row]:
                answers[numbers[row]].append(token)
        if step + 1 == max_new_tokens or not any(going):
            return
        if 8 * sum(going) <= 7 * len(going):
            kept = torch.tensor(going)
            cache.keep(kept)
            tokens = tokens[kept.to(tokens.device)]
            numbers, going = [number for number, goes in zip(numbers, going, strict=True) if goes], [True] * sum(going)
        cache.open_column()
        positions = torch.tensor([len(prompts[number]) + step for number in numbers], device=model.device)
        output = model.get_decoder()(
            input_ids=tokens[:, None], position_ids=positions[:, None], rows=cache, use_cache=False
        )
        states = output.last_hidden_state[:, -1]


def _prefill(
    model: Any, prompts: Sequence[Sequence[int]], bins: Sequence[Plan], room: int
) -> tuple[RowCache, torch.Tensor]:
    """The cache of the prompts in the bins, with room for new tokens, and their last tokens' hidden states [B, d]."""
    filled: list[Bin] = []
    states = []
    for batch in _filled(bins, lambda _, plan: plan.columns, PACK_TOKENS):
        packed = pack([[Row(tuple(prompts[number]))] for plan in batch for number in plan.prompts])
        made: list[States] = []
        hidden = hidden_states(model, packed, made)
        states.append(hidden[[path[-1] for path in packed.paths]])
        paths = iter(packed.paths)
        filled.extend(Bin(made, list(islice(paths, len(plan.prompts))), len(plan.shared), room) for plan in batch)
    return RowCache(filled), torch.cat(states)
