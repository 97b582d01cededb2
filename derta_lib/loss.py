"""The loss: cross-entropy at the sites only, so that logits exist for a chunk of sites and never for a whole batch."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from derta_lib.errors import DertaError
from derta_lib.tree import TASKS, TOO_LARGE, Pack, hidden_states

CHUNK = 256
"""Sites whose logits a CPU holds at once; a GPU, idle on so few, holds four times as many."""
CACHED = 4
"""Sites whose float32 probabilities stay in a core's cache; a GPU takes a whole chunk's at once."""


def site_losses(model: Any, packed: Pack) -> torch.Tensor:
    """−log P(target) in nats at every site of a pack, float32 [S]."""
    hidden = hidden_states(model, packed)
    return cross_entropy(model, hidden[packed.sites.to(hidden.device)], packed.targets)


def site_logits(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of hidden states [S, d]; the scalings some families put behind the head are float32."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(states)
    if scale := getattr(config, "logits_scaling", None):
        logits = logits.float() / scale
    if factor := getattr(config, "logit_scale", None):
        logits = logits.float() * factor
    if softcap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits.float() / softcap) * softcap
    return logits


def cross_entropy(model: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log P(target), float32 [S], a chunk at a time, so that no more than a chunk's logits are ever held.

    Under a frozen head (LoRA) the gradient is taken while a chunk's logits are there; a head that is trained makes
    them again in the backward pass.

    Raises DertaError when a target lies outside the head (a tokenizer larger than its model's vocabulary).
    """
    if len(targets) == 0:
        return states.new_zeros(0, dtype=torch.float32)
    size = model.get_output_embeddings().weight.shape[0]
    if (largest := int(targets.max())) >= size:
        raise DertaError(TOO_LARGE.format(largest, "head", size))

    most = CHUNK * (1 if states.device.type == "cpu" else 4)
    pieces = zip(states.split(most), targets.to(states.device).split(most), strict=True)
    if model.get_output_embeddings().weight.requires_grad and torch.is_grad_enabled():
        return torch.cat([checkpoint(_losses, model, *piece, use_reentrant=False) for piece in pieces])
    return torch.cat([_WithGradient.apply(model, *piece) for piece in pieces])


def _losses(model: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(site_logits(model, states).float(), targets, reduction="none")


class _WithGradient(torch.autograd.Function):
    """Losses of a chunk of states [S, d] and, at once, their gradients: a row's loss depends on its state alone."""

    @staticmethod
    def forward(ctx: Any, model: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not ctx.needs_input_grad[1]:
            return _losses(model, states, targets)
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logits = site_logits(model, states)
        errors = logits.detach()
        losses = _become_errors(errors, targets)
        (gradient,) = torch.autograd.grad(logits, states, errors)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *weights: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None, gradient * weights[0][:, None].to(gradient.dtype), None


def _become_errors(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log P(target), float32 [S]; the logits [S, V] become its gradient, P − 1(target), where they lie.

    By hand, because on a CPU autograd's float32 copies of a whole chunk cost more than the head's products.
    """
    losses = []
    together = CACHED if logits.device.type == "cpu" else len(logits)
    for rows, wanted in zip(logits.split(together), targets[:, None].split(together), strict=True):
        p = rows.softmax(-1, dtype=torch.float32)
        # by way of the likeliest token, whose P cannot underflow: twice as fast as log_softmax
        behind = rows.amax(1, keepdim=True).float() - rows.gather(1, wanted)
        losses.append((behind - p.amax(1, keepdim=True).log())[:, 0])
        rows.copy_(p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0)))
    return torch.cat(losses)


def weighted_sum(losses: torch.Tensor, packed: Pack) -> torch.Tensor:
    """Σ weight · loss over a pack's sites; divided by the whole step's count it is the objective."""
    return (losses * packed.weights.to(losses.device)).sum()


def micro_batch_sum(
    model: Callable[[Pack], torch.Tensor], packs: Sequence[Pack], parameters: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Σ weight · loss (scalar) over the packs of a micro-batch, and each pack's site losses without gradient.

    `model` gives a pack's site losses, `parameters` are the tensors that it trains. Several packs (`tree.parts`) run
    side by side, a thread each with its share of the cores: the many small operations of a step do not spread over
    cores by themselves. Their gradients are added in the packs' order, so that the result does not depend on timing.
    """
    if len(packs) == 1:
        losses = model(packs[0])
        return weighted_sum(losses, packs[0]), [losses.detach()]
    found: list[torch.Tensor] = []
    return _SideBySide.apply(model, packs, found, *parameters), found


@cache
def _threads(count: int, share: int) -> ThreadPoolExecutor:
    """Threads of `share` cores each, the same for every step: the C library keeps what a thread has freed for that
    thread, so that new ones in each step would hold ever more memory.
    """
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,))


class _SideBySide(torch.autograd.Function):
    """Σ weight · loss over packs that are computed at once, forward and backward, each in a thread of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        model: Callable[[Pack], torch.Tensor],
        packs: Sequence[Pack],
        found: list[torch.Tensor],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        def run(packed: Pack) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]:
            losses = model(packed)  # gradients are on in a new thread
            value = weighted_sum(losses, packed)
            return losses.detach(), value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)

        threads = _threads(len(packs), max(1, torch.get_num_threads() // len(packs)))
        losses, values, gradients = zip(*threads.map(run, packs), strict=True)
        found.extend(losses)
        given = ([one for one in of_packs if one is not None] for of_packs in zip(*gradients, strict=True))
        ctx.gradients = [sum(of_packs[1:], of_packs[0]) if of_packs else None for of_packs in given]
        return torch.stack(values).sum()

    @staticmethod
    def backward(ctx: Any, *scale: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(None if gradient is None else gradient * scale[0] for gradient in gradients)


def task_sums(losses: torch.Tensor, packed: Pack) -> torch.Tensor:
    """Sum of each term's site losses (nats) and their number, [len(TASKS), 2], for the log."""
    values = torch.stack([losses.detach(), torch.ones_like(losses)], 1)
    return values.new_zeros(len(TASKS), 2).index_add_(0, packed.tasks.to(losses.device), values)
