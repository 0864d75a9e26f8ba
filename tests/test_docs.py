"""From notebooks to pages: what the docs build does with each kind of cell, name and link."""

import ast
import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from minirepo import ROOT, make_repository, write_notebook

sys.path.insert(0, str(ROOT / "docs"))

import pages  # noqa: E402


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return make_repository(tmp_path_factory.mktemp("docs") / "repository")


@pytest.fixture
def symbols(repository: Path) -> pages.Symbols:
    return pages.Symbols.of(repository / "mlvgm_mi")


def code(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": source, "outputs": list(outputs)}


def stream(name: str, text: str) -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def shown(data: dict) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def text_of(notebook: dict) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"])


# ---- names ---------------------------------------------------------------------------------------------------


def test_names_are_found_with_their_modules(symbols: pages.Symbols):
    assert symbols.find("double").module == "mlvgm_mi.base"
    assert symbols.find("Counter.count").name == "Counter.count"
    assert symbols.find("nothing") is None


def test_a_name_that_two_modules_have_means_the_nearer_one(symbols: pages.Symbols):
    double = symbols.by_name["double"][0]
    twice = pages.Symbols({"double": [double, pages.Symbol("mlvgm_mi.other", "double", double.node, double.source)]})
    assert twice.find("double") is None
    assert twice.seen_from("mlvgm_mi.other").find("double").module == "mlvgm_mi.other"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("see `double`", "see {py:obj}`double <mlvgm_mi.base.double>`"),
        ("`double()` it", "{py:obj}`double() <mlvgm_mi.base.double>` it"),
        ("`Counter.count`", "{py:obj}`Counter.count <mlvgm_mi.base.Counter.count>`"),
        ("`x` is unknown, ``double`` is literal", "`x` is unknown, ``double`` is literal"),
        ("{py:obj}`double` is one already", "{py:obj}`double` is one already"),
        ("```python\n`double`\n```", "```python\n`double`\n```"),
    ],
)
def test_inline_code_becomes_a_reference(symbols: pages.Symbols, text: str, expected: str):
    assert pages.link_code(text, symbols) == expected


def test_a_function_shows_its_signature_as_written(symbols: pages.Symbols):
    page = pages.describe("double", symbols)
    assert "```python\ndef double(\n    x: float,  # any number\n) -> float\n```" in page
    assert page.count("return 2 * x") == 1, "the body belongs under Source and nowhere else"


def test_a_class_shows_fields_and_public_methods(symbols: pages.Symbols):
    outline = pages.describe("Counter", symbols).split("```")[1]
    assert "step: int = 1  # how far" in outline
    assert 'def count(self, n: int) -> int:\n        "The number after `n`."' in outline
    assert "return" not in outline


def test_one_line_definitions_have_a_signature():
    tree = ast.parse("def f(x: int) -> int: return x")
    assert pages.signature(tree.body[0], ["def f(x: int) -> int: return x"]).startswith("def f(x: int) -> int")


# ---- cells ---------------------------------------------------------------------------------------------------


def test_directives_go_and_outputs_stay(symbols: pages.Symbols):
    notebook = {"cells": [code("#| eval: false\nx = 1\nx", shown({"text/plain": "1"}))]}
    (cell,) = pages.library_page(notebook, symbols)["cells"]
    assert "".join(cell["source"]) == "x = 1\nx"
    assert cell["outputs"][0]["data"] == {"text/plain": "1"}


@pytest.mark.parametrize("first, tag", [("#| echo: false", "remove-input"), ("#| code-fold: true", "hide-input")])
def test_directives_that_fold_code(symbols: pages.Symbols, first: str, tag: str):
    (cell,) = pages.library_page({"cells": [code(f"{first}\nx")]}, symbols)["cells"]
    assert cell["metadata"]["tags"] == [tag]


def test_progress_bars_and_widgets_are_dropped(symbols: pages.Symbols):
    widget = shown({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "slider"})
    notebook = {"cells": [code("x", stream("stderr", "10%"), widget, stream("stdout", "kept"))]}
    (cell,) = pages.library_page(notebook, symbols)["cells"]
    assert [output["text"] for output in cell["outputs"]] == ["kept"]


def test_documented_names_stand_in_source_order(symbols: pages.Symbols):
    notebook = {"cells": [code("show_doc(Counter)"), code("show_doc(double)")]}
    page = text_of(pages.library_page(notebook, symbols))
    assert page.index("### {py:obj}`double") < page.index("### {py:obj}`Counter")


def test_experiments_fold_code_and_drop_hidden_cells(symbols: pages.Symbols):
    title = {"cell_type": "markdown", "metadata": {}, "source": "# Title\n\n> What it asks."}
    notebook = {"cells": [title, code("#| hide\nsecret = 1"), code("x = 1", stream("stdout", "done"))]}
    first, second = pages.experiment_page(notebook, symbols)["cells"]
    assert "{.lead}\nWhat it asks." in "".join(first["source"])
    assert second["metadata"]["tags"] == ["hide-input"] and second["outputs"]


def test_experiments_fold_code_that_shows_nothing_with_what_follows(symbols: pages.Symbols):
    notebook = {"cells": [code("a = 1"), code("b = 2"), code("c", stream("stdout", "done")), code("d = 4")]}
    first, second = pages.experiment_page(notebook, symbols)["cells"]
    assert "".join(first["source"]) == "a = 1\n\nb = 2\n\nc" and first["outputs"]
    assert "".join(second["source"]) == "d = 4"


# ---- docstrings and files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "markdown, rst",
    [
        ("the `x` of `f(*args)`", "the ``x`` of ``f(*args)``"),
        ("plural `x`s", "plural ``x``\\s"),
        ("*stars* and |bars| and x_ end", "\\*stars* and \\|bars\\| and x\\_ end"),
        ("snake_case is left alone", "snake_case is left alone"),
        ("math $x_k^2$ inside", "math :math:`x_k^2` inside"),
        ("already ``literal``", "already ``literal``"),
    ],
)
def test_docstrings_become_rst(markdown: str, rst: str):
    assert pages.docstring_to_rst([markdown]) == [rst]


def test_links_lead_to_pages_and_files_come_along(tmp_path: Path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"png")
    (tmp_path / "LICENSE").write_text("licence")
    text = '[nb](nbs/00_x.ipynb) ![f](figures/a.png) <img src="figures/a.png"> [L](LICENSE) [w](https://x.org) [b](#b)'
    page = pages.place_markdown(text, tmp_path, tmp_path / "site", {"nbs/00_x.ipynb": "library/00_x.ipynb"})
    assert page == text.replace("nbs/", "library/")
    copied = (path for path in (tmp_path / "site").rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(tmp_path / "site")) for path in copied) == ["LICENSE", "figures/a.png"]


def test_a_link_to_a_folder_becomes_text(tmp_path: Path):
    (tmp_path / "results").mkdir()
    assert pages.place_markdown("see [results](results/)", tmp_path, tmp_path, {}) == "see results"


# ---- the whole site ------------------------------------------------------------------------------------------

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TABLE = "<table class='dataframe'><tr><td>nats</td></tr></table>"


def build(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "docs" / "build.py"), "--jobs", "1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=root.parent)


@pytest.fixture(scope="module")
def site(repository: Path) -> Path:
    "The small repository's site, with an executed experiment that has a picture and a table."
    ignore = shutil.ignore_patterns("_generated", "__pycache__")
    shutil.copytree(ROOT / "docs", repository / "docs", ignore=ignore)
    links = "[base](../nbs/00_base.ipynb), ![a dot](../figures/dot.png), [home](../README.md)"
    (repository / "docs" / "results.md").write_text(f"# Found\n\n{links}.\n")
    with open(repository / "README.md", "a") as file:
        file.write("\nMore in [Results](docs/results.md#found).\n")
    (repository / "figures").mkdir()
    (repository / "figures" / "dot.png").write_bytes(base64.b64decode(PIXEL))
    executed = repository / "results" / "quick" / "notebooks" / "trial.ipynb"
    write_notebook(executed, ["# A trial\n\n> Does it double?", "table", "picture"])
    notebook = json.loads(executed.read_text())
    for cell, data in zip(notebook["cells"][1:], ({"text/html": TABLE}, {"image/png": PIXEL})):
        cell["outputs"] = [shown(data)]
    executed.write_text(json.dumps(notebook))
    done = build(repository)
    assert done.returncode == 0, done.stderr
    return repository / "_site"


@pytest.mark.slow
def test_the_site_shows_math_figures_tables_and_references(site: Path):
    base, trial = (site / page for page in ("library/00_base.html", "experiments/trial.html"))
    assert 'class="math' in base.read_text() and "api/mlvgm_mi/base/index.html#mlvgm_mi.base.double" in base.read_text()
    assert "dataframe" in trial.read_text() and "<img" in trial.read_text()
    assert "_images/dot.png" in (site / "index.html").read_text() and (site / "_images" / "dot.png").exists()
    assert (site / "_static" / "mathjax.js").stat().st_size > 1_000_000


@pytest.mark.slow
def test_pages_of_prose_lead_to_each_other_and_to_notebooks(site: Path):
    assert 'href="results.html#found"' in (site / "index.html").read_text()
    found = (site / "results.html").read_text()
    assert 'href="library/00_base.html"' in found and 'href="index.html"' in found and "_images/dot.png" in found


@pytest.mark.slow
def test_the_site_asks_nobody_for_anything(site: Path):
    elsewhere = r'[^>]*(?:src|href)="(?:https?:)?//'
    asking = re.compile(rf"<(?:script|img|iframe){elsewhere}|<link[^>]*stylesheet{elsewhere}")
    assert [page.name for page in site.rglob("*.html") if asking.search(page.read_text())] == []


@pytest.mark.slow
def test_the_docs_leave_the_notebooks_alone(site: Path, repository: Path):
    names = sorted(str(path.relative_to(repository / "nbs")) for path in (repository / "nbs").rglob("*"))
    assert names == ["00_base.ipynb", "01_next.ipynb", "experiments", "experiments/.notest", "experiments/trial.ipynb"]


@pytest.mark.slow
def test_a_broken_link_fails_the_build(site: Path, repository: Path, tmp_path: Path):
    broken = shutil.copytree(repository, tmp_path / "broken", ignore=shutil.ignore_patterns("_site", "_generated"))
    (broken / "README.md").write_text("# broken\n\n![none](figures/none.png)\n")
    done = build(broken)
    assert done.returncode != 0 and "none.png" in done.stderr
    assert not (broken / "_site").exists()
