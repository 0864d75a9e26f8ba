"""A very small repository of the same make: two library notebooks, one experiment, everything in order."""

import shutil
from pathlib import Path

import nbformat
from gates import PACKAGE, tool

ROOT = Path(__file__).resolve().parents[1]

BASE = [
    "# base\n\n> What everything else rests on.",
    "Powers, as in $x^2$. The function is called `double`.",
    "#| default_exp base",
    "#| export\nimport math",
    '''#| export
def double(
    x: float,  # any number
) -> float:
    "Twice `x`; `|x|` and x_ stay as they are."
    return 2 * x * math.cos(0)


class Counter:
    "Counts."

    step: int = 1  # how far

    def count(self, n: int) -> int:
        "The number after `n`."
        return n + self.step''',
    "The double of two:",
    "double(2)",
]
NEXT = [
    "# next\n\n> What comes after the base.",
    "#| default_exp next",
    "#| export\nfrom mlvgm_mi.base import double",
    '#| export\ndef quadruple(x: float) -> float:\n    "Four times `x`, see `double`."\n    return double(double(x))',
    "#| hide\nassert quadruple(1) == 4",
    "quadruple(2)",
]
TRIAL = ["# A trial\n\n> Does it double?", "n = 3", "The answer:", "[2 * i for i in range(n)]"]


def write_notebook(path: Path, sources: list[str], shown: str = "4") -> None:
    "A clean notebook: sources that start like prose become markdown; the last cell has an output."
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    for i, source in enumerate(sources):
        prose = source.startswith("# ") or source[0].isupper()
        cell = (nbformat.v4.new_markdown_cell if prose else nbformat.v4.new_code_cell)(source)
        cell["id"] = f"cell{i}"
        notebook.cells.append(cell)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": shown}, metadata={})]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def make_repository(root: Path) -> Path:
    "Write the repository below `root`, which should not exist."
    (root / PACKAGE).mkdir(parents=True)
    for name in ("settings.ini", "pyproject.toml", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, root)
    shutil.copy(ROOT / PACKAGE / "__init__.py", root / PACKAGE)
    (root / "README.md").write_text("# mini\n\nSee [the base](nbs/00_base.ipynb) and ![a figure](figures/dot.png).\n")
    write_notebook(root / "nbs" / "00_base.ipynb", BASE)
    write_notebook(root / "nbs" / "01_next.ipynb", NEXT, "8")
    write_notebook(root / "nbs" / "experiments" / "trial.ipynb", TRIAL, "[0, 2, 4]")
    _tag_parameters(root / "nbs" / "experiments" / "trial.ipynb")
    (root / "nbs" / "experiments" / ".notest").touch()
    for command in ("nbdev_export", "nbdev_clean"):
        tool(root, command).check_returncode()
    return root


def _tag_parameters(path: Path) -> None:
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
