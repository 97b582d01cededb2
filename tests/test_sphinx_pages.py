"""The directives in a small Sphinx build: the ledger follows results.json, the explorer stays on its own page."""

import re
import shutil
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
from explorer_demo import demo_data
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from derta_lib import explorer, results
from derta_lib.records import write_json
from derta_lib.stats import rate

BOOK = Path(__file__).parents[1] / "book"
CARD = r'<details class="[^"]*">(?:(?!<details).)*id="claim-derta-codeattack".*?</details>'
CONF = """
extensions = ["myst_parser", "derta_lib.sphinx_pages"]
html_static_path = ["_static"]
html_js_files = ["explorer-data.js", "explorer.js", "own.js"]
html_css_files = ["explorer.css"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
"""


@pytest.fixture
def site(tmp_path):
    """Build the staged pages; returns (html by page, warnings)."""
    source = tmp_path / "source"
    shutil.copytree(BOOK / "_static", source / "_static")
    (source / "_static" / "own.js").write_text("", encoding="utf-8")
    (source / "conf.py").write_text(CONF, encoding="utf-8")
    (source / "index.md").write_text(
        "# Start\n\n```{claims-summary}\n```\n\n```{toctree}\nclaims\nexplorer\nintro\nglossary\n```\n"
    )
    (source / "intro.md").write_text("# Intro\n\n$$p$$ (eq:chance)\n", encoding="utf-8")  # the notebook's label
    for name in ("claims.md", "explorer.md", "glossary.md"):
        shutil.copy(BOOK / name, source)
    (source / "notebooks").mkdir()
    for name in ("05_components", "06_authors_generations"):  # what these pages link to
        (source / "notebooks" / f"{name}.md").write_text(f"---\norphan: true\n---\n# {name}\n", encoding="utf-8")

    def build(numbers: results.Results, data: bool = True) -> tuple[dict[str, str], str]:
        write_json(source / "results.json", {key: asdict(number) for key, number in numbers.items()})
        if data:
            explorer.write(tmp_path, demo_data()).rename(source / "_static" / "explorer-data.js")
        warnings, out = StringIO(), tmp_path / "html"
        with docutils_namespace():
            Sphinx(source, source, out, tmp_path / "trees", "html", status=None, warning=warnings).build()
        return {page.stem: page.read_text(encoding="utf-8") for page in out.glob("*.html")}, warnings.getvalue()

    return build


def test_pages_follow_the_results_file(site):
    good = {f"asr/{m}/codeattack": rate(k, 60) for m, k in (("vanilla", 57), ("derta", 1))}
    pages, warnings = site(good)
    assert warnings == ""
    card = re.search(CARD, pages["claims"], re.DOTALL)[0]
    assert "≈ same direction at small scale" in card
    assert str(good["asr/derta/codeattack"]) in card
    assert "86.0 %" in card  # the paper's, from its table
    assert "rule: asr/derta/codeattack lower than asr/vanilla/codeattack" in card
    pages, _ = site({"asr/vanilla/codeattack": rate(1, 60), "asr/derta/codeattack": rate(57, 60)})
    card = re.search(CARD, pages["claims"], re.DOTALL)[0]
    assert "✗ not reproduced" in card
    assert "not reproduced" in pages["index"]


def test_the_explorers_files_load_deferred_and_on_its_page_alone(site):
    pages, _ = site({})
    tags = re.findall(r"<script[^>]*explorer[^>]*>", pages["explorer"])
    assert len(tags) == 2
    assert "explorer-data.js" in tags[0]
    assert all("defer" in tag for tag in tags)
    assert "explorer.css" in pages["explorer"]
    assert not [name for name in ("index", "claims", "intro") if re.search(r"(src|href)=[^>]*explorer[-.\w]*\.(js|css)", pages[name])]  # fmt: skip # noqa: E501
    assert "own.js" in pages["intro"]


def test_a_run_without_explorer_data_is_a_warning_that_stops_the_build(site):
    _, warnings = site({}, data=False)
    assert "explorer.md" in warnings
    assert "the run has no explorer.js" in warnings
