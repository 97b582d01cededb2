"""The bench compares like with like: same objective, same answers, FLOPs by an independent count, a whole small run."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_folder
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from derta_lib import lora, loss, training, tree
from derta_lib.errors import UsageError
from derta_lib.generation import LocalTarget, generate
from derta_lib.models import load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench, contenders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tiny_folder(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "REFERENCE", path)
        patch.setattr(bench, "REFERENCE", path)
        yield path
    torch.set_num_threads(threads)


def test_the_authors_computation_and_ours_have_one_objective(folder):
    work = contenders.corpus_work(3)
    theirs = get_peft_model(
        load_model(folder, "float32"), lora.config(contenders.RECIPE.lora_rank, contenders.RECIPE.lora_alpha)
    )
    mine = training.prepare(load_model(folder, "float32"), contenders.RECIPE)
    with torch.no_grad():  # LoRA starts at zero, where half of its gradients vanish
        for number, (a, b) in enumerate(zip(theirs.parameters(), mine.parameters(), strict=True)):
            if a.requires_grad:
                drawn = torch.randn(a.shape, generator=torch.Generator().manual_seed(number)) / 10
                a.copy_(drawn)
                b.copy_(drawn)
    rows = [row for each in work for row in each.paper]
    expected = contenders.authors_loss(theirs, *contenders.authors_batch(rows))
    packed = tree.pack([list(each.paper) for each in work])
    found = loss.weighted_sum(mine(packed), packed) / packed.count
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found.backward()
    for a, b in zip(theirs.parameters(), mine.parameters(), strict=True):
        if a.requires_grad:
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_trl_trains_the_mle_rows(folder):
    work = contenders.corpus_work(3)
    rows = [each.paper[0] for each in work]
    mine = training.prepare(load_model(folder, "float32"), contenders.RECIPE)
    expected = mine(tree.pack([[row] for row in rows])).mean().item()
    assert contenders.trl(load_model(folder), work)() == pytest.approx(expected, rel=0.01)


def test_contenders_share_weights_and_nothing_else(folder):
    base = load_model(folder, "float32")
    mine = training.prepare(contenders.twin(base), contenders.RECIPE)
    assert {id(weight) for weight in base.parameters()} < {id(weight) for weight in mine.parameters()}
    assert base.config._attn_implementation == "sdpa"
    assert not any("lora" in name for name, _ in base.named_modules())


def test_sizes_by_hand():
    query, harmful, safe = (1, 2), (3, 4, 5, 6), (7, 8)
    mle = tree.Row((*query, *harmful[:2], *safe), (tree.Site(3, 7, 1.0, "mle"),), 1)
    rto = tree.Row((*query, *harmful), (tree.Site(1, 9, 1.0, "rto"), tree.Site(2, 9, 1.0, "rto")), 2)
    work = [contenders.Work((mle, rto), (mle, rto))]
    assert contenders.size_of("authors", work) == contenders.Size(12, 21 + 21, 3)
    assert contenders.size_of("trl", work) == contenders.Size(6, 21, 1)
    # q and r̂ (6 tokens), and r at depths 4 and 5 behind q and r̂_{<2}
    assert contenders.size_of("ours", work) == contenders.Size(8, 21 + 5 + 6, 3)


def test_flops_agree_with_torchs_counter(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None])
    counts = counter.get_flop_counts()["Global"]
    head = 2 * tokens * model.config.vocab_size * model.config.hidden_size
    linear = counts[torch.ops.aten.mm] - head if torch.ops.aten.mm in counts else None
    needed = contenders.flops(model, contenders.Size(tokens, 0, 0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        get_peft_model(model, lora.config(contenders.RECIPE.lora_rank, contenders.RECIPE.lora_alpha))(
            torch.arange(tokens)[None]
        )
    adapters = counter.get_flop_counts()["Global"][torch.ops.aten.mm] - head - linear
    assert needed == 2 * linear + 3 * adapters
    assert contenders.flops(model, contenders.Size(0, 0, tokens)) == 2 * head


def test_static_batches_and_ours_give_the_same_answers(folder):
    target = LocalTarget(load_model(folder, "float32"), load_tokenizer(folder), "tiny")
    prompts = bench.attack_prompts(target, 3)
    assert len(prompts) == 36 > bench.STATIC_BATCH
    plain = load_model(folder, "float32")
    assert generate(target.model, prompts, 5, target.stops) == bench.static_batches(plain, prompts, 5, target.stops)


def test_a_whole_run_is_written_with_its_machine(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LENGTHS", (8, 16))
    monkeypatch.setitem(bench.COUNTS, "cpu", (1, 2))
    monkeypatch.setattr(bench, "memory", lambda *_: {})
    monkeypatch.setattr(
        bench, "matrix_product", lambda _: (lambda: torch.randn(64, 64) @ torch.randn(64, 64), 2 * 64**3)
    )
    options = {"model": folder, "triples": 2, "rounds": 1, "crafts": 1, "new_tokens": 2}
    found = bench.bench(tmp_path / "bench.json", **options)
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["numbers"].keys() == found.keys()
    assert {"date", "machine", "request", "seconds"} <= kept.keys()
    assert all(number["value"] >= 0 for number in kept["numbers"].values())
    assert "train/ours/times_authors" in capsys.readouterr().out
    flops = contenders.flops(load_model(folder), contenders.size_of("ours", contenders.corpus_work(2)))
    for part, step in (("train", "ours"), ("scaling", "triples-2")):  # each against the peak of its own rounds
        peak = 2 * 64**3 / min(kept["seconds"][f"{part}/matrix product"])
        share = flops / statistics.median(kept["seconds"][f"{part}/{step}"]) / peak
        assert kept["numbers"][f"{part}/{step}/peak_share"]["value"] == pytest.approx(share)


def test_a_device_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UsageError, match="--device tpu: it is not here"):
        bench.bench(tmp_path / "bench.json", device="tpu")


@pytest.mark.parametrize("harmful", bench.LENGTHS)
def test_synthetic_triples_have_one_share_of_sites_whatever_their_length(harmful):
    (work,) = contenders.synthetic_work(1, harmful)
    size = contenders.size_of("ours", [work])
    assert size.tokens == contenders.synthetic_tokens(harmful)
    assert size.sites / size.tokens == pytest.approx(0.35, abs=0.005)
    places = [site.position for site in work.paper[1].sites]
    assert len(set(places)) == len(places)
    assert min(places) == 19
    assert max(places) < 19 + harmful
