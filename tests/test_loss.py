"""Cross-entropy at sites: equal to torch's on all logits at once, in chunks, without ever holding them all."""

from typing import Any

import pytest
import torch
from plain import CONFIGS, tiny
from torch.nn import functional as F

from derta_lib import loss
from derta_lib.errors import DertaError
from derta_lib.tree import Row, Site, pack


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "granite"])
def test_chunks_equal_one_cross_entropy(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 4)
    model = tiny(family)
    torch.manual_seed(1)
    targets = torch.randint(3, 61, (11,))
    ids = torch.randint(3, 61, (1, 11))
    with torch.no_grad():
        last = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        wanted = F.cross_entropy(model(input_ids=ids).logits[0], targets, reduction="none")
    states = last.clone().requires_grad_()
    losses = loss.cross_entropy(model, states, targets)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert states.grad is not None
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "granite"])
def test_gradients_under_a_frozen_head_are_those_of_autograd(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 6)
    monkeypatch.setattr(loss, "CACHED", 4)
    model = tiny(family).to(dtype).requires_grad_(False)
    torch.manual_seed(1)
    targets, weights, states = torch.randint(3, 61, (11,)), torch.rand(11), 3 * torch.randn(11, 32, dtype=dtype)
    mine, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    found = loss.cross_entropy(model, mine, targets)
    wanted = F.cross_entropy(loss.site_logits(model, theirs).float(), targets, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    exact = dtype == torch.float32
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5 if exact else 0.02, atol=1e-6 if exact else 0.02)


def test_a_token_without_any_probability_has_a_finite_loss() -> None:
    logits = torch.tensor([[200.0, 0.0, -50.0]])
    assert loss._become_errors(logits, torch.tensor([2])).tolist() == [250.0]
    assert logits.tolist() == [[1.0, 0.0, -1.0]]


def test_logits_of_a_chunk_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 3)
    model, sizes = tiny("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: sizes.append(logits.shape[0]))
    states = torch.randn(10, 32, requires_grad=True)
    loss.cross_entropy(model, states, torch.full((10,), 5)).sum().backward()
    assert max(sizes) == 3
    assert sum(sizes) == 20  # once forward, once again in the backward pass


def test_no_sites_no_loss_and_no_nan() -> None:
    model = tiny("llama")
    assert loss.cross_entropy(model, torch.zeros(0, 32), torch.zeros(0, dtype=torch.long)).sum().item() == 0


@pytest.mark.parametrize("largest", [60, 61])
def test_target_outside_the_head(largest: int) -> None:
    model = tiny("llama")
    if largest < CONFIGS["llama"].vocab_size:
        assert loss.cross_entropy(model, torch.zeros(1, 32), torch.tensor([largest])).isfinite().all()
    else:
        with pytest.raises(DertaError, match="61 rows"):
            loss.cross_entropy(model, torch.zeros(1, 32), torch.tensor([largest]))


def test_weights_and_sums() -> None:
    rows = [Row((3, 4, 5), (Site(0, 4, 1.0, "mle"), Site(1, 5, 1.0, "mle"), Site(1, 9, 0.25, "rto")), 2.0)]
    packed, losses = pack([rows]), torch.tensor([1.0, 2.0, 8.0])
    assert loss.weighted_sum(losses, packed).item() == 1 + 2 + 0.25 * 8
    assert loss.task_sums(losses, packed).tolist() == [[3.0, 2.0], [8.0, 1.0]]


def test_a_term_without_sites_has_no_sum() -> None:
    packed: Any = pack([[Row((3, 4), (Site(0, 4, 1.0, "mle"),), 1.0)]])
    assert loss.task_sums(torch.tensor([3.0]), packed).tolist() == [[3.0, 1.0], [0.0, 0.0]]
