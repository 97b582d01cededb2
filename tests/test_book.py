"""The build, on a tiny book of one notebook and one page: what must stop it stops it."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from test_runs import HOSTILE, Reader

from derta_lib import pages
from derta_lib.book import (
    build_book,
    check_executed,
    colab_notebook,
    derived_config,
    executed_files,
    published_notebook,
)
from derta_lib.errors import DertaError, UsageError
from derta_lib.results import Number
from derta_lib.sphinx_results import shown

ROOT = Path(__file__).parents[1]
PAPER = "{paper}`table4_components[method=derta].PAIR`"
INTRO = f"# Tiny\n\nMeasured: {{result}}`asr/x`, of {{result}}`asr/x|n`; the paper says {PAPER}.\n"
CELLS = {
    "install": nbformat.read(ROOT / "notebooks/03_training.ipynb", as_version=4).cells[1].source,
    "parameters": 'count: int = 4  # how many\nrun_dir: str = ""',
    "open": 'from derta_lib.runs import open_run\nrun = open_run("01_tiny", run_dir, {"count": count})',
    "put": 'from derta_lib.results import Number\nrun.put("asr/x", Number(0.25, n=count, low=0.05, high=0.7))\n'
    'import sys\nrun.record("interpreter", sys.executable)',
    "text": f"from derta_lib.display import show_text\nshow_text({HOSTILE!r})",
}


def write_notebook(root: Path, **changed: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# One", id="title")])
    for name, source in (CELLS | changed).items():
        cell = nbformat.v4.new_code_cell(source, id=name)
        cell.metadata = {"tags": ["parameters"]} if name == "parameters" else {}
        notebook.cells.append(cell)
    nbformat.write(notebook, root / "notebooks" / "01_tiny.ipynb")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    for folder in ("book", "notebooks/profiles"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "_config.yml", root)
    shutil.copy(ROOT / "book/references.bib", root / "book")
    shutil.copytree(ROOT / "book/_static", root / "book/_static")
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/01_tiny\n")
    (root / "notebooks/profiles/p.yaml").write_text("count: 5\n")
    (root / "book/intro.md").write_text(INTRO)
    write_notebook(root)
    return root


def build(root: Path, *settings: str, name: str = "p") -> Path:
    return build_book(root, "p", settings, name)


def rendered(root: Path, page: str) -> str:
    return (root / "runs/p/html" / page).read_text()


@pytest.mark.slow
def test_a_book_from_notebook_to_page(tiny, capsys):
    start = build(tiny)
    assert start == tiny / "runs/p/html/index.html"
    assert "book/intro.html" in start.read_text()

    manifest = json.loads((tiny / "runs/p/manifest.json").read_text())
    assert manifest["notebooks"]["01_tiny"]["records"]["interpreter"] == sys.executable  # not a kernel of the user's

    text = Reader(rendered(tiny, "book/intro.html")).text
    assert "Measured: 25.0 % [5.0, 70.0], n = 5, of 5; the paper says" in text
    assert "01_tiny" in text.partition("How this page was made")[2]  # the provenance, on prose too

    notebook = rendered(tiny, "notebooks/01_tiny.html")
    page = Reader(notebook)
    assert "<td><code>count</code></td><td>4</td><td>5</td><td>how many</td>" in notebook
    provenance = page.text.partition("How this page was made")[2]
    assert "count: 4 → 5" in provenance
    assert all(word in provenance for word in ("git commit", "seed", "executed", "hardware", "software"))
    assert str(tiny) not in notebook  # no local path is published
    downloaded = json.loads((tiny / "runs/p/html/_sources/notebooks/01_tiny.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in downloaded["cells"]]
    assert "count = 5" in "\n".join(sources)  # a downloaded notebook runs with the parameters of the page
    assert "run_dir = " not in "\n".join(sources)

    # What a model writes shows as text on the page, and nothing of it is markup.
    assert "<script>alert(1)</script> {result}`x` [a](javascript:b) $x$" in page.text
    assert "␛[31mred" in page.text
    assert not [attrs for tag, attrs in page.tags if "javascript:b" in (attrs.get("href") or "")]

    # Nothing is fetched from another host.
    fetched = [a.get("src") or a.get("href") or "" for tag, a in page.tags if tag in ("script", "img", "link")]
    assert not [address for address in fetched if address.startswith(("http", "//"))]

    # Built again, nothing is executed; with another page of prose neither.
    executed = tiny / "runs/p/notebooks/01_tiny.ipynb"
    before = executed.stat().st_mtime_ns
    (tiny / "book/intro.md").write_text(INTRO + "\nMore.\n")
    capsys.readouterr()
    build(tiny)
    assert "01_tiny: unchanged" in capsys.readouterr().out
    assert executed.stat().st_mtime_ns == before
    assert "More." in rendered(tiny, "book/intro.html")

    # An unknown result is a red build, and stays red when nothing is changed.
    (tiny / "book/intro.md").write_text(INTRO + "\n{result}`asr/y`\n")
    for _ in range(2):
        with pytest.raises(DertaError, match="result 'asr/y': the run has no such key"):
            build(tiny)
    # So is a dangling reference.
    (tiny / "book/intro.md").write_text(INTRO + "\n{ref}`nowhere`\n")
    with pytest.raises(DertaError, match="nowhere"):
        build(tiny)
    (tiny / "book/intro.md").write_text(INTRO)

    # A build that was stopped leaves pages that Sphinx thinks it wrote.
    build(tiny)
    (tiny / "runs/p/html/index.html").unlink()
    (tiny / "runs/p/html/book/intro.html").write_text("old")
    build(tiny)
    assert "More." not in rendered(tiny, "book/intro.html")
    assert "n = 5, of 5" in Reader(rendered(tiny, "book/intro.html")).text
    # A damaged part is made again.
    (tiny / "runs/p/parts/01_tiny.json").write_text("[]")
    build(tiny)
    assert executed.stat().st_mtime_ns > before

    # Another parameter executes again, and the pages of prose follow the results.
    build(tiny, "count=7")
    assert "n = 7, of 7" in Reader(rendered(tiny, "book/intro.html")).text


@pytest.mark.slow
def test_a_broken_cell_stops_the_book_and_is_kept_for_inspection(tiny):
    write_notebook(tiny, put='print("so far")\n1 / 0')
    try:
        with pytest.raises(
            DertaError, match=r"01_tiny.ipynb, cell \[5\].*ZeroDivisionError: division by zero"
        ) as error:
            build(tiny, name="broken")
        assert "\n" not in str(error.value)
        assert "so far" in (tiny / "runs/broken/unfinished/01_tiny.ipynb").read_text()
        assert not (tiny / "runs/broken/notebooks/01_tiny.ipynb").exists()
        assert not (tiny / "runs/broken/html").exists()
        hidden = "from derta_lib.runs import open_run\nimport pandas as pd\nrun = open_run('01_tiny', run_dir, {})\n"
        write_notebook(
            tiny, open=f"{hidden}if True:\n    run.table('t', pd.DataFrame({{'a': [1]}}), 'A table')", put="pass"
        )
        with pytest.raises(DertaError, match="no cell shows table-t; let a cell end with it"):
            build(tiny, name="broken")
        write_notebook(tiny, open="pass", put="pass")
        with pytest.raises(DertaError, match="never calls open_run"):
            build(tiny, name="broken")
    finally:
        write_notebook(tiny)


def test_bad_requests_stop_before_anything_runs(tiny):
    with pytest.raises(UsageError, match="Did you mean 'count'"):
        build(tiny, "cuont=3", name="never")
    with pytest.raises(UsageError, match="'many' is not of type int"):
        build(tiny, "count=many", name="never")
    with pytest.raises(UsageError, match="no profile 'q'; the profiles are p"):
        build_book(tiny, "q", [], "never")
    with pytest.raises(UsageError, match="run name"):
        build(tiny, name="../x")
    with pytest.raises(UsageError, match=r"no _toc\.yml"):
        build_book(tiny / "book", "p", [], "never")
    (tiny / "book/extra.md").write_text("It fell to 12.5 %.\n")
    try:
        with pytest.raises(DertaError, match=re.escape("extra.md, line 1: '12.5 %'")):
            build(tiny, name="never")
    finally:
        (tiny / "book/extra.md").unlink()
    assert not (tiny / "runs/never").exists()


def test_a_page_that_is_removed_leaves_the_book(tiny):
    toc, extra = tiny / "_toc.yml", tiny / "book" / "extra.md"
    before = toc.read_text()
    extra.write_text("# Extra\n")
    toc.write_text(f"{before}- file: book/extra\n")
    build(tiny)
    assert "Extra" in rendered(tiny, "book/extra.html")
    extra.unlink()
    toc.write_text(before)
    build(tiny)
    assert not (tiny / "runs/p/html/book/extra.html").exists()


def test_a_notebook_depends_on_the_library_but_not_on_what_only_pages_show():
    names = {path.name for path in executed_files()}
    assert {"runs.py", "tuned.py", "direct.py", "concord_texts.json", "kept_release.json"} <= names
    assert not {"book.py", "cli.py", "claims.py", "claims.json", "bench_cpu.json"} & names


def test_a_cell_that_never_ran_is_found(tmp_path):
    for count, outputs, said in (
        (None, [], "cell number 0 never ran"),
        (1, [nbformat.v4.new_output("error", ename="KeyError", evalue="x")], "failed with KeyError"),
    ):
        cell = nbformat.v4.new_code_cell("x", execution_count=count, outputs=outputs)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
        with pytest.raises(DertaError, match=said):
            check_executed(tmp_path / "n.ipynb")
        with pytest.raises(DertaError, match=said):  # emptied after it ran, and taken for unchanged
            published_notebook(tmp_path / "n.ipynb", {}, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "Success fell to 12 %.",
        "a rate of 0.35 on",
        "it is 4 times faster",
        "2.5× as fast",
        "up by 3 points",
        "41 of 79 responses",
        "about 160 tokens/s",
        ":::{note}\nonly 5 percent\n:::",
        "fine\n\n| a | 7 % |",
    ],
)
def test_a_bare_result_number_is_found(text):
    assert list(pages.bare_numbers(text))


@pytest.mark.parametrize(
    "text",
    [
        "{result}`asr/x` and {paper}`t[a=b].c`",
        "with `keep=0.15` and $\\lambda = 0.5$",
        "```python\nx = 0.5  # 12 %\n```",
        "$$\nx = 0.5\n$$",
        "Section 3.2, Python 3.11, version 0.1, equation 2",
        "a 95 % interval, a 95 % Wilson interval",
        "see [the paper](https://arxiv.org/abs/2407.09121) or https://x.org/1.5",
        "LLaMA3-70B, SmolLM2-135M, version 1.0.4",
        "five tokens, 200 questions, 60,000 pairs, Table 4, 2025",
        "---\nrate: 0.5\n---\n# Title",
        ":::{figure} x.svg\n:width: 50 %\n:::",
    ],
)
def test_what_is_no_result_is_left_alone(text):
    assert not list(pages.bare_numbers(text))


def test_bare_numbers_are_counted_in_lines_across_blanked_code():
    assert list(pages.bare_numbers("a\n\n```\n1 %\n```\n\nb 2 % and 3 %\n")) == [(7, "2 %"), (7, "3 %")]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<p>{result}`x`</p>", "shows raw"),
        ('<p><span class="problematic" id="x">?</span></p>', "did not resolve"),
        ('<p><span class="derta-result"></span></p>', "blank result"),
    ],
)
def test_a_blank_or_raw_reference_in_html_is_found(tmp_path, body, said):
    (tmp_path / "ok.html").write_text("<pre>{result}`x`</pre>")
    pages.check_html(tmp_path)
    (tmp_path / "page.html").write_text(body)
    with pytest.raises(DertaError, match=f"page.html holds .*{said}"):
        pages.check_html(tmp_path)


def test_parts_of_a_result():
    number = Number(0.125, "rate", 8, 0.02, 0.5)
    assert [shown(number, part) for part in ("value", "interval", "n")] == ["12.5 %", "2.0 to 50.0", "8"]
    with pytest.raises(DertaError, match="no part 'interval'"):
        shown(Number(3.0, "count"), "interval")


def test_repository_and_colab_come_from_the_environment(monkeypatch):
    source = (ROOT / "notebooks/03_training.ipynb").read_text()
    for name in ("GITHUB_REPOSITORY", "GITHUB_HEAD_REF", "GITHUB_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    assert "repository" not in yaml.safe_load(derived_config(ROOT))
    assert colab_notebook(source) == source
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/fork")
    monkeypatch.setenv("GITHUB_REF_NAME", "topic")
    monkeypatch.setenv("GITHUB_SHA", "abc123")
    config = yaml.safe_load(derived_config(ROOT))
    assert config["repository"] == {"url": "https://github.com/someone/fork", "branch": "topic"}
    assert config["launch_buttons"]["colab_url"]
    first = next(cell for cell in json.loads(colab_notebook(source))["cells"] if cell["cell_type"] == "code")
    line = 'source = os.environ.get("DERTA_SOURCE", "git+https://github.com/someone/fork@abc123")'
    assert line in "".join(first["source"])


@pytest.mark.slow
def test_buttons_lead_to_the_repository_being_built(tiny, monkeypatch):
    for name, value in {"REPOSITORY": "someone/fork", "REF_NAME": "main", "SHA": "abc", "HEAD_REF": ""}.items():
        monkeypatch.setenv(f"GITHUB_{name}", value)
    build(tiny, name="public")
    page = Reader((tiny / "runs/public/html/notebooks/01_tiny.html").read_text())
    links = {attrs.get("href", "") for tag, attrs in page.tags if tag == "a"}
    assert "https://colab.research.google.com/github/someone/fork/blob/colab/notebooks/01_tiny.ipynb" in links
    assert "https://github.com/someone/fork/edit/main/notebooks/01_tiny.ipynb" in links
    assert "git+https://github.com/someone/fork@abc" in (tiny / "runs/public/colab/notebooks/01_tiny.ipynb").read_text()
    assert os.environ["JUPYTER_PREFER_ENV_PATH"] == "1"
