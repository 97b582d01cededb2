"""Trees and packs against the separate rows through each model's plain forward: loss and every gradient."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from plain import CONFIGS, VOCABULARY, relative, tiny
from torch.nn import functional as F

from derta_lib import lora, norm, tree
from derta_lib.errors import DertaError
from derta_lib.loss import site_losses, weighted_sum
from derta_lib.tree import Row, Site, pack, parts, use_tree_attention


def forest(seed: int = 0) -> list[list[Row]]:
    """Triples with one or several forks that share a system start, a row of a triple seen before, a row of its own."""
    rng = random.Random(seed)

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

    def sites(start: int, stop: int, task: str, weight: float) -> tuple[Site, ...]:
        return tuple(Site(i, rng.randrange(3, VOCABULARY), weight, task) for i in range(start, stop))

    system, groups = some(4), []
    for forks in ((0,), (2, 5), (0, 3, 7)):
        prompt, harmful = system + some(4), some(7)
        group = [Row(prompt + harmful, sites(len(prompt) - 1, len(prompt) + 6, "rto", 0.37))]
        for k in forks:
            before = prompt + harmful[:k]
            row = before + some(5)
            group.append(Row(row, sites(len(before) - 1, len(row), "mle", 1.0), 6.0))
        groups.append(group)
    known = groups[1][1]
    groups.append([Row(known.ids, sites(9, 12, "mle", 2.0), 3.0)])  # brings no token of its own
    groups.append([Row(some(9), sites(0, 9, "mle", 1.0), 9.0)])
    return groups


def plain_loss(model: Any, groups: list[list[Row]]) -> tuple[torch.Tensor, list[float]]:
    total, each = torch.zeros(()), []
    for row in (row for group in groups for row in group):
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].float()
        for site in row.sites:
            loss = F.cross_entropy(logits[site.position][None], torch.tensor([site.target]))
            total = total + site.weight * loss
            each.append(loss.item())
    return total, each


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def same(model: Any, base: Any, other: Any, other_base: Any) -> None:
    """Loss at each site, objective and every gradient of `model` as packs against `other` row by row."""
    groups = forest()
    packed = pack(groups)
    losses = site_losses(base, packed)
    total, each = plain_loss(other, groups)
    torch.testing.assert_close(losses.tolist(), each, rtol=1e-5, atol=1e-5)
    ours = weighted_sum(losses, packed)
    assert abs(ours.item() / total.item() - 1) <= 1e-5
    found, wanted = gradients(base, ours), gradients(other_base, total)
    assert found.keys() == wanted.keys()
    assert wanted
    largest = max(gradient.norm().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        # a gradient that is zero but for rounding (a key bias: softmax ignores it) has no relative error
        scale = max(gradient.norm().item(), 1e-4 * largest)
        assert (found[name] - gradient).norm().item() <= 1e-5 * scale, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_tree_equals_separate_rows(family: str, attention: str) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no SDPA for Gemma 2")
    plain, model = tiny(family, attention), tiny(family, attention)
    use_tree_attention(model)
    same(model, model, plain, plain)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_long_rows_attend_in_several_tiles(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "TILE", 3)
    plain, model = tiny(family, attention), tiny(family, attention)
    use_tree_attention(model)
    same(model, model, plain, plain)


def test_attention_on_a_gpu_may_come_in_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA's kernel for fp32 on a GPU lays its result out as [B, Q, H, d]; "meta" tensors stand in for a GPU's."""

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.empty_like(query.transpose(1, 2)).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    query, key = torch.empty(2, 6, 5, 8, device="meta"), torch.empty(2, 3, 7, 8, device="meta")
    mask = torch.empty(2, 1, 5, 7, device="meta")
    assert tree._grouped_attention((query, key, key), mask, None, 0.0).shape == (2, 5, 6, 8)


def test_both_ways_of_attention_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA as on a GPU and two products as on a CPU: heads that share keys, a mask, a scale of one's own."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (6, 3, 3))
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    mask[1, :, :, 0] = -torch.inf
    mask[1, :, 0, 0] = 0.0
    for scale in (None, 0.7):
        found = []
        for products in (True, False):
            monkeypatch.setattr(tree, "_multiplies", lambda query, products=products: products)
            found.append(tree._grouped_attention((query, key, value), mask, scale, 0.0))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_windows_matter() -> None:
    """The comparison above would notice a window that is not heeded."""
    groups = forest()
    windowed, whole = tiny("mistral"), tiny("mistral")
    whole.config.sliding_window = None
    assert abs(plain_loss(windowed, groups)[0].item() - plain_loss(whole, groups)[0].item()) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_mode(attention: str, adapters: bool, checkpointing: bool) -> None:
    """LoRA is compared with PEFT's own, gradients of norms and of a frozen head with autograd's."""
    models = []
    for ours in (True, False):
        base = model = tiny("llama", attention)
        if adapters:
            model = lora.adapted(base, 4, 8) if ours else get_peft_model(base, lora.config(4, 8))
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        models.append((model.train(), base))
    (model, base), (plain, plain_base) = models
    use_tree_attention(base)
    norm.by_hand(base)
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    same(model, base, plain, plain_base)


def logits_and_gradients(base: Any, adapt: Any) -> list[torch.Tensor]:
    """Of a next-token loss with an adapter that shows: logits, those without the adapter, the adapter's gradients."""
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    model = adapt(base)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    with torch.autocast("cpu", torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        logits = model(input_ids=ids).logits.float()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad(), model.disable_adapter():
        without = model(input_ids=ids).logits.float()
    assert (logits - without).abs().max() > 0.1
    return [logits, without, *(p.grad for p in model.parameters() if p.requires_grad)]


def pefts(base: Any) -> Any:
    return get_peft_model(base, lora.config(4, 8))


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo"])
def test_lora_in_one_output_is_pefts(family: str) -> None:
    """qwen2 has biases; olmo writes into what its layers return."""
    found, wanted = (logits_and_gradients(tiny(family), adapt) for adapt in (lambda m: lora.adapted(m, 4, 8), pefts))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo"])
def test_lora_in_bfloat16_is_as_exact_as_pefts(family: str) -> None:
    """Under autocast, as it is trained: both are compared with the same weights in float32."""
    bases = [tiny(family).to(torch.bfloat16) for _ in range(3)]
    exact = logits_and_gradients(bases[0].float(), pefts)
    found, usual = (
        logits_and_gradients(bases[1], lambda m: lora.adapted(m, 4, 8)),
        logits_and_gradients(bases[2], pefts),
    )
    assert [each.dtype for each in found] == [each.dtype for each in usual]
    right, mine, theirs = (
        torch.cat([each.flatten() for each in tensors]) for tensors in (exact[2:], found[2:], usual[2:])
    )
    assert torch.linalg.norm(theirs - right) < 0.1 * torch.linalg.norm(right)
    assert torch.linalg.norm(mine - right) <= 1.5 * torch.linalg.norm(theirs - right)
    assert torch.linalg.norm(found[0] - exact[0]) <= 1.5 * torch.linalg.norm(usual[0] - exact[0])


BY_HAND = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "granite"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_norms_by_hand_are_the_models_own(family: str, dtype: torch.dtype) -> None:
    """Forward to the last bit; gradients as far from those in float64 as autograd's are, or rounding in float32."""
    model = tiny(family)
    norms = {
        name: module for name, module in model.named_modules() if name.endswith("norm") and hasattr(module, "weight")
    }
    draw = torch.Generator().manual_seed(0)
    for module in norms.values():
        torch.nn.init.normal_(module.weight, 1.0, 0.3, generator=draw)
    own, mine = model.to(dtype), copy.deepcopy(model)
    norm.by_hand(mine)
    changed = {name for name in norms if "forward" in vars(mine.get_submodule(name))}
    assert changed == (set(norms) if family in BY_HAND else set())
    for name in changed:
        module = own.get_submodule(name)
        x, up = (torch.randn(2, 5, *module.weight.shape, generator=draw).to(dtype) for _ in range(2))
        results = []
        for forward in (module, mine.get_submodule(name)):
            states = x.clone().requires_grad_()
            output = forward(states)
            results.append((output, *torch.autograd.grad(output, (states, forward.weight), up)))
        assert torch.equal(results[0][0], results[1][0])
        states, weight = x.double().requires_grad_(), module.weight.detach().double().requires_grad_()
        exact = F.rms_norm(states, weight.shape, weight, module.variance_epsilon)
        for usual, ours, right in zip(
            *(r[1:] for r in results), torch.autograd.grad(exact, (states, weight), up.double()), strict=True
        ):
            assert ours.dtype == usual.dtype
            assert relative(ours.double(), right) <= max(1e-6, 1.2 * relative(usual.double(), right))


def test_shared_starts_are_computed_once_and_packs_have_no_padding() -> None:
    groups = forest()
    starts = {row.ids[: i + 1] for group in groups for row in group for i in range(len(row.ids))}
    packed = pack(groups)
    assert len(packed.ids) == len(starts)
    assert packed.count == sum(row.count for group in groups for row in group)
    for row, path in zip((row for group in groups for row in group), packed.paths, strict=True):
        assert packed.ids[torch.from_numpy(path)].tolist() == list(row.ids)
        assert packed.positions[torch.from_numpy(path)].tolist() == list(range(len(row.ids)))


@pytest.mark.parametrize("tile", [1, 3, 256])
def test_each_token_sees_its_ancestors_alone(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "TILE", tile)
    packed = pack(forest())
    np.testing.assert_array_equal(packed.queries[packed.order], np.arange(len(packed.ids)))
    assert sorted([*packed.order.tolist(), *packed.padding.tolist()]) == list(range(len(packed.queries)))
    blocks = packed.keys.split([len(mask) * mask.shape[2] for mask in packed.masks])
    places = [
        known[where == 0] for keys, mask in zip(blocks, packed.masks, strict=True)
        for known, tile in zip(keys.view(len(mask), -1), mask, strict=True) for where in tile
    ]  # fmt: skip
    seen = np.zeros((len(packed.ids), len(packed.ids)), dtype=bool)
    for token, place in enumerate(packed.order):
        seen[token, places[place]] = True
    wanted = np.zeros_like(seen)
    for path in packed.paths:
        for depth, token in enumerate(path):
            wanted[token, path[: depth + 1]] = True
    np.testing.assert_array_equal(seen, wanted)


def test_order_of_groups_changes_nothing() -> None:
    model = tiny("llama")
    use_tree_attention(model)
    groups = forest()
    other = copy.copy(groups)
    random.Random(1).shuffle(other)
    one, two = (weighted_sum(site_losses(model, p), p) for p in (pack(groups), pack(other)))
    assert relative(two, one) <= 1e-6


def test_what_cannot_be_served_is_refused() -> None:
    from transformers import AutoModelForCausalLM, BloomConfig, Llama4TextConfig, MambaConfig, Qwen3NextConfig

    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    chunked = Llama4TextConfig(
        **shape, intermediate_size=32, intermediate_size_mlp=32, num_key_value_heads=2, head_dim=8, num_local_experts=2,
        attention_chunk_size=4,
    )  # fmt: skip
    linear = Qwen3NextConfig(
        **shape, intermediate_size=32, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    bloom = BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    mamba = MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)
    for config in (chunked, linear, bloom, mamba):
        with pytest.raises(DertaError, match=config.model_type):
            use_tree_attention(AutoModelForCausalLM.from_config(config))


def test_parts_hold_all_groups_once_and_are_of_like_size() -> None:
    groups = [[Row(tuple(range(n)), (), 1.0)] for n in (9, 30, 8, 31, 7, 10)]
    assert parts(groups, 1)[0].count == 6
    found = parts(groups, 2)
    assert sorted(len(path) for packed in found for path in packed.paths) == [7, 8, 9, 10, 30, 31]
    sizes = [sum(map(len, packed.paths)) for packed in found]
    assert max(sizes) - min(sizes) <= 7
    assert [len(parts(groups, most)) for most in (1, 2, 3, 4, 9)] == [1, 2, 3, 3, 3]
    assert len(parts(groups[:1], 4)) == 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("phimoe", "a pack changes"),  # its window is in the mask alone
        ("doge", "a pack changes"),  # so is its
        ("diffllama", "a pack changes"),  # attends twice a layer, so that a step of generation finds other keys
        ("bert", "a pack changes"),  # sees what comes later
        ("nemotron", "take no packs"),  # its layers do not hand on what attention is told
    ],
)
def test_what_the_configuration_does_not_tell_is_found_by_trying(kind: str, said: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape |= {"initializer_range": 0.2}
    if kind != "bert":
        shape |= {"num_key_value_heads": 2}
    if kind in ("phimoe", "doge"):
        shape |= {"sliding_window": 6}
    torch.manual_seed(0)
    with pytest.raises(DertaError, match=f"'{kind}' use .*{said}"):
        use_tree_attention(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)))


def test_trying_a_model_leaves_it_in_its_mode_and_plain_use_is_a_sentence() -> None:
    model = tiny("llama").train()
    use_tree_attention(model)
    assert model.training
    with pytest.raises(DertaError, match=r"without a pack: .* load it once more"):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    broken = tiny("llama")
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    broken.model.norm.weight.data.fill_(torch.nan)
    use_tree_attention(broken)  # NaN has a sentence of its own where answers are read


def test_attention_both_ways_is_refused_and_a_full_device_is_no_foreign_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    both = tiny("gemma3")
    both.config.use_bidirectional_attention = True
    with pytest.raises(DertaError, match="'gemma3_text' use bidirectional attention"):
        use_tree_attention(both)

    def full() -> None:
        raise torch.OutOfMemoryError("no room")

    model = tiny("llama")
    monkeypatch.setattr(model, "get_decoder", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        use_tree_attention(model)


def test_longrope_alone_shortens_the_context() -> None:
    """Other rules stretch the frequencies the same way for every row, so that Llama 3.1 takes all of its context."""
    model = tiny("llama")
    rule = {"rope_type": "llama3", "original_max_position_embeddings": 64}
    for name, most in (("llama3", 256), ("yarn", 256), ("longrope", 64)):
        model.config.rope_parameters = rule | {"rope_type": name}
        tree.check_length(model, most)
        with pytest.raises(DertaError, match=f"row of {most + 1} tokens is longer than the {most} that"):
            tree.check_length(model, most + 1)
