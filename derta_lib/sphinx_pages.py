"""Sphinx extension of the book's own pages: `{explorer}`, `{claims}` (the ledger) and `{claims-summary}`.

Everything is made of docutils text nodes, so whatever a model or a results file says shows as text.
"""

import html
import textwrap
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from derta_lib import claims, results, stats
from derta_lib.sphinx_results import run_results, table

EXPLORER = (
    '<div id="derta-explorer" class="derta-explorer"></div>'
    "<noscript><p>The explorer needs JavaScript; the figures on the other pages do not.</p></noscript>"
)
EXPLORER_DATA = "explorer-data.js"
EXPLORER_FILES = ("explorer.css", EXPLORER_DATA, "explorer.js")
MARKS = dict(zip(claims.VERDICTS, ("✓", "≈", "✗", "–"), strict=True))


class Details(nodes.General, nodes.Element):
    """A part that opens on demand; its first child is the `Summary`."""


class Summary(nodes.General, nodes.TextElement):
    """The line of a `Details` that always shows."""


class ExplorerDirective(SphinxDirective):
    """`{explorer}`: the explorer, with a warning (which stops the build) when its data are not staged."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(__file__)
        if not (Path(self.env.srcdir) / "_static" / EXPLORER_DATA).is_file():
            message = "the explorer's data are missing (the run has no explorer.js), so this page would be blank"
            logging.getLogger(__name__).warning(message, location=self.get_location())
        return [nodes.raw("", EXPLORER, format="html")]


class Claims(SphinxDirective):
    """`{claims}`: the whole ledger, statements that open to their evidence, and the tables' cells."""

    def run(self) -> list[nodes.Node]:
        frame = claims.ledger(_results(self))
        shown: list[nodes.Node] = []
        for where, group in frame[frame["kind"] != "cell"].groupby("where", sort=False):
            shown.append(nodes.rubric("", str(where)))
            shown += [_card(row) for row in group.to_dict("records")]
        cells = [
            [f"{row['where']}: {row['statement']}", row["paper"], row["ours"].partition(": ")[2] or "–", _marked(row)]
            for row in frame[frame["kind"] == "cell"].to_dict("records")
        ]
        shown.append(nodes.rubric("", "Cell by cell"))
        head = Summary("", f"{len(cells)} cells of the paper's tables and figures")
        rule = nodes.paragraph(
            "",
            f"A cell is reproduced where ours is within {claims.CELL_POINTS:g} points of the paper's; it is not tested "
            "where the authors released no responses. Under PAIR a search without success counts as not unsafe, on the "
            "word of the authors' own search, so these cells are in part theirs. Figure 6 states another average for "
            "LLaMA3-8B than the paper's table gives (notebook 6).",
        )
        body = table(["cell", "paper", "ours", "verdict"], cells)
        shown.append(Details("", head, rule, body, classes=["derta-claim"]))
        return shown


class ClaimsSummary(SphinxDirective):
    """`{claims-summary}`: how many statements and how many cells got each verdict, and how near the cells lie."""

    def run(self) -> list[nodes.Node]:
        found = _results(self)
        rows = claims.summary(found).to_dict("records")
        body = [[_marked(row), str(row["statement"]), str(row["cell"])] for row in rows]
        near = nodes.paragraph("", claims.closeness(found))
        return [table(["verdict", "statements", "cells of tables and figures"], body), near]


def _results(directive: SphinxDirective) -> results.Results:
    for source in (__file__, claims.__file__, stats.__file__, Path(claims.__file__).with_suffix(".json")):
        directive.env.note_dependency(str(source))
    return run_results(directive.env)


def _marked(row: dict[Any, Any]) -> str:
    return f"{MARKS[row['verdict']]} {row['verdict']}"


def _card(row: dict[Any, Any]) -> Details:
    verdict = nodes.inline("", _marked(row), classes=["derta-verdict"])
    summary = Summary("", "", verdict, nodes.Text(" "), nodes.inline("", row["statement"]))
    facts = {"paper": row["paper"], "ours": row["ours"], "scale": row["gap"], "why": row["why"]}
    terms = nodes.definition_list(classes=["simple"])
    for name, text in facts.items():
        parts = [text] if name == "scale" else text.split("; ")
        lines = [nodes.paragraph("", part) for part in parts if part]
        terms += nodes.definition_list_item("", nodes.term("", name), nodes.definition("", *lines))
    terms["ids"] = [f"claim-{row['id']}"]  # within, so that a link to it opens the card
    colour = f"derta-verdict-{claims.VERDICTS.index(row['verdict'])}"
    return Details("", summary, terms, classes=["derta-claim", colour])


def _element(tag: str) -> tuple[Any, Any]:
    def visit(translator: Any, node: nodes.Element) -> None:
        translator.body.append(translator.starttag(node, tag))

    def depart(translator: Any, node: nodes.Element) -> None:
        translator.body.append(f"</{tag}>\n")

    return visit, depart


def _add_explorer(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """The explorer's files on its own page alone, deferred, so that the first paint waits for none of them."""
    if doctree is not None and any('id="derta-explorer"' in node.astext() for node in doctree.findall(nodes.raw)):
        app.add_css_file("explorer.css")
        app.add_js_file(EXPLORER_DATA, loading_method="defer", priority=800)
        app.add_js_file("explorer.js", loading_method="defer", priority=810)


def _mend(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Take out what makes a page fail in the browser and is none of ours, and say what a page is about.

    The scripts of the live-kernel button, which Jupyter Book adds twice, an error on every page; the roles that
    docutils gives the bibliography and its entries; and a label of hidden cells that differs from what is seen.
    """
    for kind in ("script_files", "css_files"):
        context[kind] = [
            asset for asset in context[kind] if "thebe" not in f"{asset.filename} {asset.attributes}".lower()
        ]
    if "body" in context:
        for spare in (' role="list"', ' role="doc-biblioentry"', ' aria-label="Toggle hidden content"'):
            context["body"] = context["body"].replace(spare, "")
    if doctree is not None and (first := next((p for p in doctree.findall(nodes.paragraph) if p.astext()), None)):
        words = textwrap.shorten(first.astext(), 160, placeholder=" …")
        context["metatags"] += f'<meta name="description" content="{html.escape(words)}">\n'


def _not_on_every_page(app: Sphinx, config: Config) -> None:
    """Jupyter Book puts each script and style sheet under `_static` on all pages; the explorer's stay off them."""
    config.html_css_files = [name for name in config.html_css_files if name not in EXPLORER_FILES]
    config.html_js_files = [name for name in config.html_js_files if name not in EXPLORER_FILES]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_node(Details, html=_element("details"))
    app.add_node(Summary, html=_element("summary"))
    app.add_directive("explorer", ExplorerDirective)
    app.add_directive("claims", Claims)
    app.add_directive("claims-summary", ClaimsSummary)
    app.connect("config-inited", _not_on_every_page, priority=100)  # before Sphinx rewrites the lists
    app.connect("html-page-context", _add_explorer, priority=100)  # before an extension copies the lists
    app.connect("html-page-context", _mend, priority=910)  # after every other extension
    return {"parallel_read_safe": True, "parallel_write_safe": True}
