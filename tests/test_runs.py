import hashlib
import json
import subprocess
import sys
from html.parser import HTMLParser
from urllib.request import urlopen

import pandas as pd
import pytest

from derta_lib.display import show_text
from derta_lib.errors import DertaError, UsageError
from derta_lib.results import Number
from derta_lib.runs import git_state, kept_items, merge, open_run, project_root, typeset

HOSTILE = (
    "<script>alert(1)</script> {result}`x` [a](javascript:b) $x$ \x1b[31mred\x1b[0m\x00 \u202eevil </pre><b>"
    + "y" * 5000
)


class Reader(HTMLParser):
    """An independent reading of HTML: the tags it holds and the text a reader would see."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_parameter_of_another_type_stops_the_notebook(tmp_path, monkeypatch):
    """As papermill passes it on; a kernel's __main__ holds the annotations of the parameters cell."""
    monkeypatch.setattr(sys.modules["__main__"], "__annotations__", {"steps": int}, raising=False)
    with pytest.raises(UsageError, match="parameter 'steps' is int: 'twenty' is not"):
        open_run("01_a", str(tmp_path / "r"), {"steps": "twenty"})
    assert not (tmp_path / "r").exists()


def test_numbers_and_records_reach_the_merged_files(tmp_path):
    run = open_run("01_a", str(tmp_path / "r"), {"steps": 3})
    assert run.put("asr/x/direct", Number(0.5, n=4, low=0.1, high=0.9)).n == 4
    run.record("dropped", 2)
    open_run("02_b", str(tmp_path / "r"), {}).put("speed", Number(10.0, "tokens/s"))
    numbers, manifest = merge(tmp_path / "r")
    assert numbers == {"asr/x/direct": Number(0.5, "rate", 4, 0.1, 0.9), "speed": Number(10.0, "tokens/s")}
    assert json.loads((tmp_path / "r/results.json").read_text())["speed"]["value"] == 10.0
    assert manifest["notebooks"]["01_a"]["parameters"] == {"steps": 3}
    assert manifest["notebooks"]["01_a"]["records"] == {"dropped": 2}
    assert manifest["results_from"]["speed"] == "02_b"


def test_a_notebook_run_again_replaces_only_its_own_numbers(tmp_path):
    open_run("01_a", str(tmp_path), {}).put("old", Number(1.0))
    open_run("02_b", str(tmp_path), {}).put("kept", Number(1.0))
    open_run("01_a", str(tmp_path), {}).put("new", Number(1.0))
    assert set(merge(tmp_path)[0]) == {"new", "kept"}


def test_a_key_of_two_notebooks_must_hold_the_same_number(tmp_path):
    for name in ("01_a", "02_b"):
        open_run(name, str(tmp_path), {}).put("same", Number(1.0))
    assert merge(tmp_path)[0] == {"same": Number(1.0)}
    open_run("02_b", str(tmp_path), {}).put("same", Number(0.5))
    with pytest.raises(DertaError, match="'same' differs between 01_a and 02_b"):
        merge(tmp_path)


def test_outcomes_are_kept_by_item(tmp_path):
    open_run("01_a", str(tmp_path), {}).put("asr", Number(0.5, n=2), items={"q1": 1, "q2": False})
    assert kept_items(tmp_path) == {"asr": {"q1": 1.0, "q2": 0.0}}
    assert "items" not in merge(tmp_path)[1]["notebooks"]["01_a"]


def test_bad_names_and_values_are_refused(tmp_path):
    with pytest.raises(UsageError, match="notebook name"):
        open_run("../x", str(tmp_path), {})
    run = open_run("01_a", str(tmp_path), {})
    with pytest.raises(DertaError, match="result key"):
        run.put("a key", Number(1.0))
    with pytest.raises(DertaError, match="NaN"):
        run.put("a", Number(float("nan")))
    with pytest.raises(DertaError, match="no notebook has run here"):
        merge(tmp_path / "nothing")


def test_a_notebook_alone_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "_toc.yml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert project_root() == tmp_path
    assert open_run("01_a", "", {}).folder == tmp_path / "runs" / "01_a"


def test_the_same_figure_is_the_same_file_with_its_data_beside_it(tmp_path):
    from matplotlib.figure import Figure

    frame = pd.DataFrame({"x": [1, 2], "y": [0.25, 0.5]})
    shown = []
    for name in ("a", "b"):
        figure = Figure()
        figure.subplots().plot(frame["x"], frame["y"])
        figure.set_label('y rises "from" x')
        shown.append(open_run("01_a", str(tmp_path / name), {}).figure("line", figure, frame))
    assert (tmp_path / "a/figures/line.svg").read_bytes() == (tmp_path / "b/figures/line.svg").read_bytes()
    assert pd.read_csv(tmp_path / "a/figures/line.csv").equals(frame)
    tags = dict(Reader(shown[0].markup).tags)
    assert tags["img"]["alt"] == 'y rises "from" x'
    assert pd.read_csv(urlopen(tags["a"]["href"])).equals(frame)  # the link alone holds the data
    with pytest.raises(DertaError, match="figure 'line': its label is empty"):
        open_run("01_a", str(tmp_path), {}).figure("line", Figure(), frame)


def test_a_table_shows_text_as_text(tmp_path):
    frame = pd.DataFrame({"attack": ["<b>x</b>"], "rate": [0.5]})
    shown = Reader(open_run("01_a", str(tmp_path), {}).table("t", frame, "Attacks & rates").markup)
    assert "b" not in [tag for tag, _ in shown.tags]
    assert "<b>x</b>" in shown.text
    assert "Attacks & rates" in shown.text


def test_model_output_shows_as_text_whatever_it_holds():
    shown = Reader(show_text(HOSTILE, label="<i>who</i>").markup)
    assert [tag for tag, _ in shown.tags] == ["div", "pre"]
    assert "overflow-wrap:anywhere" in shown.tags[1][1]["style"]
    assert "<script>alert(1)</script> {result}`x` [a](javascript:b) $x$" in shown.text
    assert "␛[31mred␛[0m␀" in shown.text
    assert "<U+202E>evil" in shown.text
    assert "y" * 5000 in shown.text
    assert "<i>who</i>" in shown.text


def test_the_manifest_knows_commit_and_dirt(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True)

    assert git_state(tmp_path) == {"sha": None, "dirty": None}
    git("init", "-q")
    library = tmp_path / "library"
    library.mkdir()
    (library / "code.py").touch()
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert git_state(library)["dirty"] is False
    assert len(git_state(library)["sha"]) == 40
    installed = tmp_path / ".venv" / "library"  # in another repository's folder, but none of its files
    installed.mkdir(parents=True)
    (installed / "code.py").touch()
    assert git_state(installed) == {"sha": None, "dirty": None}
    assert git_state(library)["dirty"] is True


def test_the_data_are_recorded_by_content(tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(b"{}\n")
    open_run("01_a", str(tmp_path / "r"), {"data": str(tmp_path)})
    open_run("02_b", str(tmp_path / "r"), {"data": ""})
    notebooks = merge(tmp_path / "r")[1]["notebooks"]
    digest = hashlib.sha256(b"{}\n").hexdigest()
    assert notebooks["01_a"]["records"] == {"sha256/pairs.jsonl": digest}
    assert notebooks["02_b"]["records"] == {}


def test_a_table_names_methods_and_attacks_in_words_and_keeps_a_number_whole(tmp_path):
    frame = pd.DataFrame({"method": ["harmful_prefix"], "attack": ["pair"], "first_5": ["6.2 % [1.1, 28.3], n = 16"]})
    run = open_run("01_a", str(tmp_path), {})
    shown = Reader(run.table("t", frame, "Rates").markup).text
    for said in (
        "harmful prefix",
        "PAIR",
        "first 5",
        "6.2\N{NO-BREAK SPACE}%",
        "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}16",
    ):
        assert said in shown
    assert pd.read_csv(tmp_path / "tables/t.csv").equals(frame)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-2.0 points [-5.2, 1.2], n = 500", "−2.0_points [−5.2,_1.2], n_=_500"),
        ("<td>-0.4</td><td>n = 1,200</td>", "<td>−0.4</td><td>n_=_1,200</td>"),
        ("llama-3, GPT-4 and 45-50, 2026-11-28", "llama-3, GPT-4 and 45-50, 2026-11-28"),
    ],
)
def test_numbers_are_set_with_minus_signs_and_unbroken(text, said):
    assert typeset(text) == said.replace("_", "\N{NO-BREAK SPACE}")


def test_a_figure_or_table_stays_in_its_folder(tmp_path):
    from matplotlib.figure import Figure

    run, frame = open_run("01_a", str(tmp_path / "r"), {}), pd.DataFrame({"x": [1]})
    drawn = Figure()
    drawn.set_label("x")
    with pytest.raises(UsageError, match=r"figures name '\.\./\.\./x'"):
        run.figure("../../x", drawn, frame)
    with pytest.raises(UsageError, match=r"tables name '\.\./\.\./x'"):
        run.table("../../x", frame, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_data_in_the_home_folder_are_recorded_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs.jsonl").write_bytes(b"{}\n")
    assert list(open_run("01_a", str(tmp_path / "r"), {"data": "~"}).records) == ["sha256/pairs.jsonl"]
