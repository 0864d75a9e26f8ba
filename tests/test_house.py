"""The gates hold for this repository, and each of them is seen to fail on a repository that breaks its rule."""

import json
import shutil
from pathlib import Path
from typing import Callable

import pytest
from gates import GATES, tool
from minirepo import ROOT, make_repository

pytestmark = pytest.mark.gate


@pytest.mark.parametrize("name", GATES)
def test_gate(name: str):
    violations = GATES[name](ROOT)
    assert not violations, f"{GATES[name].__doc__}\n" + "\n".join(violations)


@pytest.fixture(scope="session")
def orderly(tmp_path_factory) -> Path:
    return make_repository(tmp_path_factory.mktemp("house") / "orderly")


@pytest.mark.parametrize("name", GATES)
def test_gate_is_open_where_all_is_in_order(name: str, orderly: Path):
    assert GATES[name](orderly) == []


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    "Replace text in a file of the repository; in a notebook, in the source of a cell."
    if path.endswith(".ipynb"):
        old, new = (json.dumps(part)[1:-1] for part in (old, new))
    return edit_raw(path, old, new)


def edit_raw(path: str, old: str, new: str) -> Callable[[Path], None]:
    "Replace text in a file of the repository."

    def apply(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return apply


def append(path: str, text: str) -> Callable[[Path], None]:
    "Add text at the end of a file, which is made if need be."

    def apply(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with open(root / path, "a") as file:
            file.write(text)

    return apply


def exported(*cells: str) -> Callable[[Path], None]:
    "Add exported cells to the first notebook and export."

    def apply(root: Path) -> None:
        path = root / "nbs" / "00_base.ipynb"
        notebook = json.loads(path.read_text())
        for i, cell in enumerate(cells):
            code = {"cell_type": "code", "id": f"new{i}", "metadata": {}, "execution_count": None, "outputs": []}
            notebook["cells"].insert(5 + i, code | {"source": f"#| export\n{cell}"})
        path.write_text(json.dumps(notebook))
        tool(root, "nbdev_export").check_returncode()

    return apply


def drop_outputs(root: Path) -> None:
    path = root / "nbs" / "01_next.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][-1]["outputs"] = []
    path.write_text(json.dumps(notebook))


def twin(name: str) -> Callable[[Path], None]:
    "Copy the first notebook to another name."
    return lambda root: shutil.copy(root / "nbs" / "00_base.ipynb", root / "nbs" / name)


def code(text: str) -> Callable[[Path], None]:
    "Add code to the module of the first notebook."
    return append("mlvgm_mi/base.py", f"\n{text}\n")


LONG = "\n".join(f"    x = {i}" for i in range(61))
MIDDLING = "\n".join(f"def f{i}():\n" + "    x = 1\n" * 26 for i in range(3))
BRANCHES = "    if x:\n        x = 1\n" * 9
FUNCTION = "def f(x):\n" + "    x += 1\n" * 6
TRIAL = "nbs/experiments/trial.ipynb"

VIOLATIONS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a module edited by hand": ("export_in_sync", edit("mlvgm_mi/base.py", "2 * x", "3 * x")),
    "a notebook not exported": ("export_in_sync", edit("nbs/00_base.ipynb", "2 * x", "3 * x")),
    "a module without a notebook": ("export_in_sync", append("mlvgm_mi/stray.py", "x = 1\n")),
    "metadata in a cell": ("notebooks_clean", edit_raw("nbs/01_next.ipynb", '"metadata": {}', '"metadata": {"a": 1}')),
    "an import of a later module": ("import_order", code("from mlvgm_mi.next import quadruple")),
    "an import inside a function": ("import_order", code("def f():\n    import mlvgm_mi.next")),
    "an import of the package itself": ("import_order", code("from mlvgm_mi import __version__")),
    "a relative import": ("import_order", code("from .next import quadruple")),
    "no description": ("notebook_shape", edit("nbs/00_base.ipynb", "> What everything else rests on.", "")),
    "another module name": ("notebook_shape", edit("nbs/00_base.ipynb", "default_exp base", "default_exp basis")),
    "a number used twice": ("notebook_shape", twin("00_base2.ipynb")),
    "a name without a number": ("notebook_shape", twin("base.ipynb")),
    "a long exported cell": ("notebook_shape", exported("def f():\n" + LONG)),
    "imports among other code": ("notebook_shape", exported("import os\nx = 1")),
    "nothing to see at the end": ("notebook_shape", drop_outputs),
    "a result under nbs": ("notebook_shape", append("nbs/table.csv", "a,b\n")),
    "an experiment without parameters": ("experiment_shape", edit(TRIAL, "parameters", "other")),
    "an experiment with a long function": ("experiment_shape", edit(TRIAL, "n = 3", FUNCTION)),
    "experiments under test": ("experiment_shape", lambda root: (root / "nbs/experiments/.notest").unlink()),
    "a long line": ("ruff", edit("nbs/01_next.ipynb", "quadruple(2)", "quadruple(2)  # " + "long " * 30)),
    "an untyped argument": ("ruff", code('def f(x) -> int:\n    "Doc."\n    return 1')),
    "an undocumented function": ("ruff", exported("def f() -> int:\n    return 1")),
    "a complex function": ("ruff", code(f'def f(x: int) -> int:\n    "Doc."\n{BRANCHES}    return x')),
    "numpy's global state": ("ruff", code("import numpy as np\nx = np.random.rand()")),
    "a name only the notebook has": ("pyflakes", code("def f():\n    return undefined")),
    "a long module": ("budgets", code("x = 1\n" * 351)),
    "a long function": ("budgets", code(f"def f():\n{LONG}")),
    "many middling functions": ("budgets", code(MIDDLING)),
    "an undocumented method": ("methods_documented", code("class A:\n    def f(self): ...")),
    "a global seed": ("safe_calls", code("import torch\ntorch.manual_seed(0)")),
    "a pickle": ("safe_calls", code("import pickle\npickle.loads(b'')")),
    "a load that executes": ("safe_calls", code("import torch\ntorch.load('x', weights_only=False)")),
    "a fixed device": ("safe_calls", code("def f(x): return x.mean().cuda()")),
    "a path of one machine": ("no_traces", append("notes.md", "see " + "/home" + "/someone/file\n")),
    "a registry's address": ("no_traces", append("notes.md", "https://" + "pypi" + ".org/simple\n")),
    "another version in the citation": ("one_version", edit("CITATION.cff", "\nversion: 0", "\nversion: 9")),
    "another version in the changelog": ("one_version", edit("CHANGELOG.md", "## [Unreleased]", "## [99.0.0]")),
    "a column missing": ("result_columns", append("results/quick/delta.csv", "generator,group\n")),
}


@pytest.mark.parametrize("case", VIOLATIONS)
def test_gate_closes(case: str, orderly: Path, tmp_path: Path):
    gate, violate = VIOLATIONS[case]
    disorderly = shutil.copytree(orderly, tmp_path / "disorderly")
    violate(disorderly)
    assert GATES[gate](disorderly)


def test_every_gate_has_a_violation():
    assert {gate for gate, _ in VIOLATIONS.values()} == set(GATES)
