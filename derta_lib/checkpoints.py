"""Where checkpoints lie: a finished one is made once for the same inputs, a stopped training goes on from its last."""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from derta_lib.models import REFERENCE, is_whole, resolve
from derta_lib.records import cache_dir, folder_hashes, read_json, write_json

WHOLE = "whole.json"
"""Written last into what a stopped training goes on from: the hashes of its files."""


def processes() -> int:
    """Processes that share this training, as torchrun and accelerate tell them."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def made_once(name: str, key: str, model: str, make: Callable[[Path, Path, dict[str, Any]], None]) -> Path:
    """The folder of a checkpoint trained from `model`. Unless it is there and whole, `make` makes it, given the folder,
    that of what an interrupted run left, and the card's beginning.

    Of several processes that ask for the same one trains, and the others wait (those of one training work together).
    The adapter of a finished checkpoint is made to stand on `model`, which may have moved since.
    """
    folder = cache_dir() / "checkpoints" / f"{name}-{key}"
    base = model if model == REFERENCE else resolve(model)  # a name that means the same in any working directory
    if not is_whole(folder):
        work = cache_dir() / "unfinished" / key
        work.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{work}.lock") if processes() == 1 else nullcontext():
            if not is_whole(folder):
                make(folder, work, {"key": key, "base": base})
    adapter = folder / "adapter_config.json"
    if adapter.exists() and (config := read_json(adapter)).get("base_model_name_or_path") != base:
        write_json(adapter, config | {"base_model_name_or_path": base})
    return folder


def seal(saved: Path) -> None:
    """Mark what a stopped training goes on from as whole."""
    write_json(saved / WHOLE, {"files": folder_hashes(saved)})


def last_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint under `work`; one that a killed run left half-written, or that was damaged since, is
    deleted.
    """
    saved = {int(step): folder for folder in work.glob("checkpoint-*") if (step := folder.name[11:]).isdecimal()}
    for _, folder in sorted(saved.items(), reverse=True):
        if is_whole(folder, WHOLE):
            return str(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return None
