"""The book: notebooks executed with checked parameters, then pages built with warnings as errors.

A run folder holds `notebooks/` (executed), `unfinished/` (one that stopped, for inspection), `parts/`, `results.json`,
`manifest.json`, `figures/`, `stage/` (a mirror of the repository that Sphinx reads), `colab/` and `html/`.
"""

import html
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import nbformat
import yaml

from derta_lib import pages
from derta_lib.errors import DertaError, UsageError
from derta_lib.models import model_key, precision
from derta_lib.params import RUN_DIR, Parameter, Value, parse_settings, read_parameters, read_profile, resolve
from derta_lib.records import content_key, file_sha256, library_files, read_json, write_json, write_text
from derta_lib.runs import check_name, merge, versions

CELL_TIMEOUT = 4 * 3600  # seconds
INSTALL_LINE = 'source = os.environ.get("DERTA_SOURCE", "")'  # of the first cell; a published copy knows its repository
_LIBRARY = Path(__file__).parent
_PAGES_ONLY = ("claims", "bench_", "sphinx_", "book", "pages", "cli", "compare")


def build_book(root: Path, profile: str, settings: Sequence[str], name: str) -> Path:
    """Execute the notebooks of the checkout `root` as run `name` and build its pages; returns the start page.

    Notebooks whose source, parameters, data and library are unchanged are not executed again. Raises UsageError,
    before anything is executed, for a bad name, profile or parameter, and DertaError (one sentence) for a failed cell
    or a page that does not build.
    """
    check_name("profile", profile)
    check_name("run", name)
    notebooks = chapters(root)
    chosen = read_profile(root / "notebooks" / "profiles" / f"{profile}.yaml")
    parameters = resolve(notebooks, chosen, parse_settings(settings))
    folder = root / "runs" / name
    due = [n.stem for n in notebooks if not _is_executed(n, folder, _execution_key(n, parameters[n.stem], root))]
    if due:
        from derta_lib.experiment import check_parameters  # takes seconds to load, which a change of prose does without

        for stem in due:
            check_parameters(parameters[stem])
    pages.check_numbers([*sorted((root / "book").rglob("*.md")), *notebooks])
    for number, notebook in enumerate(notebooks, start=1):
        execute(notebook, parameters[notebook.stem], folder, f"{number}/{len(notebooks)}")
    for part in (folder / "parts").glob("*.json"):
        if part.stem not in parameters:
            part.unlink()  # of a notebook that has left the book
    merge(folder)
    stage(root, folder, notebooks)
    return build_pages(folder)


def chapters(root: Path) -> list[Path]:
    """Notebooks of the table of contents, in order; DertaError for one that does not exist."""
    toc = root / "_toc.yml"
    if not toc.exists():
        raise UsageError(f"{root} is not a checkout of the companion (it has no _toc.yml); run this command in one.")
    listed = re.findall(r"file:\s*(notebooks/\S+)", toc.read_text(encoding="utf-8"))
    found = [root / entry if entry.endswith(".ipynb") else root / f"{entry}.ipynb" for entry in listed]
    for notebook in found:
        if not notebook.exists():
            raise DertaError(f"_toc.yml lists {notebook.relative_to(root)}, which does not exist.")
    return found


def execute(notebook: Path, parameters: Mapping[str, Value], folder: Path, progress: str = "") -> None:
    """Run one notebook into `folder`, unless it was run before from the same inputs.

    The working directory is the checkout, so relative paths in parameters are relative to it. Raises DertaError naming
    notebook, cell and exception; what ran until then is kept in `unfinished/`.
    """
    import papermill
    from nbclient.exceptions import CellControlSignal

    stem, root = notebook.stem, notebook.parents[1]
    declared = read_parameters(notebook)
    key = _execution_key(notebook, parameters, root)
    executed, part_path = folder / "notebooks" / notebook.name, folder / "parts" / f"{stem}.json"
    if _is_executed(notebook, folder, key):
        print(f"[{progress}] {stem}: unchanged", flush=True)
        return
    print(f"[{progress}] {stem}: executing", flush=True)
    unfinished = folder / "unfinished" / notebook.name
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    for stale in (executed, part_path):
        stale.unlink(missing_ok=True)
    given = {name: value for name, value in parameters.items() if value != declared[name].default}
    given[RUN_DIR] = os.path.relpath(folder, root)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # the kernel of this interpreter, not one a user has registered
    begun = time.monotonic()
    try:
        papermill.execute_notebook(
            notebook,
            unfinished,
            given,
            kernel_name="python3",
            language="python",
            cwd=root,
            progress_bar=sys.stderr.isatty(),
            execution_timeout=CELL_TIMEOUT,
            start_timeout=300,
            extra_arguments=["--log-level=CRITICAL"],
        )
    except papermill.PapermillExecutionError as error:
        raise DertaError(
            f"{notebook.name}, cell [{error.exec_count}] (number {error.cell_index} of the file) failed with "
            f"{error.ename}: {' '.join(error.evalue.split())[:500]}; what ran is kept in {unfinished}."
        ) from None
    except (CellControlSignal, RuntimeError) as error:  # RuntimeError: the kernel died or never answered
        reason = " ".join(str(error).split())[:300]
        raise DertaError(f"{notebook.name} stopped ({reason}); what ran is kept in {unfinished}.") from None
    check_executed(unfinished)
    if not part_path.exists():
        raise DertaError(f"{notebook.name} never calls open_run('{stem}', run_dir, parameters), so it left no results.")
    part, page = read_json(part_path), unfinished.read_text(encoding="utf-8")
    if lost := [name for name in part["shown"] if f'id=\\"{name}\\"' not in page]:
        raise DertaError(f"{notebook.name}: no cell shows {lost[0]}; let a cell end with it.")
    part |= {
        "key": key,
        "seconds": round(time.monotonic() - begun, 1),
        "declared": {n: [p.default, parameters[n]] for n, p in declared.items() if n != RUN_DIR},
    }
    executed.parent.mkdir(exist_ok=True)
    unfinished.replace(executed)
    write_json(part_path, part)  # last: its key is what makes the execution count


def check_executed(notebook: Path) -> None:
    """Raise DertaError naming the first code cell that never ran or failed."""
    for index, cell in enumerate(read_json(notebook)["cells"]):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        if cell["execution_count"] is None:
            raise DertaError(f"{notebook.name}, cell number {index} never ran; the book shows executed notebooks only.")
        if failed := [output for output in cell["outputs"] if output["output_type"] == "error"]:
            raise DertaError(f"{notebook.name}, cell number {index} failed with {failed[0]['ename']}.")


def _is_executed(notebook: Path, folder: Path, key: str) -> bool:
    """Was the notebook run from the inputs of `key`? One whose part is missing or damaged runs again."""
    try:
        made_from = read_json(folder / "parts" / f"{notebook.stem}.json")["key"]
    except (DertaError, KeyError, TypeError):
        return False
    return made_from == key and (folder / "notebooks" / notebook.name).exists()


def _execution_key(notebook: Path, parameters: Mapping[str, Value], root: Path) -> str:
    cells = [["".join(cell["source"]), cell["cell_type"]] for cell in read_json(notebook)["cells"]]
    code = {str(path.relative_to(_LIBRARY)): file_sha256(path) for path in executed_files()}
    used = {name: value for name, value in parameters.items() if name != RUN_DIR}
    with chdir(root):  # where the notebooks run, so that a relative path is the same folder
        data = {
            name: model_key(value) if name == "model" else _listing(Path(value).expanduser())
            for name, value in used.items()
            if isinstance(value, str) and value
        }
    return content_key(cells, used, data, code, versions(), precision())


def executed_files() -> list[Path]:
    """Files of the library that a notebook may depend on: all but those that only make pages."""
    return [path for path in library_files() if not path.stem.startswith(_PAGES_ONLY)]


def _listing(path: Path) -> list[Any]:
    """Names, sizes and times of the files a parameter points at (a data folder); [] if it is no path."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    return [[str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]


def stage(root: Path, folder: Path, notebooks: Sequence[Path]) -> None:
    """Bring `folder/stage` up to date with pages, executed notebooks and results; unchanged files stay untouched."""
    wanted: dict[str, bytes] = {
        "_config.yml": derived_config(root).encode(),
        "_toc.yml": (root / "_toc.yml").read_bytes(),
        **{name: (folder / name).read_bytes() for name in ("results.json", "manifest.json")},
    }
    for path in (root / "book").rglob("*"):
        if path.is_file():
            base = root / "book" if "_static" in path.parts else root
            wanted[path.relative_to(base).as_posix()] = path.read_bytes()
    if (explorer := folder / "explorer.js").exists():
        wanted["_static/explorer-data.js"] = explorer.read_bytes()
    for notebook in notebooks:
        page = published_notebook(folder / "notebooks" / notebook.name, read_parameters(notebook), folder)
        wanted[f"notebooks/{notebook.name}"] = page.encode()
    for name, content in wanted.items():
        path = folder / "stage" / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in (folder / "stage").rglob("*"):
        old = path.relative_to(folder / "stage")
        if path.is_file() and path.name != "conf.py" and old.as_posix() not in wanted:
            path.unlink()
            (folder / "html" / old).with_suffix(".html").unlink(missing_ok=True)
    for notebook in notebooks:  # what the Colab button opens: not executed, and knowing where to install from
        write_text(folder / "colab" / "notebooks" / notebook.name, colab_notebook(notebook.read_text(encoding="utf-8")))


def derived_config(root: Path) -> str:
    """`_config.yml` with repository buttons for the repository that the CI environment names; none elsewhere."""
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        branch = os.environ.get("GITHUB_HEAD_REF") or os.environ.get("GITHUB_REF_NAME", "main")
        config["repository"] = {"url": f"{server}/{repository}", "branch": branch}
        config["launch_buttons"] = {"colab_url": "https://colab.research.google.com"}
        config["html"] |= {"use_repository_button": True, "use_issues_button": True, "use_edit_page_button": True}
    return yaml.safe_dump(config, allow_unicode=True, sort_keys=False)


def colab_notebook(source: str) -> str:
    """A notebook's JSON with the address of the repository being built in its first cell; unchanged outside CI."""
    if not (repository := os.environ.get("GITHUB_REPOSITORY")):
        return source
    server, sha = os.environ.get("GITHUB_SERVER_URL", "https://github.com"), os.environ.get("GITHUB_SHA", "main")
    line = INSTALL_LINE.replace('""', f'"git+{server}/{repository}@{sha}"')
    return source.replace(INSTALL_LINE.replace('"', r"\""), line.replace('"', r"\""))


def published_notebook(executed: Path, declared: Mapping[str, Parameter], folder: Path) -> str:
    """An executed notebook as its page: parameter cells hidden behind one table, default → used; no local paths."""
    check_executed(executed)  # an unchanged one may have been edited since it ran
    notebook = nbformat.read(executed, as_version=4)
    used = read_json(folder / "parts" / f"{executed.stem}.json")["declared"]
    notebook.metadata.pop("papermill", None)
    cells = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if "parameters" in tags or "injected-parameters" in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]  # still in the notebook that a reader downloads
            cell.source = re.sub(rf"^{RUN_DIR} = .*\n?", "", cell.source, flags=re.MULTILINE)
        if "parameters" in tags:
            cells.append(nbformat.v4.new_markdown_cell(_parameter_table(used, declared), id="parameters-table"))
        cells.append(cell)
    notebook.cells = cells
    return nbformat.writes(notebook) + "\n"


def _parameter_table(used: Mapping[str, Sequence[Value]], declared: Mapping[str, Parameter]) -> str:
    rows = "\n".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(str(default))}</td>"
        f"<td>{html.escape(str(value))}</td><td>{html.escape(declared[name].help)}</td></tr>"
        for name, (default, value) in used.items()
    )
    return (
        '<details class="derta-parameters"><summary>Parameters of this page</summary>\n<table>\n'
        "<thead><tr><th>parameter</th><th>default</th><th>used</th><th>meaning</th></tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></details>"
    )


def build_pages(folder: Path) -> Path:
    """Run Sphinx on `folder/stage` into `folder/html`, warnings as errors; returns the start page.

    A failed build forgets Sphinx's memory of the pages, so that the next one meets the same warnings again.
    """
    staged, doctrees, site, log = (folder / name for name in ("stage", "doctrees", "html", "build.log"))
    print("building the pages", flush=True)
    if not (site / "index.html").exists():  # written last: a build was stopped, with pages that Sphinx thinks it wrote
        shutil.rmtree(doctrees, ignore_errors=True)
    (site / "index.html").unlink(missing_ok=True)
    config = ["-c", "from jupyter_book.cli.main import main; main()", "config", "sphinx", str(staged)]
    sphinx = ["-m", "sphinx", "-b", "html", "-n", "-W", "--keep-going", "-q", "-d", str(doctrees)]
    with open(log, "w", encoding="utf-8") as handle:
        failed = any(
            subprocess.run([sys.executable, *command], stdout=handle, stderr=subprocess.STDOUT).returncode
            for command in (config, [*sphinx, str(staged), str(site)])
        )
    try:
        if failed:
            output = log.read_text(encoding="utf-8")
            told = re.findall(r"^.*(?:WARNING|ERROR|rror:).*$", output, re.MULTILINE)
            shown = "\n".join(told[:20] or output.splitlines()[-3:]).replace(f"{staged}{os.sep}", "")
            raise DertaError(f"The pages did not build ({len(told)} warnings or errors, all in {log}):\n{shown}")
        pages.check_html(site)
    except DertaError:
        shutil.rmtree(doctrees, ignore_errors=True)
        raise
    start = yaml.safe_load((staged / "_toc.yml").read_text(encoding="utf-8"))["root"] + ".html"
    redirect = (
        f'<!DOCTYPE html><html lang="en"><title>The book</title><meta http-equiv="refresh" content="0; url={start}">'
        '<link rel="icon" href="_static/favicon.svg">'
    )
    return write_text(site / "index.html", f'{redirect}<a href="{start}">The book starts here.</a></html>\n')
