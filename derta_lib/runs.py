"""Run folders: what each notebook found (`results.json`) and how it was made (`manifest.json`).

A run is a folder `runs/<name>/`. Each notebook owns one file in `parts/`, written whole at every change, so that a
notebook run again replaces its own numbers and nobody else's; `merge` joins the parts.
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from derta_lib import results
from derta_lib.display import Shown, show_figure, show_table
from derta_lib.errors import DertaError, UsageError
from derta_lib.models import precision
from derta_lib.params import check_values
from derta_lib.records import file_sha256, read_json, write_json, write_text
from derta_lib.results import Number, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

PACKAGES = ("derta-lib", "torch", "transformers", "peft", "trl", "numpy", "scipy", "matplotlib", "papermill")
"""Packages whose versions a manifest names and a cached notebook depends on."""

_IN_PARTS = ("results", "items", "shown")  # kept out of the manifest
_KEPT = {"notebook", "parameters", "records", "results", "items"}
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")


@dataclass
class Run:
    """One notebook's hold on a run folder; made by `open_run`."""

    notebook: str
    folder: Path
    parameters: dict[str, Any]
    environment: dict[str, Any]
    started: str
    numbers: Results = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
    _clock: float = field(default_factory=time.monotonic)

    def put(self, key: str, number: Number, items: Mapping[str, float] | None = None) -> Number:
        """Keep `number` under `key` (`asr/derta/prefilling-16`) and return it, so that a cell can show it.

        `items` are the outcomes behind it by item id (0 or 1 for a rate): with them two runs are compared item by item.
        """
        if not _KEY.fullmatch(key):
            raise DertaError(f"result key '{key}': use letters, digits and . _ - + between slashes.")
        if number.value != number.value:
            raise DertaError(f"result '{key}' is not a number (NaN); nothing was measured, so leave it out.")
        self.numbers[key] = number
        if items is not None:
            self.items[key] = {name: float(value) for name, value in items.items()}
        self._save()
        return number

    def record(self, key: str, value: Any) -> None:
        """Keep a fact for the manifest: a count of rows left out, a device. `value` is plain JSON."""
        self.records[key] = value
        self._save()

    def figure(self, name: str, figure: "Figure", data: "DataFrame") -> Shown:
        """Save `figures/<name>.svg` and `.csv` (the data drawn) and show the figure with a link to the data.

        The figure's label says what it shows (`derta_lib.figures` gives each its own).
        """
        from matplotlib import pyplot

        from derta_lib.style import svg

        drawing, csv = svg(figure), data.to_csv(index=False)
        pyplot.close(figure)  # so that the inline backend does not show it a second time
        check_name("figures", name)
        path = write_text(self.folder / "figures" / f"{name}.svg", drawing)
        write_text(path.with_suffix(".csv"), csv)
        self.shown.append(f"figure-{name}")
        self._save()
        return show_figure(drawing, csv, name, str(figure.get_label()))

    def table(self, name: str, data: "DataFrame", caption: str) -> Shown:
        """Save `tables/<name>.csv` and show the frame (without its index) with a link to the data.

        The page names methods, attacks and columns in words; a number and its unit, and an n, stay on one line.
        """
        from derta_lib.style import in_words

        csv = data.to_csv(index=False)
        check_name("tables", name)
        write_text(self.folder / "tables" / f"{name}.csv", csv)
        named = {column: data[column].map(in_words) for column in ("method", "against", "attack") if column in data}
        shown = data.assign(**named).rename(columns=lambda column: in_words(column).replace("_", " "))
        table = shown.to_html(index=False, border=0, escape=True, na_rep="–")
        self.shown.append(f"table-{name}")
        self._save()
        return show_table(typeset(table), csv, name, caption)

    def _save(self) -> None:
        kept = ("notebook", "parameters", "environment", "started", "records", "items", "shown")
        part = {name: getattr(self, name) for name in kept}
        part["seconds"] = round(time.monotonic() - self._clock, 1)
        part["results"] = {key: asdict(number) for key, number in self.numbers.items()}
        write_json(self.folder / "parts" / f"{self.notebook}.json", part)


def typeset(text: str) -> str:
    """Numbers as a page shows them: a minus sign for a hyphen, and no break within an interval, at a unit or an n."""
    text = re.sub(r"(?<![\w.,-])-(?=[\d.])", "\N{MINUS SIGN}", text)
    unbroken = r"(?<=\d) (?=%|points\b)|(?<=\bn) (?==)|(?<=\bn =) (?=\d)|(?<=\d,) (?=[\d\N{MINUS SIGN}.]+\])"
    return re.sub(unbroken, "\N{NO-BREAK SPACE}", text)


def open_run(notebook: str, run_dir: str, parameters: dict[str, Any]) -> Run:
    """Begin `notebook`'s part of a run, dropping what an earlier execution of the same notebook left there.

    `run_dir` is the run's folder; "" means one of the notebook's own, `runs/<notebook>` under the checkout (or the
    working directory, where there is no checkout). The files of the folder that the parameter `data` names are recorded
    with their SHA-256. Raises UsageError for a parameter of another type than the notebook's parameters cell declares.
    """
    check_name("notebook", notebook)
    check_values(parameters, getattr(sys.modules["__main__"], "__annotations__", {}))
    folder = Path(run_dir) if run_dir else project_root() / "runs" / notebook
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(notebook, folder.resolve(), dict(parameters), environment(), started)
    if parameters.get("data"):  # by content, so that runs on other data are not compared
        files = sorted(Path(parameters["data"]).expanduser().glob("*.jsonl"))
        run.records = {f"sha256/{path.name}": file_sha256(path) for path in files}
    run._save()
    return run


def check_name(kind: str, name: str) -> None:
    """Raise UsageError unless `name` can be part of a file's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{kind} name '{name}': use letters, digits, dots, dashes and underscores.")


def project_root() -> Path:
    """The checkout around the working directory (the folder with `_toc.yml`), else the working directory itself."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "_toc.yml").exists()), here)


def kept_items(folder: Path) -> dict[str, dict[str, float]]:
    """Outcomes by item for each key of a run that was put with them."""
    return {key: items for part in _parts(folder) for key, items in part["items"].items()}


def _parts(folder: Path) -> list[dict[str, Any]]:
    """What the notebooks of a run have left; DertaError for a file that no notebook has written."""
    parts = []
    for path in sorted((folder / "parts").glob("*.json")):
        part = read_json(path)
        whole = isinstance(part, dict) and part.keys() >= _KEPT and isinstance(part["notebook"], str)
        if not whole or not all(isinstance(part[name], dict) for name in ("parameters", "records", "results", "items")):
            raise DertaError(f"{path}: this is not what a notebook leaves of a run; make the run again.")
        parts.append(part)
    return parts


def merge(folder: Path) -> tuple[Results, dict[str, Any]]:
    """Join the parts of a run into `results.json` and `manifest.json`; returns both.

    Two notebooks may put the same key when they measured the same. Raises DertaError when they did not, and when
    there are no parts.
    """
    parts = _parts(folder)
    if not parts:
        raise DertaError(f"{folder}: no notebook has run here; make the run with `derta book --name {folder.name}`.")
    owner: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for part in parts:
        for key, number in part["results"].items():
            if key in owner and merged[key] != number:
                raise DertaError(
                    f"result '{key}' differs between {owner[key]} and {part['notebook']}; "
                    "give both the same parameters."
                )
            owner.setdefault(key, part["notebook"])
            merged[key] = number
    manifest = {
        "name": folder.name,
        "notebooks": {part.pop("notebook"): {k: v for k, v in part.items() if k not in _IN_PARTS} for part in parts},
        "results_from": owner,
    }
    write_json(folder / "manifest.json", manifest)
    return results.load(write_json(folder / "results.json", merged)), manifest  # last: it makes the two count


@cache
def environment() -> dict[str, Any]:
    """Where a notebook runs: git state of the library's checkout, versions, hardware, threads."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name(0) if torch and torch.cuda.is_available() else None
    return {
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "precision": precision() if torch else None,
        "gpu": gpu,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Installed versions of `PACKAGES`; None for one that is missing."""
    return {name: next((found.version for found in distributions(name=name)), None) for name in PACKAGES}


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of the checkout around `folder` and whether it has uncommitted changes; `sha` None outside one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # a library installed somewhere below another repository is none of its files
    sha = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", ".") is not None else None
    return {"sha": sha, "dirty": bool(git("status", "--porcelain")) if sha else None}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
