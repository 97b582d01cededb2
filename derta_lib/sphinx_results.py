"""Sphinx extension of the book: results and the paper's numbers in prose, and the provenance of every page.

`{result}`asr/derta/direct`` shows a number of the run with interval and n; `{result}`key|value`` (or `|n`,
`|interval`) a part of it. `{paper}`table4_components[method=derta].PAIR`` shows one of the paper's.
"""

import html
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole
from sphinx.util.fileutil import copy_asset

from derta_lib import results
from derta_lib.claims import paper_value
from derta_lib.errors import DertaError
from derta_lib.records import file_sha256, read_json
from derta_lib.results import Number

_log = logging.getLogger(__name__)
_COLAB = "https://colab.research.google.com/github/"


def shown(number: Number, part: str) -> str:
    """`number` as text: all of it (""), or its `value`, `interval` or `n`; DertaError where that part is missing."""
    parts = {"": str(number)} | number.parts()
    if part not in parts:
        raise DertaError(f"it has no part '{part}'; the parts are value, interval and n")
    return parts[part]


def run_results(env: BuildEnvironment) -> results.Results:
    """The numbers of the run; the page that asks is made again when they change."""
    path = Path(env.srcdir) / "results.json"
    env.note_dependency(str(path))
    return results.load(path)


def _result(env: BuildEnvironment, text: str) -> str:
    key, _, part = text.partition("|")
    numbers = run_results(env)
    if key not in numbers:
        raise DertaError("the run has no such key")
    return shown(numbers[key], part)


class TextRole(SphinxRole):
    """A role that shows what `find` makes of its text, and warns (which stops the build) where that is an error."""

    def __init__(self, kind: str, find: Callable[[BuildEnvironment, str], str]) -> None:
        self.kind, self.find = kind, find

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            return [nodes.inline("", self.find(self.env, self.text), classes=[f"derta-{self.kind}"])], []
        except DertaError as error:
            _log.warning("%s '%s': %s.", self.kind, self.text, error, location=self.get_location())
            return [nodes.problematic("", self.text)], []


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> nodes.table:
    """A docutils table of texts."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))

    def row(texts: Sequence[str]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", text)) for text in texts))

    group += nodes.thead("", row(head))
    group += nodes.tbody("", *map(row, body))
    return nodes.table("", group, classes=["derta-results"])


def provenance(manifest: dict[str, Any], page: str) -> str:
    """Footer of a page (HTML): how the notebook, or on a page of prose every notebook, was executed."""
    stem = page.removeprefix("notebooks/")
    made = manifest["notebooks"]
    chosen = {stem: made[stem]} if stem in made else made
    rows = []
    for name, part in chosen.items():
        where, commit = part["environment"], part["environment"]["git"]
        sha = commit["sha"][:12] if commit["sha"] else "outside a git checkout"
        # a notebook without torch has neither
        threads = f", {where['threads']} threads, {where['precision']}" if where["threads"] else ""
        versions = [f"{package} {version}" for package, version in where["versions"].items() if version]
        facts = {
            "git commit": sha + (" with uncommitted changes" if commit["dirty"] else ""),
            "seed": part["parameters"].get("seed", "none"),
            "executed": f"{part['started']}, in {part['seconds']:.0f} s",
            "hardware": f"{where['gpu'] or where['cpu']}, {where['cores']} cores{threads}",
            "software": f"Python {where['python']}; {'; '.join(versions)}",
            "parameters": ", ".join(
                f"{key}: {' → '.join(dict.fromkeys(str(value) or '(empty)' for value in default_and_used))}"
                for key, default_and_used in part["declared"].items()
            ),
            **{f"record: {key}": value for key, value in part["records"].items()},
        }
        lines = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
        rows.append(f"<p><strong>{html.escape(name)}</strong></p><dl>{lines}</dl>")
    return (
        f'<details class="derta-provenance"><summary>How this page was made: run “{html.escape(manifest["name"])}”'
        f"</summary>{''.join(rows)}</details>"
    )


def _finish_page(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    if "body" in context and doctree is not None:
        context["body"] += provenance(read_json(Path(app.srcdir) / "manifest.json"), page)
    # Colab opens the copies on the branch `colab`, whose first cell knows the repository; edits go to the branch built.
    branch = f"/blob/{app.config.html_theme_options.get('repository_branch')}/"
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if button.get("url", "").startswith(_COLAB):
                button["url"] = button["url"].replace(branch, "/blob/colab/", 1)


def _pages_to_write(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Every page again when the manifest changed: its footer shows it."""
    before, now = getattr(env, "derta_manifest", None), file_sha256(Path(app.srcdir) / "manifest.json")
    env.derta_manifest = now  # type: ignore[attr-defined]
    return sorted(env.found_docs) if before != now else []


def _docstring_as_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code`; without this reStructuredText would read stars and bars as markup."""
    for index, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line.replace('""', '`""`'))
        lines[index] = "".join(f"`{p}`" if p.startswith("`") else re.sub(r"([*|_\\])", r"\\\1", p) for p in parts)
    for index in range(len(lines) - 1, 0, -1):  # a list may follow its heading at once
        if lines[index].startswith("- ") and lines[index - 1] and not lines[index - 1].startswith(("- ", " ")):
            lines.insert(index, "")


_ARRAY = re.compile(r"[\w.~]*_Buffer \|.*?_NestedSequence\[complex \| bytes \| str\]")


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Signatures as a reader wants them: none for a protocol, no factories, and `ArrayLike` by its name."""
    if getattr(obj, "_is_protocol", False):
        return "", None
    if signature is None:
        return None
    return _ARRAY.sub("ArrayLike", signature.replace("<factory>", "...")), returns


def _copy_mathjax(app: Sphinx) -> None:
    """MathJax travels with the book: no page asks another host for anything."""
    source = Path(importlib.import_module("sphinx-mathjax-offline").__path__[0]) / "static" / "mathjax"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    target = Path(app.outdir) / "_static" / "mathjax"
    copy_asset(source / "tex-chtml.js", target)
    copy_asset(source / fonts, target / fonts)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_role("result", TextRole("result", _result))
    app.add_role("paper", TextRole("paper", lambda _, text: f"{paper_value(text)} %"))
    app.connect("builder-inited", _copy_mathjax)
    app.connect("env-updated", _pages_to_write)
    app.connect("html-page-context", _finish_page, priority=900)  # after the theme's buttons
    app.connect("autodoc-process-docstring", _docstring_as_text)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
