"""Records on disk: JSON and JSONL written whole or not at all, long ones in parts, and keys made from content."""

import csv
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from derta_lib.errors import DertaError, UsageError


def cache_dir() -> Path:
    """Folder for everything that can be made again: `$DERTA_CACHE`, or `~/.cache/derta`."""
    return Path(os.environ.get("DERTA_CACHE") or "~/.cache/derta").expanduser()


def today() -> str:
    """The day a file was made, by the world's clock: 2025-07-31."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def canonical(value: Any) -> str:
    """One JSON text for one value: sorted keys, no spaces, non-finite numbers refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(*parts: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `parts`: the name of a cached result."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def library_files() -> list[Path]:
    """Files of the library, code and data, on which a result may hang."""
    kinds = (".py", ".json", ".jsonl", ".yaml", ".csv", ".safetensors")
    return sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in kinds)


def code_key(sources: Iterable[Path], *packages: str) -> str:
    """Key of code that decides a result: the content of its files and the versions of the `packages` under them."""
    return content_key([file_sha256(path) for path in sources], {name: metadata.version(name) for name in packages})


def check_output(path: Path | str, *inputs: Path | str) -> None:
    """Raise UsageError, before any work is done, where `path` cannot be written or is one of the `inputs`."""
    path = Path(path)
    descriptor, name = _temporary(path)
    os.close(descriptor)
    os.unlink(name)
    if path.exists() and any(Path(given).exists() and path.samefile(given) for given in inputs):
        raise UsageError(f"{path}: this is the input, which would be lost; name another file to write.")


def _temporary(path: Path) -> tuple[int, str]:
    """An open file beside `path`: its descriptor and its name."""
    try:
        if path.is_dir():
            raise UsageError(f"{path}: this is a folder; name a file to write.")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: this is no file but a device or pipe; name a file to write.")
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(f"{path}: it cannot be written ({error.strerror}); name another place.") from None


def write_text(path: Path | str, text: str) -> Path:
    """Write `text` under a temporary name, then rename: a reader sees the old file or the new one."""
    path = Path(path).resolve()  # behind a link, the file that it leads to
    descriptor, temporary = _temporary(path)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's own is private, and these files are published
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise _unwritten(path, error) from None
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _unwritten(path: Path | str, error: OSError) -> DertaError:
    return DertaError(f"{path}: it could not be written ({error.strerror}); mend that and run again.")


def write_json(path: Path | str, value: Any) -> Path:
    return write_text(path, json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises DertaError naming the file, and the line of a byte
    that is not UTF-8.
    """
    try:
        return _decoded(path, Path(path).read_bytes())
    except FileNotFoundError:
        raise DertaError(f"{path}: there is no such file.") from None
    except IsADirectoryError:
        raise DertaError(f"{path}: this is a folder; name a file.") from None
    except OSError as error:
        raise DertaError(f"{path}: it could not be read ({error.strerror}).") from None


def _decoded(path: Path | str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DertaError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None


def _parsed(path: Path | str, text: str, line: int = 1) -> Any:
    """The JSON value of a text that begins on `line` of a file; what could not be written again is refused."""
    try:
        value = json.loads(text, object_pairs_hook=_unrepeated)
        canonical(value).encode()  # refuses NaN and halves of surrogate pairs
        return value
    except json.JSONDecodeError as error:
        where, said = line + error.lineno - 1, error.msg
    except (ValueError, RecursionError) as error:
        where, said = line, str(error)
    raise DertaError(f"{path}, line {where}: not valid JSON ({said}).")


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' stands twice")
    return found


def read_json(path: Path | str) -> Any:
    return _parsed(path, read_text(path))


def json_line(record: Any) -> str:
    return json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path | str, records: Iterable[Any]) -> Path:
    return write_text(path, "".join(json_line(record) for record in records))


def append_jsonl(path: Path | str, record: Any) -> None:
    """Add a line to a file. Raises DertaError naming the file where it cannot be written: a full disk, say."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_line(record))
    except OSError as error:
        raise _unwritten(path, error) from None


def read_jsonl(path: Path | str, required: Iterable[str] = ()) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) for each non-empty line of a JSONL file.

    Raises DertaError naming file and line for a line that is not an object or lacks a `required` key, and for a file
    without any.
    """
    if not (found := list(_records(path, read_text(path), required))):
        raise DertaError(f"{path}: the file is empty; give it at least one line.")
    return found


def _records(path: Path | str, text: str, required: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028 within texts
        if not line.strip():
            continue
        record = _parsed(path, line, number)
        if not isinstance(record, dict):
            raise DertaError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}.")
        if missing := [key for key in required if key not in record]:
            raise DertaError(f"{path}, line {number}: the key '{missing[0]}' is missing.")
        yield number, record


def read_csv(path: Path | str) -> list[tuple[int, dict[str, str]]]:
    """(line number, filled cells by column) for each row of a CSV file with a header.

    Raises DertaError naming file and line for what is not CSV or not of the header's width, and for no rows.
    """
    found = []
    csv.field_size_limit(2**31 - 1)  # a cell may be as long as a line of JSON
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        names = list(rows.fieldnames or ())
        if repeated := [name for name in names if names.count(name) > 1]:
            raise DertaError(f"{path}, line 1: the column '{repeated[0]}' stands twice; name each once.")
        for row in rows:
            if None in row or None in row.values():
                raise DertaError(f"{path}, line {rows.line_num}: the row has not as many fields as the header.")
            found.append((rows.line_num, {name: value for name, value in row.items() if value}))
    except csv.Error as error:
        raise DertaError(f"{path}, line {rows.reader.line_num}: not valid CSV ({error}).") from None
    if not found:
        raise DertaError(f"{path}: the file is empty; give it a header and at least one row.")
    return found


def resume_jsonl(path: Path | str, required: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Records of an interrupted JSONL file by id, without a last line that was torn in writing.

    Raises DertaError as `read_jsonl` does, and for an id that is not text.
    """
    if not Path(path).exists():
        return {}
    whole, _, last = Path(path).read_bytes().rpartition(b"\n")
    found = {}
    text = _decoded(path, whole + b"\n" + last if _is_json(last) else whole)
    for number, record in _records(path, text, ("id", *required)):
        if not isinstance(record["id"], str):
            raise DertaError(f"{path}, line {number}: 'id' must be text; no stopped run wrote this.")
        found[record["id"]] = record
    return found


def write_in_parts(
    path: Path | str,
    items: Sequence[Any],
    request: Any,
    make: Callable[[Sequence[Any]], Iterable[dict[str, Any]]],
    size: int,
) -> list[dict[str, Any]]:
    """Write the JSONL file `path` with the records that `make` gives for dataclass `items`, `size` at a time.

    Each part goes into PATH.part as soon as it is made. Run again after a stop, parts that are there are not made
    again, so the file ends up as in one go. PATH.part goes once `path` is whole. Returns the records. Raises UsageError
    where PATH.part holds other items, or was made for another `request` (what else the records hang on) or library.
    """
    begun = Path(f"{path}.part")
    code = code_key(library_files(), "torch", "transformers")
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    keys = [content_key(code, request, [asdict(item) for item in part]) for part in parts]
    made = resume_jsonl(begun, required=("records",))
    if made.keys() - set(keys):
        raise UsageError(
            f"{begun}: a stopped run left it for another request, or by another version; delete it, or name another "
            "file to write."
        )
    if begun.exists():
        write_jsonl(begun, made.values())  # a torn last line goes
    with tqdm(desc=Path(path).name, total=len(items), disable=None) as bar:
        for key, part in zip(keys, parts, strict=True):
            if key not in made:
                made[key] = {"id": key, "records": list(make(part))}
                append_jsonl(begun, made[key])
            bar.update(len(part))
    records = [record for key in keys for record in made[key]["records"]]
    write_jsonl(path, records)
    begun.unlink(missing_ok=True)
    return records


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
        return True
    except ValueError:  # torn in mid-line, or in mid-character
        return False
