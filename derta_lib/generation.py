"""Generation: greedy continuations of many prompts. Shared starts are computed once, finished rows leave the batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from derta_lib.chat import Chat, Prompt, chat_of
from derta_lib.errors import UsageError
from derta_lib.loss import site_logits, site_losses
from derta_lib.models import load_model, load_tokenizer
from derta_lib.tree import Row, Site, hidden_states, pack, use_tree_attention

PACK_TOKENS = 2048
"""Tokens of prompts computed in one forward pass."""
CACHE_TOKENS = 48 * 1024
"""Columns of the key-value cache over all rows that decode together."""


class LocalTarget:
    """A local model that answers prompts and whose likelihoods can be read (`attacks.Target`)."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        use_tree_attention(model)
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.chat: Chat = chat_of(tokenizer)

    def respond(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Greedy continuation of each prompt, without special tokens, in order."""
        ids = generate(self.model, [self.chat.prompt_ids(p) for p in prompts], max_new_tokens, self.stops)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    def log_likelihood(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[float]:
        """Mean log-probability (nats a token) of each continuation after its prompt, in order."""
        rows = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            before = self.chat.prompt_ids(prompt)
            previous = before[-1] if prompt.raw is not None or prompt.prefill else None
            after = self.chat.continuation_ids(continuation, previous)
            if not after:
                raise UsageError("A continuation is empty, so it has no likelihood; give it text.")
            rows.append(
                Row((*before, *after), tuple(Site(len(before) - 1 + i, t, 1.0, "mle") for i, t in enumerate(after)))
            )
        return [-losses.mean().item() for losses in row_losses(self.model, rows)]

    @property
    def stops(self) -> set[int]:
        """Ids that end an answer: the template's end of turn and the model's own end tokens."""
        configured = self.model.generation_config.eos_token_id
        return {self.chat.end, *(configured if isinstance(configured, list) else [configured])} - {None}


def local_target(model: str, dtype: str = "bfloat16") -> LocalTarget:
    """The target for a model name, hub id, folder or checkpoint."""
    return LocalTarget(load_model(model, dtype), load_tokenizer(model), model)


@torch.inference_mode()
def row_losses(model: Any, rows: Sequence[Row]) -> list[torch.Tensor]:
    """−log P(target) at the sites of each row, one float32 tensor a row, in order."""
    losses: list[torch.Tensor] = []
    for batch in _batches(rows):
        packed = site_losses(model, pack([[row] for row in batch])).cpu()
        losses.extend(packed.split([len(row.sites) for row in batch]))
    return losses


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Neighbours whose lengths, shared starts counted once, fill a pack."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        shared = _shared(batch[-1].ids, row.ids) if batch else 0
        if batch and size + len(row.ids) - shared > PACK_TOKENS:
            yield batch
            batch, size, shared = [], 0, 0
        batch.append(row)
        size += len(row.ids) - shared
    if batch:
        yield batch


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    differs = np.nonzero(np.array(one[:length]) != np.array(other[:length]))[0]
    return int(differs[0]) if len(differs) else length


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: set[int]) -> list[list[int]]:
    """New token ids of each prompt's greedy continuation, without the stop token, in order.

    Equal to `model.generate(do_sample=False)` prompt by prompt in fp32. Rows of like length decode together.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while order:
        longest = len(prompts[order[-1]]) + max_new_tokens
        many = max(1, CACHE_TOKENS // longest)
        # within a batch, equal starts stand side by side so that a pack shares them
        batch = sorted(order[-many:], key=lambda i: list(prompts[i]))
        order = order[:-many]
        _decode(model, {i: prompts[i] for i in batch}, max_new_tokens, stops, answers)
    return answers


class _RowLayer(DynamicLayer):
    """Keys and values [B, H_kv, W, d] in a buffer that is made once; every row writes its next token in one column."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, width: int) -> None:
        super().__init__()
        self.keys, self.values, self.width = keys, values, width
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys[:, :, self.width] = key_states[:, :, 0]
        self.values[:, :, self.width] = value_states[:, :, 0]
        self.width += 1
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def get_seq_length(self) -> int:
        return self.width


def _decode(
    model: Any, prompts: dict[int, Sequence[int]], max_new_tokens: int, stops: set[int], answers: list[list[int]]
) -> None:
    numbers = torch.tensor(list(prompts))
    lengths = torch.tensor([len(ids) for ids in prompts.values()], device=model.device)
    width = int(lengths.max())
    cache, states = _prefill(model, [Row(tuple(ids)) for ids in prompts.values()], width, max_new_tokens)
    columns = torch.arange(width + max_new_tokens, device=model.device)
    hidden = torch.zeros((len(prompts), width + max_new_tokens), dtype=model.dtype, device=model.device)
    hidden.masked_fill_(columns < (width - lengths)[:, None], -torch.inf)
    for step in range(max_new_tokens):
        tokens = site_logits(model, states).argmax(-1)
        going = torch.tensor([token not in stops for token in tokens.tolist()])
        for number, token in zip(numbers[going].tolist(), tokens.cpu()[going].tolist(), strict=True):
            answers[number].append(token)
        if step + 1 == max_new_tokens or not going.any():
            return
        if not going.all():
            keep = going.nonzero()[:, 0]
            numbers, (lengths, tokens, hidden) = (
                numbers[keep],
                (t[keep.to(t.device)] for t in (lengths, tokens, hidden)),
            )
            cache.batch_select_indices(keep.to(model.device))
        end = width + step + 1
        output = model.get_decoder()(
            input_ids=tokens[:, None],
            position_ids=(lengths + step)[:, None],
            attention_mask=hidden[:, None, None, :end],
            depths=columns[:end],
            past_key_values=cache,
            use_cache=True,
        )
        states = output.last_hidden_state[:, -1]


def _prefill(model: Any, rows: Sequence[Row], width: int, room: int) -> tuple[Cache, torch.Tensor]:
    """The rows' cache, right-aligned to column `width` with `room` columns to write in, and last hidden states."""
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    states, first = [], 0
    for batch in _batches(rows):
        packed = pack([[row] for row in batch])
        made: Any = DynamicCache()
        hidden = hidden_states(model, packed, past_key_values=made, use_cache=True)
        states.append(hidden[[path[-1] for path in packed.paths]])
        if not keys:
            for layer in made.layers:
                shape = (len(rows), layer.keys.shape[1], width + room, layer.keys.shape[3])
                keys.append(layer.keys.new_zeros(shape))
                values.append(layer.values.new_zeros((*shape[:3], layer.values.shape[3])))
        for number, path in enumerate(packed.paths, start=first):
            where = torch.from_numpy(path).to(hidden.device)
            for layer, key, value in zip(made.layers, keys, values, strict=True):
                key[number, :, width - len(path) : width] = layer.keys[0][:, where]
                value[number, :, width - len(path) : width] = layer.values[0][:, where]
        first += len(batch)
    layers: list[Any] = [_RowLayer(key, value, width) for key, value in zip(keys, values, strict=True)]
    return Cache(layers=layers), torch.cat(states)
