"""Typed notebook parameters: read from a notebook's parameters cell, checked and coerced before anything runs.

The cell tagged `parameters` holds lines `name: type = default  # help`, with literal defaults. papermill alone would
pass `1e-4` from YAML on as text and run the defaults for a mistyped name; here both are settled first.
"""

import ast
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from derta_lib.errors import DertaError, UsageError
from derta_lib.records import read_json, read_text

Value = str | int | float | bool | list[str] | list[int] | list[float]
TYPES = ("str", "int", "float", "bool", "list[str]", "list[int]", "list[float]")
RUN_DIR = "run_dir"  # set by the book for every notebook, so no profile may


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell; `type` as it is written there, `help` its comment."""

    name: str
    type: str
    default: Value
    help: str


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """Parameters of a notebook by name, in order, from the one cell tagged `parameters`.

    Raises DertaError where there is none or more than one, and naming the line that is not a declaration.
    """
    cells = [c for c in read_json(notebook)["cells"] if "parameters" in c["metadata"].get("tags", ())]
    if len(cells) != 1:
        raise DertaError(f"{notebook}: {len(cells)} cells are tagged 'parameters'; exactly one must be.")
    source = "".join(cells[0]["source"])
    lines = source.splitlines()
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise DertaError(f"{notebook}, parameters cell, line {error.lineno}: {error.msg}.") from None
    found: dict[str, Parameter] = {}
    for statement in statements:
        where = f"{notebook}, parameters cell, line {statement.lineno}"
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            raise DertaError(f"{where}: write `name: type = default  # help`; computed values belong in the next cell.")
        name, type_ = statement.target.id, ast.unparse(statement.annotation)
        if type_ not in TYPES:
            raise DertaError(f"{where}: '{name}' has the type {type_}; use one of {', '.join(TYPES)}.")
        if name in found:
            raise DertaError(f"{where}: '{name}' is declared twice.")
        try:
            default = _coerce(type_, ast.literal_eval(statement.value))
        except ValueError as error:
            raise DertaError(f"{where}: the default of '{name}' is no literal {type_} ({error}).") from None
        tail = lines[(statement.end_lineno or 1) - 1].partition("#")[2]
        found[name] = Parameter(name, type_, default, tail.strip())
    return found


def resolve(
    notebooks: Sequence[Path], profile: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, dict[str, Value]]:
    """Parameters of each notebook (by stem): defaults, then `profile`, then `settings`, each coerced to its type.

    Raises UsageError for a name that no notebook has (listing the known ones) or a value of another type, and
    DertaError when two notebooks declare one name with different types.
    """
    declared = {notebook.stem: read_parameters(notebook) for notebook in notebooks}
    types: dict[str, tuple[str, str]] = {}
    for stem, parameters in declared.items():
        for parameter in parameters.values():
            type_, other = types.setdefault(parameter.name, (parameter.type, stem))
            if type_ != parameter.type:
                raise DertaError(
                    f"parameter '{parameter.name}' is {type_} in {other} and {parameter.type} in {stem}; "
                    "one name must have one type."
                )
    types.pop(RUN_DIR, None)
    given = {}
    for name, value in {**profile, **settings}.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            guess = f" Did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"unknown parameter '{name}'.{guess} The parameters are {', '.join(sorted(types))}.")
        try:
            given[name] = _coerce(types[name][0], value)
        except ValueError as error:
            raise UsageError(f"parameter '{name}' is {types[name][0]}: {error}.") from None
    return {
        stem: {name: given.get(name, parameter.default) for name, parameter in parameters.items()}
        for stem, parameters in declared.items()
    }


def check_values(values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Raise UsageError for a value of another type than its annotation: papermill alone checks none."""
    for name, declared in annotations.items():
        type_ = declared.__name__ if isinstance(declared, type) else str(declared)
        try:
            right = name not in values or _coerce(type_, values[name]) == values[name]
        except ValueError:
            right = False
        if not right:
            raise UsageError(f"parameter '{name}' is {type_}: {values[name]!r} is not.")


def read_profile(path: Path) -> dict[str, Any]:
    """A profile: flat YAML `name: value`. Raises UsageError for an unknown profile, DertaError for a bad file."""
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise UsageError(f"there is no profile '{path.stem}'; the profiles are {known}.")
    text = read_text(path)
    try:
        profile = yaml.load(text, _UniqueKeys)
    except Exception as error:  # what is no date, number or constructor of YAML's comes as the errors of its parsers
        raise DertaError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if profile is None:  # an empty file
        return {}
    if not isinstance(profile, dict) or not all(isinstance(name, str) for name in profile):
        raise DertaError(f"{path}: write one `name: value` a line.")
    return profile


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """`name=value` texts by name; raises UsageError for one without `=` or a name given twice."""
    parsed: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write --set name=value.")
        if name.strip() in parsed:
            raise UsageError(f"--set {setting}: '{name.strip()}' is given twice.")
        parsed[name.strip()] = value.strip()
    return parsed


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _coerce(type_: str, value: Any) -> Value:
    """`value` (a literal, or text from a command line or YAML) as `type_`; ValueError says what is wrong."""
    if not type_.startswith("list"):
        return _scalar(type_, value)
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                raise ValueError(f"{value!r} is no JSON list") from None
        else:
            value = [item.strip() for item in value.split(",")] if value.strip() else []
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    return [_scalar(type_[5:-1], item) for item in value]  # type: ignore[return-value]


def _scalar(type_: str, value: Any) -> Any:
    if type_ == "bool" and (text := str(value).strip().lower()) in ("true", "false"):
        return text == "true"
    if type_ == "str" and isinstance(value, str):
        return value
    if type_ in ("int", "float") and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            if type_ == "int" and not isinstance(value, float):
                return int(value)
            if type_ == "float" and math.isfinite(float(value)):
                return float(value)
        except (ValueError, OverflowError):
            pass
    wanted = "true or false" if type_ == "bool" else f"of type {type_}"
    raise ValueError(f"{value!r} is not {wanted}")
