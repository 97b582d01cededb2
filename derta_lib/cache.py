"""Keys and values of rows that decode together, in bins: what the rows of a bin share is held and read once.

All rows go through the linear layers as one batch; attention works bin by bin, so that a row is padded to the
longest of its bin alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values."""
Eager = Callable[..., Any]
"""A model's own attention, called with query, key, value and mask."""

SLACK = 512
"""Columns that a bin may waste on a row that joins it; a bin of its own would cost more in small operations."""
SHORT = 64
"""Fewer shared ids than this are held by each row: products of their own would cost more than they save."""
ROOM = 64
"""Columns for new tokens that a bin makes at once."""


@dataclass(frozen=True)
class Plan:
    """Prompts (numbers into a list) to decode in one bin: the ids they share from the start, and the longest length."""

    prompts: tuple[int, ...]
    shared: tuple[int, ...]
    longest: int

    @property
    def once(self) -> tuple[int, ...]:
        """Those of the shared ids that the bin holds once: none where they are fewer than SHORT."""
        return self.shared if len(self.shared) >= SHORT else ()

    @property
    def columns(self) -> int:
        """Columns of the cache before the first new token."""
        return len(self.once) + len(self.prompts) * (self.longest - len(self.once))

    def join(self, other: "Plan") -> "Plan":
        """The plan for the prompts of both."""
        shared = self.shared[: shared_length(self.shared, other.shared)]
        return Plan(self.prompts + other.prompts, shared, max(self.longest, other.longest))


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences share from the start."""
    length = min(len(one), len(other))
    differs = np.nonzero(np.array(one[:length]) != np.array(other[:length]))[0]
    return int(differs[0]) if len(differs) else length


def plan_bins(prompts: Sequence[Sequence[int]], most_columns: int, most_prompts: int) -> list[Plan]:
    """Bins for all prompts, in lexicographic order: first of neighbours in that order, then of like length."""

    def joined(plans: Iterable[Plan]) -> list[Plan]:
        bins: list[Plan] = []
        for plan in plans:
            if bins:
                larger, apart = bins[-1].join(plan), bins[-1].columns + plan.columns
                if larger.columns <= min(apart + SLACK, most_columns) and len(larger.prompts) <= most_prompts:
                    bins[-1] = larger
                    continue
            bins.append(plan)
        return bins

    def place(number: int) -> list[int]:
        return list(prompts[number])

    numbers = sorted(range(len(prompts)), key=place)
    neighbours = joined(Plan((i,), tuple(prompts[i]), len(prompts[i])) for i in numbers)
    alike = joined(sorted(neighbours, key=lambda plan: plan.longest - len(plan.shared)))
    ordered = (Plan(tuple(sorted(plan.prompts, key=place)), plan.once, plan.longest) for plan in alike)
    return sorted(ordered, key=lambda plan: place(plan.prompts[0]))


class Bin:
    """n rows that share their first s tokens; their own, W at most, are right-aligned, and new tokens go behind them.

    For each layer, keys and values: `shared` [H_kv, s, d] and `own` [H_kv, n, W + room, d]. Attention reads the whole
    room, hidden until it is written: shapes that stay from step to step are faster.
    """

    def __init__(self, layers: Iterable[States], paths: Sequence[np.ndarray], shared: int, room: int) -> None:
        """From a pack's keys and values, [H_kv, L, d] for each layer, and the indices of each row's tokens in it."""
        room = min(room, ROOM)
        self.width = shared
        self.end = max(map(len, paths)) - shared
        chosen = np.zeros((len(paths), self.end + room), dtype=np.int64)
        hidden = np.ones((len(paths), shared + self.end + room), dtype=bool)
        hidden[:, :shared] = False
        for row, path in enumerate(paths):
            padding = shared + self.end - len(path)
            chosen[row, padding : self.end] = path[shared:]
            hidden[row, shared + padding : shared + self.end] = False
        self.shared: list[States] = []
        self.own: list[States] = []
        for keys, values in layers:
            start, rest = (torch.from_numpy(index).to(keys.device) for index in (paths[0][:shared], chosen))
            self.shared.append((keys[:, start], values[:, start]))
            self.own.append((keys[:, rest], values[:, rest]))
        self.hidden = torch.from_numpy(hidden).to(keys.device)
        # the depth that each row's first own column would have in it
        self.first = torch.tensor([len(path) - self.end for path in paths], device=keys.device)
        self.masks: dict[int | None, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.first)

    def keep(self, rows: torch.Tensor) -> None:
        """Leave these rows alone, int64."""
        self.first, self.hidden = self.first[rows], self.hidden[rows]
        self.own = [(keys[:, rows], values[:, rows]) for keys, values in self.own]

    def open_column(self) -> None:
        """Make place for the tokens of a step, which see themselves."""
        if self.width + self.end == self.hidden.shape[1]:
            self.hidden = F.pad(self.hidden, (0, ROOM), value=True)
            self.own = [(F.pad(keys, (0, 0, 0, ROOM)), F.pad(values, (0, 0, 0, ROOM))) for keys, values in self.own]
        self.hidden[:, self.width + self.end] = False
        self.end += 1
        self.masks.clear()

    def attend(
        self, layer: int, states: Sequence[torch.Tensor], scaling: float, window: int | None, eager: Eager | None
    ) -> torch.Tensor:
        """Attention [n, 1, H, d] of a step's query [n, H, 1, d]; its key and value [n, H_kv, 1, d] are kept."""
        query, key, value = states
        (first_keys, first_values), (keys, values) = self.shared[layer], self.own[layer]
        keys[:, :, self.end - 1] = key[:, :, 0].transpose(0, 1)
        values[:, :, self.end - 1] = value[:, :, 0].transpose(0, 1)
        mask = self._mask(window, query.dtype)
        if eager:
            everything = (
                torch.cat([first.expand(len(self), -1, -1, -1), own.transpose(0, 1)], 2)
                for first, own in ((first_keys, keys), (first_values, values))
            )
            return eager(query, *everything, mask[:, None])[0]
        groups, rows, columns, size = keys.shape
        heads = query.shape[1] // groups
        asked = (query * scaling).view(rows, groups, heads, size).transpose(0, 1)
        scores = torch.bmm(asked.reshape(groups * rows, heads, size), keys.flatten(0, 1).mT)
        scores = scores.view(groups, rows, heads, columns)
        if self.width:
            of_first = torch.bmm(asked.reshape(groups, rows * heads, size), first_keys.mT)
            scores = torch.cat([of_first.view(groups, rows, heads, self.width), scores], -1)
        for_first, for_own = scores.add_(mask).softmax(-1).split([self.width, columns], -1)
        output = torch.bmm(for_own.reshape(groups * rows, heads, columns), values.flatten(0, 1)).flatten()
        if self.width:
            output += torch.bmm(for_first.reshape(groups, rows * heads, self.width), first_values).flatten()
        return output.view(groups, rows, heads, -1).transpose(0, 1).reshape(rows, 1, groups * heads, -1)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[n, 1, s + W + room], −inf in padding, columns to come and `window` or more tokens back, else 0."""
        if window not in self.masks:
            hidden = self.hidden
            if window is not None:
                columns = torch.arange(hidden.shape[1], device=hidden.device)
                own = columns - self.width + self.first[:, None]
                depths = torch.where(columns < self.width, columns, own)
                hidden = hidden | (self.first[:, None] + self.end - 1 - depths >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[window] = mask.masked_fill_(hidden, -torch.inf)[:, None]
        return self.masks[window]


class RowCache:
    """The bins of all rows that decode together, in the rows' order."""

    def __init__(self, bins: Iterable[Bin]) -> None:
        self.bins = list(bins)

    def open_column(self) -> None:
        """Make place for the tokens of a step in every bin."""
        for each in self.bins:
            each.open_column()

    def keep(self, going: torch.Tensor) -> None:
        """Leave the rows that are going on, bool [B], alone."""
        parts = going.split([len(each) for each in self.bins])
        for each, part in zip(self.bins, parts, strict=True):
            if part.any() and not part.all():
                each.keep(part.nonzero()[:, 0])
        self.bins = [each for each, part in zip(self.bins, parts, strict=True) if part.any()]

    def attend(
        self, layer: int, states: Sequence[torch.Tensor], scaling: float | None, window: int | None, eager: Eager | None
    ) -> torch.Tensor:
        """Attention [B, 1, H, d] of a step's query, key and value, [B, heads, 1, d] each, kept in the bins."""
        sizes = [len(each) for each in self.bins]
        scaling = scaling or states[0].shape[-1] ** -0.5
        parts = zip(self.bins, *(each.split(sizes) for each in states), strict=True)
        return torch.cat([one.attend(layer, part, scaling, window, eager) for one, *part in parts])
