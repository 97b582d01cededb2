"""Token trees: rows that share a start become one sequence with branches, many trees one pack without padding.

A row is a full token sequence with the sites at which it is supervised. Rows are inserted in a trie, so
whatever they share from the start (a triple's query and r̂_{<k}, a system turn, the demonstrations of an
attack) is computed once. Each token attends to its ancestors and itself. Attention runs in tiles: at most TILE
of the tokens that a group of rows brought in, against those on their paths; tiles of like size form a block.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from derta_lib.cache import Bin, RowCache, States
from derta_lib.errors import DertaError, first_line

TASKS = ("mle", "rto")


@dataclass(frozen=True)
class Site:
    """A supervised place: the hidden state at `position` of its row must predict `target`; `task` names the term."""

    position: int
    target: int
    weight: float
    task: str


@dataclass(frozen=True)
class Row:
    """A token sequence and its sites; `count` is what the row adds to the denominator of the loss."""

    ids: tuple[int, ...]
    sites: tuple[Site, ...] = ()
    count: float = 0.0


@dataclass(frozen=True)
class Pack:
    """Groups of rows laid out as one sequence of L tokens with S sites, and as blocks of tiles for attention.

    `ids`, `positions` (depth in the tree): int64 [L]; `paths`: for each row, the indices of its tokens;
    `masks`: a block each, G tiles of at most Q query and K key tokens, float32 [G, Q, K], 0 where a query sees a key,
    else −inf (a padded query sees one key, so that no softmax is empty); `queries`, `keys`: int64 [M] and [N], the
    tokens in all tiles, end to end; `order`: int64 [L], where each token stands among the queries; `padding`: the
    other places;
    `sites`, `targets`, `tasks` (index into TASKS): int64 [S]; `weights`: float32 [S]; `count`: denominator.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    paths: list[np.ndarray]
    masks: list[torch.Tensor]
    queries: torch.Tensor
    keys: torch.Tensor
    order: torch.Tensor
    padding: torch.Tensor
    sites: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    tasks: torch.Tensor
    count: float


def pack(groups: Sequence[Sequence[Row]]) -> Pack:
    """Merge the rows of all groups on their common starts; rows of a group share their tiles of attention."""
    index: dict[tuple[int, int], int] = {}
    ids, depths, paths = list[int](), list[int](), list[np.ndarray]()
    sites, tiles = list[tuple[int, int, float, int]](), list[_Tile]()
    for group in groups:
        first_new = len(ids)
        group_paths = []
        for row in group:
            node, path = -1, list[int]()
            for token in row.ids:
                if (known := index.get((node, token))) is None:
                    break
                path.append(node := known)
            rest, depth = row.ids[len(path) :], len(path)
            made = range(len(ids), len(ids) + len(rest))
            index.update(zip(zip((node, *made), rest, strict=False), made, strict=True))
            ids.extend(rest)
            depths.extend(range(depth, len(row.ids)))
            path.extend(made)
            group_paths.append(np.array(path, dtype=np.int64))
            sites.extend((path[s.position], s.target, s.weight, TASKS.index(s.task)) for s in row.sites)
        paths.extend(group_paths)
        tiles.extend(_tiles(first_new, len(ids), group_paths))
    batches = _batches(tiles)
    order = np.empty(len(ids), dtype=np.int64)
    start = 0
    for batch in batches:
        width = max(len(tile.queries) for tile in batch)
        for tile in batch:
            order[tile.queries] = start + np.arange(len(tile.queries))
            start += width
    queries, keys, masks = zip(*map(_block, batches), strict=True)
    where, targets, weights, tasks = zip(*sites, strict=True) if sites else ((), (), (), ())
    return Pack(
        ids=torch.tensor(ids, dtype=torch.long),
        positions=torch.tensor(depths, dtype=torch.long),
        paths=paths,
        masks=[torch.from_numpy(mask) for mask in masks],
        queries=torch.from_numpy(np.concatenate(queries)),
        keys=torch.from_numpy(np.concatenate(keys)),
        order=torch.from_numpy(order),
        padding=torch.from_numpy(np.delete(np.arange(start), order)),
        sites=torch.tensor(where, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        tasks=torch.tensor(tasks, dtype=torch.long),
        count=sum(row.count for group in groups for row in group),
    )


def parts(groups: Sequence[Sequence[Row]], most: int) -> list[Pack]:
    """The groups in packs of like size, at least two groups each and `most` packs at most."""
    count = max(1, min(most, len(groups) // 2))
    shares: list[list[Sequence[Row]]] = [[] for _ in range(count)]
    tokens = [0] * count
    for group in sorted(groups, key=lambda group: -sum(len(row.ids) for row in group)):
        least = tokens.index(min(tokens))
        shares[least].append(group)
        tokens[least] += sum(len(row.ids) for row in group)
    return [pack(share) for share in shares]


TOO_LARGE = (
    "Token id {} lies outside the model's {} of {} rows; "
    "the tokenizer has more tokens than the model: resize the embeddings or take the model's own tokenizer."
)
PROBE = 64
"""Most tokens of a row on which a model is tried."""
TILE = 256
"""Query tokens of a tile at most: bounds the scores held at once, and skips the keys that come after them."""


@dataclass(frozen=True)
class _Tile:
    """Query tokens, the key tokens that some of them see, both ascending, and which see which ([queries, keys])."""

    queries: np.ndarray
    keys: np.ndarray
    visible: np.ndarray


def _tiles(first: int, end: int, paths: Sequence[np.ndarray]) -> Iterator[_Tile]:
    """The tokens first..end-1 of a group in equal tiles. A parent's index is below its child's, so paths ascend."""
    if first == end:
        return
    for queries in np.array_split(np.arange(first, end), -(-(end - first) // TILE)):
        begin, last = queries[0], queries[-1]
        known = [path[: np.searchsorted(path, last, side="right")] for path in paths]
        known = [path for path in known if len(path) and path[-1] >= begin]
        keys = np.unique(np.concatenate(known))
        visible = np.zeros((len(queries), len(keys)), dtype=bool)
        for path in known:
            mine = path[path >= begin]
            visible[np.ix_(mine - begin, np.searchsorted(keys, path))] |= mine[:, None] >= path[None]
        yield _Tile(queries, keys, visible)


def _batches(tiles: Iterable[_Tile]) -> list[list[_Tile]]:
    """Tiles of like size together, so that padding stays below half of what they need."""
    batches: list[list[_Tile]] = []
    for tile in sorted(tiles, key=lambda tile: (len(tile.queries).bit_length(), len(tile.keys))):
        grown = [*batches[-1], tile] if batches else []
        padded = len(grown) * max((len(t.queries) for t in grown), default=0) * len(tile.keys)
        if batches and padded <= 1.5 * sum(t.visible.size for t in grown):
            batches[-1] = grown
        else:
            batches.append([tile])
    return batches


def _block(tiles: Sequence[_Tile]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The query and key tokens of tiles side by side, end to end, and their mask."""
    shape = len(tiles), max(len(tile.queries) for tile in tiles), max(len(tile.keys) for tile in tiles)
    queries, keys = np.zeros(shape[:2], dtype=np.int64), np.zeros((shape[0], shape[2]), dtype=np.int64)
    mask = np.full(shape, -np.inf, dtype=np.float32)
    for number, tile in enumerate(tiles):
        asked, known = tile.visible.shape
        queries[number, :asked], keys[number, :known] = tile.queries, tile.keys
        mask[number, :asked, :known][tile.visible] = 0.0
        mask[number, asked:, 0] = 0.0
    return queries.ravel(), keys.ravel(), mask


def tree_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    laid: Pack | None = None,
    made: list[States] | None = None,
    rows: RowCache | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a pack, block by block, or of `rows` that decode one token each, bin by bin; no mask is taken.

    Pack: query [1, H, L, d], key and value [1, H_kv, L, d], `laid` out; a list `made` is given each layer's key and
    value. Rows: query [B, H, 1, d], key and value [B, H_kv, 1, d]. Returns [1, L, H, d] or [B, 1, H, d]. A layer with a
    sliding window also hides keys that lie `sliding_window` or more tokens back. Runs through SDPA (on a CPU and for
    rows through two matrix products, which beat it there about threefold), or through the model's own eager attention
    where it was loaded with that.
    """
    eager = None
    if module.config._attn_implementation == "tree_eager":
        own = sys.modules[type(module).__module__].eager_attention_forward
        eager = partial(own, module, scaling=scaling, dropout=dropout, **kwargs)
    if rows is not None:
        return rows.attend(module.layer_idx, (query, key, value), scaling, sliding_window, eager), None
    if laid is None:
        raise DertaError(
            f"A layer of the type '{type(module).__name__}' was called without a pack: a model that attends by blocks "
            "takes packs alone; load it once more for other use."
        )
    if made is not None:
        made.append((key[0], value[0]))
    by_token = [states[0].transpose(0, 1).flatten(1) for states in (query, key, value)]  # each [L, heads · d]
    asked = _Arranged.apply(by_token[0], laid.queries, laid.order, None)
    # index_select, because its backward pass is several times as fast as that of indexing
    flat = [asked, *(states.index_select(0, laid.keys) for states in by_token[1:])]
    if sliding_window is not None:  # the depths of queries and keys go along
        flat += [laid.positions[index] for index in (laid.queries, laid.keys)]
    lengths = [[len(mask) * mask.shape[side] for mask in laid.masks] for side in (1, 2, 2, 1, 2)]
    outputs = []
    for mask, *parts in zip(laid.masks, *map(torch.split, flat, lengths), strict=True):
        tiles = [
            part.view(len(mask), -1, states.shape[1], states.shape[3]).transpose(1, 2)
            for part, states in zip(parts, (query, key, value), strict=False)
        ]
        if sliding_window is not None:
            asked, known = parts[3].view(len(mask), -1, 1), parts[4].view(len(mask), 1, -1)
            mask = mask.masked_fill(asked - known >= sliding_window, -torch.inf)
        mask = mask[:, None]
        output = eager(*tiles, mask)[0] if eager else _grouped_attention(tiles, mask, scaling, dropout)
        outputs.append(output.flatten(0, 1))
    result = _Arranged.apply(torch.cat(outputs).flatten(1), laid.order, laid.queries, laid.padding)
    return result.view(1, len(laid.order), *outputs[0].shape[1:]), None


class _Arranged(torch.autograd.Function):
    """States [M, d] put in another order, `index` [N]; the gradient of place m is that of `inverse`[m], or none where
    `padding` lists m. Selecting again is several times as fast as adding up, which index_select's own gradient does.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.inverse, ctx.padding = inverse, padding
        return states.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].index_select(0, ctx.inverse)
        if ctx.padding is not None:
            gradient.index_fill_(0, ctx.padding, 0.0)
        return gradient, None, None, None


def _multiplies(query: torch.Tensor) -> bool:
    """Whether two matrix products beat SDPA: on a CPU, about threefold."""
    return query.device.type == "cpu"


def _grouped_attention(
    states: Sequence[torch.Tensor], mask: torch.Tensor, scaling: float | None, dropout: float
) -> torch.Tensor:
    """Attention [B, Q, H, d] of query [B, H, Q, d] to key and value [B, H_kv, K, d]; mask [B, 1, Q, K].

    Heads that share keys are one head's queries.
    """
    query, key, value = states
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, -1, width)
    mask = mask.expand(batch, heads // groups, queries, -1).reshape(batch, 1, grouped.shape[2], -1)
    if _multiplies(query):
        scores = (grouped * (scaling or width**-0.5) @ key.transpose(2, 3)).add_(mask)
        output = F.dropout(scores.softmax(-1), dropout) @ value
    else:
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, heads, queries, -1).transpose(1, 2)


for _inner in ("sdpa", "eager"):
    AttentionInterface.register(f"tree_{_inner}", tree_attention)


def use_tree_attention(model: Any) -> None:
    """Let a model attend by blocks: through eager attention if it was loaded so or knows no SDPA, else through SDPA.

    Raises DertaError for a model that is not made of causal softmax attention, over all tokens or a sliding window:
    there a pack would differ from its rows. The configuration tells, or two short rows do (`_probe`).
    """
    current = str(model.config._attn_implementation)
    if current.startswith("tree_"):
        return
    config = model.config.get_text_config()
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if getattr(config, "use_bidirectional_attention", None):
        foreign.append("bidirectional attention")
    if not foreign:
        training, inner = model.training, "eager" if current == "eager" or not model._supports_sdpa else "sdpa"
        own = ["attention of its own"]
        foreign = _probe(model.eval(), f"tree_{inner}") if model._supports_attention_backend else own
        model.train(training)
    if foreign:
        raise DertaError(
            f"Models of type '{config.model_type}' use {' and '.join(foreign)}, which cannot be split into branches "
            "exactly; take a model with causal attention, full or over a sliding window (LLaMA, Mistral, Qwen, Gemma)."
        )


@torch.no_grad()
def _probe(model: Any, attention: str) -> list[str]:
    """Let the model attend by `attention`, and say in words what keeps two rows from being in a pack, and a step of
    generation behind it, what they are by themselves. The rows are longer than a short sliding window.
    """
    config = model.config.get_text_config()
    known = min(model.get_input_embeddings().weight.shape[0], PROBE)
    usable = [token for token in range(known) if token != getattr(config, "pad_token_id", None)]
    most, window = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    length = max(2, min(PROBE, most or PROBE, (window or 8) + 8))
    row = [usable[7 * place % len(usable)] for place in range(length)]
    rows = torch.tensor([row, [*row[: length // 2], *reversed(row[length // 2 :])]], device=model.device)
    try:
        decoder = model.get_decoder()
        alone = decoder(input_ids=rows, use_cache=False).last_hidden_state
        model.set_attn_implementation(attention)
        packed, made = pack([[Row(tuple(ids))] for ids in rows[:, :-1].tolist()]), list[States]()
        states = hidden_states(model, packed, made)
        cache = RowCache([Bin(made, packed.paths, 0, 1)])
        cache.open_column()
        depths = torch.full_like(rows[:, -1:], length - 1)
        step = decoder(input_ids=rows[:, -1:], position_ids=depths, rows=cache, use_cache=False).last_hidden_state
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, RuntimeError, DertaError) as error:
        return [f"layers that take no packs ({first_line(error)})"]
    mine = torch.cat([torch.stack([states[path] for path in packed.paths]), step], 1)
    off = torch.dist(mine.float(), alone.float()) / alone.float().norm()
    # NaN is no difference: it has a sentence of its own where answers are read
    return ["attention that a pack changes"] if off > (1e-3 if model.dtype == torch.float32 else 0.1) else []


def hidden_states(model: Any, packed: Pack, made: list[States] | None = None) -> torch.Tensor:
    """Last hidden states [L, d] of a pack; position ids restart at every fork, attention follows the branches.

    A list `made` is given each layer's keys and values. Raises DertaError for a row that is longer than the model's
    context, and for a token that it has no embedding for.
    """
    check_length(model, int(packed.positions.max()) + 1)
    rows = model.get_input_embeddings().weight.shape[0]
    if (largest := int(packed.ids.max())) >= rows:
        raise DertaError(TOO_LARGE.format(largest, "embeddings", rows))
    output = model.get_decoder()(
        input_ids=packed.ids[None].to(model.device),
        position_ids=packed.positions[None].to(model.device),
        laid=layout(packed, model),
        made=made,
        use_cache=False,
    )
    return output.last_hidden_state[0]


def check_length(model: Any, tokens: int) -> None:
    """Raise DertaError where a row of so many tokens is longer than the model's context, or than the part of it where
    rotary frequencies do not follow the longest row ('longrope'): beyond, the rows of a pack would change one another.
    """
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    rules = [given, *(rule for rule in given.values() if isinstance(rule, dict))]  # of all layers, or by their type
    bounds = [rule.get("original_max_position_embeddings") for rule in rules if rule.get("rope_type") == "longrope"]
    known = min(filter(None, [getattr(config, "max_position_embeddings", None), *bounds]), default=None)
    if known and tokens > known:
        raise DertaError(
            f"A row of {tokens} tokens is longer than the {known} that the model can take; shorten the texts, or lower "
            "max_length or max_new_tokens."
        )


def layout(packed: Pack, model: Any) -> Pack:
    """The pack as `tree_attention` reads it: on the model's device, with masks in the model's precision."""
    names = ("positions", "queries", "keys", "order", "padding")
    moved: dict[str, Any] = {name: getattr(packed, name).to(model.device) for name in names}
    return replace(packed, masks=[mask.to(model.device, model.dtype) for mask in packed.masks], **moved)
