"""What every notebook has in common, and the first cell on a machine without the library."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from derta_lib import claims, pages
from derta_lib.book import INSTALL_LINE, chapters, check_executed
from derta_lib.params import RUN_DIR, read_parameters, read_profile, resolve
from derta_lib.results import Number

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted((ROOT / "notebooks/profiles").glob("*.yaml"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


INSTALL = "".join(code_cells(NOTEBOOKS[0])[0]["source"])


def test_the_table_of_contents_has_every_notebook_and_page():
    assert chapters(ROOT) == NOTEBOOKS
    toc = (ROOT / "_toc.yml").read_text()
    for page in (ROOT / "book").glob("*.md"):
        assert f"book/{page.stem}\n" in toc + "\n", f"{page.name} is in no table of contents"


@each
def test_a_notebook_begins_with_title_install_and_parameters(path):
    cells = json.loads(path.read_text())["cells"]
    assert "".join(cells[0]["source"]).startswith("# ")
    code = code_cells(path)
    assert "".join(code[0]["source"]) == INSTALL
    assert INSTALL.count(INSTALL_LINE) == 1
    assert code[1]["metadata"]["tags"] == ["parameters"]
    assert f'open_run("{path.stem}", run_dir' in "".join(code[2]["source"])


@each
def test_outputs_are_stripped(path):
    for cell in code_cells(path):
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


@each
def test_parameters_are_typed_explained_and_kept_in_the_run(path):
    declared = read_parameters(path)
    assert all(parameter.help for parameter in declared.values())
    assert declared[RUN_DIR].default == ""
    opening = ast.parse("".join(code_cells(path)[2]["source"]))
    kept = next(node for node in ast.walk(opening) if isinstance(node, ast.Dict))
    assert {ast.literal_eval(key) for key in kept.keys} == set(declared) - {RUN_DIR}


@each
def test_no_role_and_no_bare_result_number_in_the_prose(path):
    markdown = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
    for cell in markdown:
        text = "".join(cell["source"])
        assert not re.search(r"\{[\w:-]+\}`|^(:{3,}|`{3,})\{", text, re.MULTILINE), "Jupyter and Colab show MyST raw"
        assert not list(pages.bare_numbers(text))


def test_pages_hold_no_bare_result_number():
    pages.check_numbers([*(ROOT / "book").glob("*.md"), ROOT / "README.md"])


def test_one_parameter_name_has_one_type_and_one_meaning_in_all_notebooks():
    resolve(NOTEBOOKS, {}, {})


def test_there_are_the_profiles_that_the_book_names():
    assert {path.stem for path in PROFILES} == {"smoke", "ci", "cpu", "gpu", "seeds"}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_valid(path):
    resolve(NOTEBOOKS, read_profile(path), {})


def test_conda_gets_its_bounds_from_the_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    assert not [entry for entry in environment["dependencies"][1:] if isinstance(entry, str) and "=" in entry]


def test_every_requirement_is_pinned_for_the_book_and_the_tests():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in wanted} - {"derta-lib"}
    assert names <= pinned


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A machine like Colab: everything is there but the library; one of its requirements is too old, and a package at
    which PEFT stops where it is as old as Colab's.
    """
    home = tmp_path_factory.mktemp("colab")
    source = home / "checkout"
    shutil.copytree(ROOT / "derta_lib", source / "derta_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheels = home / "wheels"
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(wheels), str(source)], check=True)
    with zipfile.ZipFile(wheels / "gguf-99.0-py3-none-any.whl", "w") as wheel:  # the requirement that is too old
        wheel.writestr("gguf.py", "")
        wheel.writestr("gguf-99.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: gguf\nVersion: 99.0\n")
        wheel.writestr("gguf-99.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("gguf-99.0.dist-info/RECORD", "")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    site = next((home / "venv/lib").glob("python*/site-packages"))
    hidden = re.compile(r"(__editable__.*)?derta|gguf|torchao|__pycache__", re.IGNORECASE)
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not hidden.match(entry.name) and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    for name, version in {"gguf": "0.1", "torchao": "0.10.0"}.items():
        old = site / f"{name}-{version}.dist-info"
        old.mkdir()
        (site / f"{name}.py").touch()
        (old / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        files = (f"{name}.py", f"{old.name}/METADATA", f"{old.name}/RECORD")
        (old / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    work = home / "empty"
    work.mkdir()
    return home / "venv/bin/python", wheels, work


def environment(wheels, source):
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DERTA_SOURCE")}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    return env | ({"DERTA_SOURCE": str(source)} if source else {})


def first_cell(colab, source, then=""):
    python, wheels, work = colab
    env = environment(wheels, source)
    return subprocess.run([python, "-c", INSTALL + then], capture_output=True, text=True, cwd=work, env=env)


@pytest.mark.slow
def test_the_first_cell_installs_what_is_missing_or_too_old_and_nothing_else(colab):
    python, wheels, _ = colab
    nowhere = first_cell(colab, "")
    assert nowhere.returncode
    assert "ModuleNotFoundError: derta_lib is not installed" in nowhere.stderr
    wrong = first_cell(colab, wheels / "nothing.whl")
    assert wrong.returncode
    assert "CalledProcessError" in wrong.stderr

    def versions():
        listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True)
        return {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}

    before = versions()
    (wheel,) = wheels.glob("derta_lib-*.whl")
    where = "\nimport derta_lib; print(derta_lib.__file__)"
    where += "\nfrom peft.import_utils import is_torchao_available; assert not is_torchao_available()"
    done = first_cell(colab, wheel, where)
    assert done.returncode == 0, done.stderr
    assert str(python.parents[1]) in done.stdout  # this machine's own copy, not the checkout
    after = versions()
    assert {name for name in after if after[name] != before.get(name)} == {"derta-lib", "gguf"}
    assert before.keys() <= after.keys()
    assert first_cell(colab, "", where).returncode == 0  # a second time there is nothing to install


@pytest.mark.slow
@pytest.mark.parametrize("name", ["02_harmful_prefix_data", "06_authors_generations"])
def test_a_notebook_runs_from_its_single_file(colab, name):
    python, wheels, work = colab
    folder = work / name
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder)
    (wheel,) = wheels.glob("derta_lib-*.whl")
    command = [python, "-m", "papermill", "-k", "python3", f"{name}.ipynb", "out.ipynb"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(wheels, wheel))
    assert done.returncode == 0, done.stderr[-2000:]
    check_executed(folder / "out.ipynb")
    part = json.loads((folder / "runs" / name / "parts" / f"{name}.json").read_text())
    if name.startswith("06"):  # every claim about the authors' generations finds its numbers, where they released any
        numbers = {key: Number(**number) for key, number in part["results"].items()}
        asked = [claim for claim in claims.all_claims() if claim.release]
        missing = [claim.id for claim in asked if claims.verdict(claim, numbers)[1].endswith("not measured")]
        unreleased = re.compile("mistral|alpacaeval|instruct_official_completingattack|completing-breaks-instruct")
        assert [name for name in missing if not unreleased.search(name)] == []
