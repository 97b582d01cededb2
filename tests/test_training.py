"""Training: denominators over the whole step, resumption, schedule; on a tiny random model with its own folder."""

import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain import relative
from safetensors.torch import load_file
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, TrainingArguments, get_scheduler

from derta_lib import checkpoints, loss, records, training, tree
from derta_lib.chat import chat_of
from derta_lib.corpus import concord
from derta_lib.data import Pair, Triple
from derta_lib.errors import DertaError, UsageError
from derta_lib.models import load_model, load_tokenizer
from derta_lib.records import read_json, write_json
from derta_lib.supervision import METHODS, PRESETS, Encoder, Method
from derta_lib.training import Recipe, schedule, train

RECIPE = Recipe(steps=2, triples=3, helpful=1, lora_rank=0, learning_rate=1e-3, dtype="float32", max_length=160)
CORPUS = concord(0)
TRIPLES, PAIRS = CORPUS.triples[:7], CORPUS.pairs[:9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True, scope="module")
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # packs run side by side, as on any machine with two cores
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path / "cache"))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(next(checkpoint.glob("*.safetensors")))


def change(checkpoint: Path, folder: str) -> torch.Tensor:
    """All that training changed, as one vector."""
    before, after = weights(Path(folder)), weights(checkpoint)
    return torch.cat([(after[name].float() - before[name].float()).flatten() for name in sorted(before)])


def step_gradient(folder: str, recipe: Recipe) -> torch.Tensor:
    """The gradient of a run's first step from plain forward passes, row by row, over the whole step's denominator."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoder = Encoder(chat_of(load_tokenizer(folder)), recipe.method, recipe.preset, recipe.max_length)
    examples = schedule(TRIPLES, PAIRS, recipe)
    rows = [row for example in examples for row in encoder.rows(example, f"{recipe.seed}/0/{example.id}")]
    for row in rows:
        places, targets, weights = zip(*((s.position, s.target, s.weight) for s in row.sites), strict=True)
        logs = model(torch.tensor([row.ids])).logits[0, list(places)].log_softmax(-1)
        (-logs[range(len(targets)), list(targets)] @ torch.tensor(weights)).backward()
    return gradient(model) / sum(row.count for row in rows)


def gradient(model: Any) -> torch.Tensor:
    trained = [parameter for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    return torch.cat([parameter.grad.flatten() for parameter in trained])


def watched_gradients(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Where trainings from now on put the gradient of each step; without clipping, which would hide one too long."""
    seen: list[torch.Tensor] = []

    class Watching(training.Progress):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.append(gradient(model))

    monkeypatch.setattr(training, "Progress", Watching)
    monkeypatch.setattr(training, "TrainingArguments", partial(TrainingArguments, max_grad_norm=0.0))
    return seen


@pytest.mark.parametrize(("method", "preset"), [("derta", "fixed"), ("derta", "paper"), ("harmful_prefix", "fixed")])
def test_accumulation_leaves_the_gradient_of_a_step_as_it_is(
    folder: str, method: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched_gradients(monkeypatch)
    recipe = replace(RECIPE, steps=1, method=method, preset=PRESETS[preset])
    plain = step_gradient(folder, recipe)
    for size in (1, 4, 9):
        train(folder, TRIPLES, PAIRS, replace(recipe, micro_batch=size))
        assert relative(seen[-1], plain) <= 1e-5
    train(folder, TRIPLES, PAIRS, replace(recipe, micro_batch=4, gradient_checkpointing=True))
    assert relative(seen[-1], plain) <= 1e-5
    assert len(seen) == 4


@pytest.mark.parametrize("rank", [0, 2])
def test_bfloat16_computes_nearly_the_same_gradient(folder: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly, and not quite: a run that left autocast out would be told apart."""
    seen = watched_gradients(monkeypatch)
    for dtype in ("float32", "bfloat16"):
        train(folder, TRIPLES, PAIRS, replace(RECIPE, steps=1, lora_rank=rank, dtype=dtype))
    assert 1e-4 < relative(seen[1], seen[0]) < 0.03


def test_a_triple_that_comes_again_within_a_step_is_drawn_anew(folder: str) -> None:
    """Else one triple alone would be one draw with three times the weight; micro-batches change no draw."""
    recipe = replace(RECIPE, steps=2, triples=3, helpful=0)
    encoder = Encoder(chat_of(load_tokenizer(folder)), recipe.method, recipe.preset, recipe.max_length)
    drawn = []
    for size in (1, 3):
        packs = training._Packs(schedule(TRIPLES[:1], [], recipe), encoder, replace(recipe, micro_batch=size), 1)
        drawn.append({tuple(rows) for place in range(len(packs)) for rows in packs.rows(place)})
    assert len(drawn[0]) == 6
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("processes", "size"), [(2, 2), (2, 9), (3, 1), (5, 9)])
def test_processes_leave_the_gradient_of_a_step_as_it_is(
    folder: str, tmp_path: Path, processes: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, steps=1, micro_batch=size)
    encoder = Encoder(chat_of(load_tokenizer(folder)), recipe.method, recipe.preset, recipe.max_length)
    packs = training._Packs(schedule(TRIPLES, PAIRS, recipe), encoder, recipe, processes)
    count = torch.tensor(sum(packed.count for place in range(len(packs)) for packed in packs[place]))
    arguments = training.trainer_arguments(TrainingArguments, tmp_path, recipe)
    shares = []
    for rank in range(processes):
        model = training.prepare(load_model(folder, "float32"), recipe)
        trainer = training.SiteTrainer(model, args=arguments, train_dataset=packs)
        with monkeypatch.context() as patch:
            patch.setattr(TrainingArguments, "world_size", processes)
            for place in range(rank, len(packs), processes):
                trainer.compute_loss(model, {"packs": packs[place]}, num_items_in_batch=count).backward()
        shares.append(gradient(model))
    assert len(packs) % processes == 0
    assert relative(torch.stack(shares).mean(0), step_gradient(folder, recipe)) <= 1e-5


def test_several_gpus_in_one_process_are_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(
        UsageError, match=r"CUDA_VISIBLE_DEVICES=0 .* torchrun --nproc-per-node 2 -m derta_lib.cli train"
    ):
        train(folder, TRIPLES, PAIRS, RECIPE)


@pytest.mark.parametrize("threads", [2, 3])
def test_packs_side_by_side_leave_the_gradient_as_it_is_and_runs_alike(
    folder: str, threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, seen, made = replace(RECIPE, steps=1), watched_gradients(monkeypatch), list[int]()
    plain = step_gradient(folder, recipe)
    parts, site_losses, workers = tree.parts, loss.site_losses, set[str]()

    def worked(model: Any, packed: tree.Pack) -> torch.Tensor:
        workers.add(threading.current_thread().name)
        return site_losses(model, packed)

    def counted(groups: Any, most: int) -> list[tree.Pack]:
        packs = parts(groups, most)
        made.append(len(packs))
        return packs

    before = torch.get_num_threads()
    monkeypatch.setattr(tree, "parts", counted)
    monkeypatch.setattr(loss, "site_losses", worked)
    torch.set_num_threads(threads)
    try:
        logs = []
        for attempt in range(3):
            monkeypatch.setenv("DERTA_CACHE", str(tmp_path / str(attempt)))
            logs.append(read_json(train(folder, TRIPLES, PAIRS, recipe) / "derta.json")["log"])
        assert torch.get_num_threads() == threads  # each thread's share is its own
        assert len(workers) <= threads  # kept from step to step and from run to run
    finally:
        torch.set_num_threads(before)
    assert made == [threads] * 3
    assert relative(seen[0], plain) <= 1e-5
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert logs[0] == logs[1] == logs[2]


def test_dropout_and_processes_run_one_pack_at_a_time(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    model = training.prepare(load_model(folder, "float32"), RECIPE)
    assert training.side_by_side(model) == 4
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert training.side_by_side(model) == 1
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert training.side_by_side(model) == 1


def test_a_method_of_another_composition_is_another_training(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    keys = set()
    for method in (Method(True, True, 1), Method(False, True, 1), Method(True, True, 2)):
        monkeypatch.setitem(METHODS, "mine", method)
        keys.add(training.checkpoint_key(replace(RECIPE, method="mine"), folder, TRIPLES, PAIRS))
    assert len(keys) == 3


def test_interrupted_training_gives_the_same_weights(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, steps=24, triples=1, lora_rank=4, max_length=96)
    whole = train(folder, TRIPLES, PAIRS, recipe)
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path / "second"))
    seen: list[int] = []
    on_step_end = training.Progress.on_step_end

    def dies(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen.append(state.global_step)
        if state.global_step == 22 and len(seen) == 22:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.Progress, "on_step_end", dies)
    with pytest.raises(KeyboardInterrupt):
        train(folder, TRIPLES, PAIRS, recipe)
    assert not list((tmp_path / "second" / "checkpoints").glob("*"))
    [saved] = (tmp_path / "second" / "unfinished").glob("*/checkpoint-*")
    torn = [shutil.copytree(saved, saved.with_name(f"checkpoint-{step}")) for step in (21, 100, 101, 102)]
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        (torn[0] / name).write_bytes((saved / name).read_bytes()[:-100])
    (torn[0] / "trainer_state.json").unlink()
    (torn[1] / "trainer_state.json").write_text((saved / "trainer_state.json").read_text()[:-20])
    flipped = bytearray((saved / "optimizer.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (torn[2] / "optimizer.pt").write_bytes(flipped)
    (torn[3] / checkpoints.WHOLE).unlink()
    (saved.parent / "checkpoint-old").mkdir()
    resumed = train(folder, TRIPLES, PAIRS, recipe)
    assert seen == [*range(1, 23), *range(21, 25)]  # from the last saved step, 20
    assert not any(folder.exists() for folder in torn)
    one, two = weights(whole), weights(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_json(whole / "derta.json")["cut"] == read_json(resumed / "derta.json")["cut"]
    assert not [kept for kept in (tmp_path / "second" / "unfinished").iterdir() if kept.is_dir()]


def test_a_damaged_checkpoint_is_trained_again_and_equal_ones_have_one_key(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, steps=1, lora_rank=2, max_length=96)
    made = train(folder, TRIPLES, PAIRS, recipe)
    before = {name: value.clone() for name, value in weights(made).items()}  # the file itself is mapped
    key = training.model_key(str(made))
    (made / "adapter_model.safetensors").write_bytes(b"")
    assert train(folder, TRIPLES, PAIRS, recipe) == made
    assert all(torch.equal(weights(made)[name], value) for name, value in before.items())
    card = made / "derta.json"
    write_json(card, read_json(card) | {"seconds": 1e6, "base": "elsewhere"})  # another machine's
    assert training.model_key(str(made)) == key
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path / "second"))
    assert training.model_key(str(train(folder, TRIPLES, PAIRS, recipe))) == key


def test_the_seconds_of_a_resumed_training_are_those_of_all_its_steps(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, steps=22, triples=1, lora_rank=2, max_length=96)
    clock = [0.0]
    on_step_end = training.Progress.on_step_end

    def ticks(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clock[0] += 1.0
        on_step_end(self, args, state, control, **kwargs)
        if clock[0] == 21.0:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Progress, "on_step_end", ticks)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises(KeyboardInterrupt):
        train(folder, TRIPLES, PAIRS, recipe)
    clock[0] += 1000.0  # between the two
    made = train(folder, TRIPLES, PAIRS, recipe)
    assert read_json(made / "derta.json")["seconds"] == 22


ALSO = """
import sys
sys.path.insert(0, sys.argv[1])
from test_training import ALIKE, PAIRS, TRIPLES
from derta_lib.training import train
print(train(sys.argv[2], TRIPLES, PAIRS, ALIKE))
"""
ALIKE = replace(RECIPE, steps=30, triples=1, lora_rank=2, max_length=96)


@pytest.mark.slow
def test_two_that_ask_for_the_same_training_get_the_same_checkpoint(folder: str, tmp_path: Path) -> None:
    """As two notebooks opened side by side do: one trains, the other waits and takes it."""
    cache = {"DERTA_CACHE": str(tmp_path / "both"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALSO, str(Path(__file__).parent), folder]
    both = [subprocess.Popen(command, env={**os.environ, **cache}, stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].decode().split()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    alone = train(folder, TRIPLES, PAIRS, ALIKE)
    one, two = weights(Path(said[0])), weights(alone)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in two)


def test_a_finished_run_is_not_repeated(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, steps=1, triples=1)
    made = train(folder, TRIPLES, PAIRS, recipe)
    monkeypatch.setattr(training, "load_model", None)
    assert train(folder, TRIPLES, PAIRS, recipe) == made
    card = read_json(made / "derta.json")
    assert [entry["step"] for entry in card["log"]] == [1]
    assert {"mle", "rto"} <= set(card["log"][0])
    assert card["cut"]["rows"] == 3


def test_a_few_steps_train_from_the_first(folder: str) -> None:
    made = train(folder, TRIPLES, PAIRS, replace(RECIPE, steps=1, triples=1, lora_rank=2))
    trained = weights(made)
    assert any(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)


def test_a_training_that_diverges_says_so_and_leaves_nothing(folder: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path))
    with pytest.raises(DertaError, match=r"'(mle|rto)' is (nan|inf) at step \d: .* lower learning_rate"):
        train(folder, TRIPLES, PAIRS, replace(RECIPE, steps=6, triples=1, learning_rate=1e30))
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert not [kept for kept in (tmp_path / "unfinished").iterdir() if kept.is_dir()]


def test_schedule_deals_each_example_before_any_comes_again() -> None:
    recipe = replace(RECIPE, steps=5, triples=2, helpful=1)
    order = schedule(TRIPLES, PAIRS, recipe)
    for step in range(5):
        kinds = Counter(type(example) for example in order[6 * step : 6 * step + 6])
        assert kinds == {Triple: 2, Pair: 4}
    counts = Counter(example.id for example in order if isinstance(example, Triple))
    assert len(counts) == len(TRIPLES)
    assert set(counts.values()) == {1, 2}
    assert schedule(TRIPLES, PAIRS, recipe) == order
    assert schedule(TRIPLES, PAIRS, replace(recipe, seed=1)) != order
    one_term = schedule(TRIPLES, PAIRS, replace(recipe, method="vanilla"))
    assert Counter(map(type, one_term)) == {Triple: 20, Pair: 20}


def test_nothing_to_train_on() -> None:
    with pytest.raises(UsageError, match="at least one triple"):
        schedule([], PAIRS, RECIPE)
    with pytest.raises(UsageError, match="helpful pair"):
        schedule(TRIPLES, [], RECIPE)


def test_more_processes_than_a_step_has_micro_batches(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes cannot share the 9 examples of a step in micro-batches of 1"):
        train(folder, TRIPLES, PAIRS, replace(RECIPE, micro_batch=1))


TWO = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
from test_training import PAIRS, RECIPE, TRIPLES
from derta_lib.training import train
print(train(sys.argv[2], TRIPLES, PAIRS, replace(RECIPE, micro_batch=3)))
"""


@pytest.mark.slow
def test_two_processes_change_nothing(folder: str, tmp_path: Path) -> None:
    one = train(folder, TRIPLES, PAIRS, replace(RECIPE, micro_batch=3))
    alone = change(one, folder)
    both = []
    for rank in (0, 1):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "ACCELERATE_USE_CPU": "true"}
        cache = {"DERTA_CACHE": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", TWO, str(Path(__file__).parent), folder]
        both.append(subprocess.Popen(command, env={**os.environ, **place, **meet, **cache}, stdout=subprocess.PIPE))
    said = [process.communicate(timeout=300)[0].decode().split()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert relative(change(Path(said[0]), folder), alone) <= 1e-3
    logs = [read_json(Path(place) / "derta.json")["log"] for place in (one, said[0])]
    for mine, shared in zip(*logs, strict=True):
        assert shared == pytest.approx(mine, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_last_step_that_diverges_leaves_no_checkpoint(folder: str, tmp_path, monkeypatch, rank: int) -> None:
    """Its loss was read before the step, so that only the weights tell."""
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path))
    with pytest.raises(DertaError, match=r"last step, 1, left weights that are not finite.* lower learning_rate"):
        train(folder, TRIPLES, PAIRS, replace(RECIPE, steps=1, learning_rate=1e39, lora_rank=rank))
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_checkpoints_key_holds_model_data_recipe_and_code(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(recipe: Recipe = RECIPE, model: str = folder, triples: Any = TRIPLES, pairs: Any = PAIRS) -> str:
        return training.checkpoint_key(recipe, model, triples, pairs)

    other = shutil.copytree(folder, tmp_path / "other")
    assert key(model=str(other)) == key()  # wherever it lies
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder).config).save_pretrained(other)
    keys = [
        key(),
        key(replace(RECIPE, seed=1)),
        key(triples=TRIPLES[:-1]),
        key(pairs=PAIRS[:-1]),
        key(model=str(other)),
    ]
    hashed = records.file_sha256
    deciding = ("chat", "lora", "loss", "models", "norm", "refusal", "supervision", "training", "tree")
    for name in (*deciding, "figures"):
        with monkeypatch.context() as patch:
            patch.setattr(records, "file_sha256", lambda path, name=name: name if path.stem == name else hashed(path))
            keys.append(key())
    assert keys.pop() == keys[0]  # what only draws changes no weights
    assert len(set(keys)) == len(keys) == 5 + len(deciding)


def test_the_rate_rises_for_the_warm_up_and_falls_as_half_a_cosine(tmp_path: Path) -> None:
    """One of four steps to warm up; a run in which that would be less than a step does not."""
    for steps, expected in ((4, [0, 1e-3, 0.75e-3, 0.25e-3]), (3, [1e-3, 0.75e-3, 0.25e-3])):
        recipe = replace(RECIPE, steps=steps, warmup=0.25)
        told = training.trainer_arguments(TrainingArguments, tmp_path, recipe)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        rates = get_scheduler(told.lr_scheduler_type, optimizer, told.get_warmup_steps(steps), told.max_steps)
        seen = []
        for _ in range(steps):
            seen += rates.get_last_lr()
            optimizer.step()
            rates.step()
        assert seen == pytest.approx(expected)


@pytest.mark.parametrize("asked", [False, True])
def test_layers_are_made_again_where_it_is_asked_for(tmp_path: Path, asked: bool) -> None:
    recipe = replace(RECIPE, gradient_checkpointing=asked)
    assert training.trainer_arguments(TrainingArguments, tmp_path, recipe).activation_checkpointing is asked


def test_an_adapter_does_not_hang_on_what_was_drawn_before(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, made = replace(RECIPE, steps=1, triples=1, helpful=0, lora_rank=2, max_length=64), []
    for drawn in (1, 2):
        monkeypatch.setenv("DERTA_CACHE", str(tmp_path / f"{drawn}"))
        torch.manual_seed(drawn)
        made.append(weights(train(folder, TRIPLES, [], recipe)))
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
