"""Build the website: notebooks and README in, `_site` out. Needs no network and no Quarto.

`pages` turns the library notebooks, the executed experiments and the markdown files of the repository into sources
below `docs/_generated`; Sphinx builds the site from them, warnings are errors.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
from pages import Symbols, experiment_page, library_page, place_markdown, toctree, write_notebook

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mlvgm_mi"
PROJECT_FILES = {"CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing", "CODE_OF_CONDUCT.md": "conduct"}
RESULTS = {"docs/results.md": "results.md"}


# The library's pages by the number they begin with, in the order of the sidebar.
SECTIONS = {"Guides": ("11", "12", "13", "14", "15"), "Foundations": ("00", "01", "02", "03"), "Generators": ("04",),
            "Information and recipes": ("05", "06", "07"), "Views and training": ("08", "09"), "Judgement": ("10",)}


class Processors(FilterDefaults):
    "nbdev's processors for the docs, without the one that executes exported code and the one that links names."

    def base_procs(self) -> list:
        "Names are linked in `pages`, and what `show_doc` would print is made there."
        left_out = ("exec_show_docs", "add_links")
        return [processor for processor in super().base_procs() if processor.__name__ not in left_out]


def module_of(notebook: dict) -> str:
    "The module that a notebook is exported to."
    for cell in notebook["cells"]:
        if found := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.M):
            return f"{PACKAGE}.{found[1]}"
    return ""


def write_library(root: Path, source: Path, symbols: Symbols) -> dict[str, str]:
    "Pages of the library in reading order: path in the repository -> page."
    pages = {}
    for path in sorted((root / "nbs").glob("*.ipynb")):
        notebook = read_nb(path)
        here = symbols.seen_from(module_of(notebook))
        Processors()(notebook)
        pages[f"nbs/{path.name}"] = f"library/{path.stem}.ipynb"
        write_notebook(library_page(notebook, here), source / pages[f"nbs/{path.name}"])
    return pages


def executed_experiments(root: Path) -> list[Path]:
    "Executed notebooks by name, each of the best profile that has it."
    folders = [root / "results" / profile / "notebooks" for profile in ("quick", "full")]
    found = {path.name: path for folder in folders for path in folder.glob("*.ipynb")}
    return [found[name] for name in sorted(found)]


def write_experiments(root: Path, source: Path, symbols: Symbols) -> dict[str, str]:
    "Pages of the experiments: path in the repository (of the template and of the executed notebook) -> page."
    pages = {}
    for path in executed_experiments(root):
        page = f"experiments/{path.stem}"
        write_notebook(experiment_page(json.loads(path.read_text(encoding="utf-8")), symbols), source / f"{page}.ipynb")
        for origin in (f"nbs/experiments/{path.name}", path.relative_to(root).as_posix()):
            pages[origin] = f"{page}.ipynb"
    return pages


def numbered(pages: list[str], *numbers: str) -> list[str]:
    "The pages `folder/<number><name>` with one of these numbers."
    return [page for page in pages if page.rpartition("/")[2].startswith(numbers)]


def write_home(root: Path, source: Path, library: dict[str, str], experiments: dict[str, str]) -> None:
    "The README with the site's contents appended, and the other markdown files of the repository."
    project = {name: f"{page}.md" for name, page in PROJECT_FILES.items() if (root / name).exists()}
    results = {name: page for name, page in RESULTS.items() if (root / name).exists()}
    pages = library | experiments | project | results | {"README.md": "index.md"}
    for name, page in ({"README.md": "index.md"} | project | results).items():
        text = (root / name).read_text(encoding="utf-8").replace("](../", "](")  # all pages of prose stand at the top of the site
        (source / page).write_text(place_markdown(text, root, source, pages), encoding="utf-8")
    names = lambda found: list(dict.fromkeys(re.sub(r"\.\w+$", "", page) for page in found.values()))  # noqa: E731
    guides, *modules = [toctree(section, numbered(names(library), *numbers)) for section, numbers in SECTIONS.items()]
    contents = [
        guides,
        toctree("Experiments", [*names(results), *names(experiments)]),
        *modules,
        toctree("Reference", [f"api/{PACKAGE}/index"], depth=2),
        toctree("Project", names(project)),
    ]
    with open(source / "index.md", "a", encoding="utf-8") as file:
        file.writelines(contents)


def copy_mathjax(static: Path) -> None:
    "MathJax as one file, from the package that carries it, so that the site asks nobody for anything."
    spec = importlib.util.find_spec("mathjax")
    bundle = Path(spec.submodule_search_locations[0], "static", "mathjax", "es5", "tex-svg-full.js")
    static.mkdir(parents=True, exist_ok=True)
    shutil.copy(bundle, static / "mathjax.js")


def build(root: Path, work: Path, site: Path, jobs: int) -> int:
    "Everything from scratch; returns Sphinx's exit status."
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(site, ignore_errors=True)
    os.chdir(root)  # nbdev looks for settings.ini from here
    source = work / "source"
    symbols = Symbols.of(root / PACKAGE)
    library = write_library(root, source, symbols)
    write_home(root, source, library, write_experiments(root, source, symbols))
    copy_mathjax(work / "static")
    options = ["-b", "html", "-W", "--keep-going", "-q", "-j", str(jobs), "-c", str(root / "docs")]
    done = subprocess.run([sys.executable, "-m", "sphinx", *options, str(source), str(work / "site")])
    if done.returncode == 0:
        shutil.move(work / "site", site)
    return done.returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes of Sphinx")
    parser.add_argument("--site", type=Path, default=ROOT / "_site", help="where the site goes")
    arguments = parser.parse_args()
    status = build(ROOT, ROOT / "docs" / "_generated", arguments.site, arguments.jobs)
    print(f"site: {arguments.site / 'index.html'}" if status == 0 else "the site has warnings; they are listed above")
    sys.exit(status)
