"""The page of the bench shows the kept numbers and the machine they were measured on."""

import re
import shutil
from io import StringIO
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from derta_lib import sphinx_bench
from derta_lib.records import read_json, write_json
from derta_lib.results import Number


def test_the_page_shows_the_kept_numbers_and_their_machine(tmp_path, monkeypatch):
    numbers = {
        "machine/matrix_peak": Number(2000.0, "GFLOP/s"),
        "train/authors/triples": Number(1.5, "triples/s", 3),
        "train/ours/peak_share": Number(0.625, "rate", 3),
        "generate/static/tokens": Number(160.0, "tokens/s", 3),
    }
    machine = {
        "cpu": "Some CPU",
        "gpu": None,
        "threads": 2,
        "precision": "float32",
        "versions": {"torch": "2.0", "transformers": "5.0"},
        "git": {"sha": "0123456789", "dirty": False},
    }
    request = {"model": "reference", "device": "cpu", "triples": 8, "rounds": 3}
    kept = {"date": "2026-01-02", "machine": machine, "request": request}
    write_json(tmp_path / "bench_cpu.json", kept | {"numbers": {key: vars(number) for key, number in numbers.items()}})
    monkeypatch.setattr(sphinx_bench, "KEPT", tmp_path)
    source, warnings = tmp_path / "source", StringIO()
    shutil.copytree(Path(__file__).parents[1] / "book" / "_static", source / "_static")
    page = (Path(__file__).parents[1] / "book" / "speed.md").read_text(encoding="utf-8")
    (source / "index.md").write_text(f"{page}\n$$x$$ (eq:derta)\n", encoding="utf-8")  # the notebook's label
    (source / "conf.py").write_text(
        'extensions = ["myst_parser", "derta_lib.sphinx_bench"]\nmyst_enable_extensions = ["dollarmath"]'
    )
    with docutils_namespace():
        Sphinx(source, source, tmp_path / "html", tmp_path / "trees", "html", status=None, warning=warnings).build()
    text = re.sub(r"(<[^>]+>|\s)+", " ", (tmp_path / "html" / "index.html").read_text())
    assert warnings.getvalue() == ""
    for said in (
        "2026-01-02 at commit 0123456 with derta bench --model reference --device cpu",
        "Some CPU, 2 threads",
        "2,000 GFLOP/s",
        "1.50 triples/s",
        "62.5 %",
        "160.00 tokens/s",
    ):
        assert said in text


def test_every_kept_figure_has_its_place_in_the_tables():
    kept = sorted(sphinx_bench.KEPT.glob("bench_*.json"))
    assert kept
    for path in kept:
        numbers = read_json(path)["numbers"]
        for part in sphinx_bench.PARTS:
            sphinx_bench.part_table(part, numbers)
