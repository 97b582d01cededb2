import json
from pathlib import Path

import pytest
import yaml

from derta_lib.errors import DertaError, UsageError
from derta_lib.params import check_values, parse_settings, read_parameters, read_profile, resolve

ROOT = Path(__file__).parents[1]
CELL = """\
model: str = "reference"  # a hub id or a folder
steps: int = 80
rate: float = 1  # a whole number is a float here
quick: bool = False
methods: list[str] = ["vanilla", "derta"]
depths: list[int] = [1, 2]
run_dir: str = ""
"""


def notebook(folder: Path, source: str, name: str = "01_x") -> Path:
    cell = {"cell_type": "code", "source": source.splitlines(keepends=True), "metadata": {"tags": ["parameters"]}}
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": [cell]}))
    return path


def test_declarations_are_read_with_types_defaults_and_help(tmp_path):
    found = read_parameters(notebook(tmp_path, CELL))
    assert list(found) == ["model", "steps", "rate", "quick", "methods", "depths", "run_dir"]
    assert found["model"].help == "a hub id or a folder"
    assert found["rate"].default == 1.0
    assert isinstance(found["rate"].default, float)
    assert found["methods"].default == ["vanilla", "derta"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("steps = 80", "name: type = default"),
        ("steps: int", "name: type = default"),
        ("half: int = steps // 2", "no literal int"),
        ("steps: dict = {}", "has the type dict"),
        ("steps: int = 'many'", "'many' is not of type int"),
        ("steps: int = 1\nsteps: int = 2", "declared twice"),
        ("steps: int = (", "line 1"),
    ],
)
def test_a_line_that_declares_nothing_is_named(tmp_path, line, said):
    with pytest.raises(DertaError, match=r"01_x\.ipynb, parameters cell, line \d") as error:
        read_parameters(notebook(tmp_path, line))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("rate", "1e-3", 0.001),
        ("rate", 1.0e-3, 0.001),
        ("rate", yaml.safe_load("1e-3"), 0.001),  # PyYAML reads this as text
        ("rate", "2", 2.0),
        ("steps", "8", 8),
        ("steps", 8, 8),
        ("quick", "true", True),
        ("quick", "False", False),
        ("quick", True, True),
        ("methods", '["a", "b"]', ["a", "b"]),
        ("methods", "a, b", ["a", "b"]),
        ("methods", "", []),
        ("depths", "4,8", [4, 8]),
        ("depths", [4, 8], [4, 8]),
        ("model", "12", "12"),
    ],
)
def test_values_take_the_declared_type_however_they_are_given(tmp_path, name, given, value):
    used = resolve([notebook(tmp_path, CELL)], {}, {name: given})["01_x"][name]
    assert used == value
    assert type(used) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("steps", "8.5"),
        ("steps", 8.0),
        ("steps", True),
        ("rate", "fast"),
        ("rate", "nan"),
        ("quick", "yes"),
        ("quick", 1),
        ("depths", "4,x"),
        ("methods", "[1"),
        ("methods", 3),
        ("model", 3),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(tmp_path, name, given):
    with pytest.raises(UsageError, match=f"parameter '{name}' is "):
        resolve([notebook(tmp_path, CELL)], {}, {name: given})


def test_an_unknown_name_lists_the_known_ones_and_the_nearest(tmp_path):
    with pytest.raises(UsageError) as error:
        resolve([notebook(tmp_path, CELL)], {}, {"stpes": "8"})
    assert "Did you mean 'steps'?" in str(error.value)
    assert "depths, methods, model, quick, rate, steps." in str(error.value)


def test_the_run_folder_is_nobodys_to_set(tmp_path):
    with pytest.raises(UsageError, match="unknown parameter 'run_dir'"):
        resolve([notebook(tmp_path, CELL)], {"run_dir": "x"}, {})


def test_settings_win_over_the_profile_and_reach_only_notebooks_that_have_the_name(tmp_path):
    books = [notebook(tmp_path, CELL), notebook(tmp_path, 'steps: int = 5\nrun_dir: str = ""', "02_y")]
    used = resolve(books, {"steps": 10, "quick": "true"}, {"steps": "20"})
    assert used["01_x"]["steps"] == used["02_y"]["steps"] == 20
    assert used["01_x"]["quick"] is True
    assert "quick" not in used["02_y"]


def test_one_name_has_one_type(tmp_path):
    books = [notebook(tmp_path, CELL), notebook(tmp_path, "steps: float = 5.0", "02_y")]
    with pytest.raises(DertaError, match="'steps' is int in 01_x and float in 02_y"):
        resolve(books, {}, {})


def test_settings_are_name_and_value():
    assert parse_settings(["a=1", "b = x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(UsageError, match="--set a: write"):
        parse_settings(["a"])
    with pytest.raises(UsageError, match="given twice"):
        parse_settings(["a=1", "a=2"])


def test_profiles_are_flat_yaml_with_unique_keys(tmp_path):
    (tmp_path / "ci.yaml").write_text("steps: 3\nrate: 1e-3\n")
    assert read_profile(tmp_path / "ci.yaml") == {"steps": 3, "rate": "1e-3"}
    with pytest.raises(UsageError, match="no profile 'c1'; the profiles are ci"):
        read_profile(tmp_path / "c1.yaml")
    (tmp_path / "twice.yaml").write_text("steps: 3\nsteps: 4\n")
    with pytest.raises(DertaError, match="'steps' is given twice"):
        read_profile(tmp_path / "twice.yaml")
    (tmp_path / "list.yaml").write_text("- steps\n")
    with pytest.raises(DertaError, match="name: value"):
        read_profile(tmp_path / "list.yaml")


def test_values_are_held_against_the_cells_own_annotations():
    cell: dict = {}
    exec("steps: int = 3\nrate: float = 1e-3\nnames: list[str] = []\nother = 1", cell)
    check_values({"steps": 4, "rate": 1, "names": ["a"], "other": "x", "unknown": 2.5}, cell["__annotations__"])
    for bad in ({"steps": "twenty"}, {"steps": 2.5}, {"steps": "4"}, {"steps": True}, {"names": "a"}, {"rate": "1e-4"}):
        (name, value), *_ = bad.items()
        with pytest.raises(UsageError, match=rf"parameter '{name}' is (int|float|list\[str\]): {value!r} is not"):
            check_values(bad, cell["__annotations__"])


def test_a_notebook_has_one_cell_of_parameters(tmp_path):
    path = notebook(tmp_path, CELL)
    cell = json.loads(path.read_text())["cells"][0]
    for cells in ([], [cell, cell], [cell | {"metadata": {}}]):
        path.write_text(json.dumps({"cells": cells}))
        tagged = len(cells) if cells != [cell | {"metadata": {}}] else 0
        with pytest.raises(DertaError, match=f"{tagged} cells are tagged 'parameters'; exactly one must be"):
            read_parameters(path)


def test_an_empty_profile_leaves_the_defaults(tmp_path):
    (tmp_path / "none.yaml").write_text("# nothing\n")
    assert read_profile(tmp_path / "none.yaml") == {}
