"""From the project's notebooks and markdown files to pages that Sphinx reads.

Library notebooks pass through nbdev's own processors (the ones behind `proc_nbs`), which drop hidden cells and put
`show_doc(name)` in place of exported code. What `show_doc` would print is read from the source here, so that types
and comments stand as written and nothing is executed. Experiment notebooks are taken as papermill executed them.
"""

import ast
import json
import re
import runpy
import shutil
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Iterator

import yaml

Cell = dict[str, Any]
SHOW_DOC = re.compile(r"^show_doc\(\s*([\w.]+)", re.M)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
CODE = re.compile(r"(?<![`}\w])`([A-Za-z_][\w.]*(?:\(\))?)`(?!`)")
FENCE = re.compile(r"(^```.*?^```\s*?$)", re.M | re.S)
RELATIVE_LINK = re.compile(r"(\]\(|(?:src|href)=\")(?!\w+:|#|/)([^)\s\"#]+)")


# ---- names ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Symbol:
    "A function or class of the package: the module it is exported to, its name there and its definition."

    module: str
    name: str
    node: ast.FunctionDef | ast.ClassDef
    source: str  # of the module


@dataclass(frozen=True)
class Symbols:
    "What the package exports, as seen from one of its modules."

    by_name: dict[str, list[Symbol]]
    module: str = ""

    @classmethod
    def of(cls, package: Path) -> "Symbols":
        "Read nbdev's index of `package` and the modules it names."
        by_name: dict[str, list[Symbol]] = {}
        for module, names in runpy.run_path(str(package / "_modidx.py"))["d"]["syms"].items():
            source = package.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")
            for name, node in _definitions(ast.parse(source).body):
                if f"{module}.{name}" in names:
                    by_name.setdefault(name, []).append(Symbol(module, name, node, source))
        return cls(by_name)

    def seen_from(self, module: str) -> "Symbols":
        "The same symbols; names that several modules have mean the one of `module`."
        return Symbols(self.by_name, module)

    def find(self, name: str) -> Symbol | None:
        "The symbol that `name` means, if that is clear."
        found = self.by_name.get(name.removesuffix("()"), [])
        here = [symbol for symbol in found if symbol.module == self.module]
        return (here or found)[0] if len(here or found) == 1 else None

    def link(self, name: str) -> str:
        "`name` as a cross reference where the package has it, as plain code otherwise."
        symbol = self.find(name)
        return f"{{py:obj}}`{name} <{symbol.module}.{symbol.name}>`" if symbol else f"`{name}`"


def _definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{prefix}{node.name}.")


def foreign_modules(package: Path) -> set[str]:
    "Modules outside `package` that its modules import."
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    return {name for name in found if name.split(".")[0] != package.name}


# ---- what a definition looks like on a page ------------------------------------------------------------------


def signature(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str:
    "The head of a definition as written, comments on its arguments included, without decorators and body."
    first = node.body[0]
    end = first.lineno - 1 if first.lineno > node.lineno else node.lineno
    return "\n".join(lines[node.lineno - 1 : end]).rstrip().removesuffix(":")


def outline(node: ast.ClassDef, lines: list[str]) -> str:
    "A class as its fields and the signatures and first docstring lines of its public methods."
    decorators = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    parts = [*decorators, f"{signature(node, lines)}:"]
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            parts += lines[item.lineno - 1 : item.end_lineno]
        elif isinstance(item, ast.FunctionDef) and (item.name in ("__init__", "__call__") or item.name[0] != "_"):
            parts += ["", *_method(item, lines)]
    return "\n".join(parts).replace(":\n\n", ":\n", 1)


def _method(node: ast.FunctionDef, lines: list[str]) -> list[str]:
    indent = " " * node.col_offset
    parts = [f"{indent}@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    doc = (ast.get_docstring(node) or "").split("\n")[0]
    return [*parts, f"{signature(node, lines)}:" + ("" if doc else " ...")] + ([f'{indent}    "{doc}"'] if doc else [])


def describe(name: str, symbols: Symbols) -> str:
    "Markdown for one exported name: heading, signature, docstring, source to unfold; empty if it is unknown."
    symbol = symbols.find(name)
    if symbol is None:
        return ""
    lines = symbol.source.splitlines()
    node = symbol.node
    head = outline(node, lines) if isinstance(node, ast.ClassDef) else signature(node, lines)
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    body = "\n".join(lines[start - 1 : node.end_lineno])
    return "\n\n".join(
        [
            f"### {symbols.link(name)}",
            f"```python\n{head}\n```",
            link_code(ast.get_docstring(node) or "", symbols),
            f":::{{dropdown}} Source\n:class-container: source\n```python\n{body}\n```\n:::",
        ]
    )


def link_code(text: str, symbols: Symbols) -> str:
    "Inline code that names something of the package becomes a cross reference; fenced code is left alone."
    parts = FENCE.split(text)
    parts[::2] = [CODE.sub(lambda match: symbols.link(match[1]), part) for part in parts[::2]]
    return "".join(parts)


# ---- docstrings ----------------------------------------------------------------------------------------------


def docstring_to_rst(lines: list[str]) -> list[str]:
    "Docstrings are written in markdown: code becomes literals, `$x$` becomes math, the rest is escaped for RST."
    parts = re.split(r"(`+[^`]+`+|\$[^$\n]+\$)", "\n".join(lines))
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"(\*+(?=\S)|(?<=\w)_(?!\w)|\|)", r"\\\1", part)
        elif part[0] == "`":
            parts[i] = f"``{part.strip('`')}``" + ("\\" if re.match(r"\w", parts[i + 1]) else "")
        else:
            parts[i] = f":math:`{part.strip('$')}`"
    return "".join(parts).split("\n")


# ---- notebooks -----------------------------------------------------------------------------------------------


def library_page(notebook: dict, symbols: Symbols) -> dict:
    "A page from a notebook that nbdev has processed."
    return _notebook([page for cell in _in_order(notebook["cells"], symbols) for page in _library_cell(cell, symbols)])


def _in_order(cells: list[Cell], symbols: Symbols) -> Iterator[Cell]:
    "The cells, with neighbouring `show_doc` cells (nbdev sorts them by name) in the order of the source."

    def line(cell: Cell) -> int:
        found = SHOW_DOC.search("".join(cell["source"]))
        symbol = symbols.find(found[1]) if found else None
        return symbol.node.lineno if symbol else 0

    for documented, run in groupby(cells, lambda cell: bool(SHOW_DOC.search("".join(cell["source"])))):
        neighbours = list(run)
        yield from sorted(neighbours, key=line) if documented else neighbours


def _library_cell(cell: Cell, symbols: Symbols) -> Iterator[Cell]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "raw":
        yield from _front_matter(source)
    elif cell["cell_type"] == "markdown":
        if not source.startswith("<!-- WARNING"):
            yield _markdown(link_code(source, symbols))
    elif found := SHOW_DOC.search(source):
        if text := describe(found[1], symbols):
            yield _markdown(text)
    else:
        yield from _code(cell, [])


def experiment_page(notebook: dict, symbols: Symbols) -> dict:
    "A page from an executed experiment: prose and results, with the code before each result folded away."
    cells: list[Cell] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(_markdown(link_code(_lead(source), symbols)))
        elif cell["cell_type"] == "code" and not re.search(r"^#\|\s*hide", source, re.M):
            for code in _code(cell, ["hide-input"]):
                if cells and cells[-1]["cell_type"] == "code" and not cells[-1]["outputs"]:
                    code["source"] = [*cells.pop()["source"], "\n\n", *code["source"]]
                cells.append(code)
    return _notebook(cells)


def _front_matter(source: str) -> Iterator[Cell]:
    fields = yaml.safe_load(source.strip().strip("-")) if source.lstrip().startswith("---") else None
    if fields:
        yield _markdown(_lead(f"# {fields['title']}\n\n> {fields.get('description', '')}"))


def _lead(source: str) -> str:
    "A title cell `# title` + `> description` with the description set as the page's lead."
    return re.sub(r"\A(# .+)\n+> *(.+)\Z", r"\1\n\n{.lead}\n\2", source.strip())


def _code(cell: Cell, tags: list[str]) -> Iterator[Cell]:
    source = "".join(cell["source"])
    outputs = [output for output in map(_kept, cell.get("outputs", [])) if output]
    if re.search(r"^#\|\s*echo:\s*false", source, re.M):
        tags = ["remove-input"]
    elif re.search(r"^#\|\s*code-fold", source, re.M):
        tags = ["hide-input"]
    source = DIRECTIVE.sub("", source).strip("\n")
    if source or outputs:
        yield {"cell_type": "code", "metadata": {"tags": tags} if tags else {}, "execution_count": None,
               "source": source.splitlines(True), "outputs": outputs}  # fmt: skip


def _kept(output: dict) -> dict | None:
    "An output as it may stand on a page: no progress bars, no live widgets, no execution count."
    if output["output_type"] == "stream" and output["name"] == "stderr":
        return None
    if any("widget" in kind for kind in output.get("data", {})):
        return None
    return output | {"execution_count": None} if "execution_count" in output else output


def _markdown(source: str) -> Cell:
    return {"cell_type": "markdown", "metadata": {}, "source": source.splitlines(True)}


def _notebook(cells: list[Cell]) -> dict:
    cells = [cell | {"id": f"cell-{i}"} for i, cell in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def write_notebook(notebook: dict, path: Path) -> None:
    "Write `notebook` to `path`, making folders as needed."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- markdown files of the repository ------------------------------------------------------------------------


def local_links(text: str) -> list[str]:
    "Relative targets of the links and images of a markdown text."
    return [match[2] for match in RELATIVE_LINK.finditer(text)]


def place_markdown(text: str, root: Path, target: Path, pages: dict[str, str]) -> str:
    """The text of a file at the top of the repository as a page at the top of `target`.

    Links to files that have a page (`pages`: path in the repository -> page) lead there; every other file that is
    linked to is copied along. Folders have no page, so a link to one becomes plain text.
    """

    def place(match: re.Match) -> str:
        link = match[2]
        if link in pages:
            return match[1] + pages[link]
        source = root / link
        if source.is_file():
            (target / link).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / link)
        return match[0]

    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+/)\)", lambda m: m[1] if (root / m[2]).is_dir() else m[0], text)
    return RELATIVE_LINK.sub(place, text)


def toctree(caption: str, pages: list[str], depth: int = 1) -> str:
    "A hidden table of contents: it makes a section of the sidebar."
    if not pages:
        return ""
    options = [f":caption: {caption}", f":maxdepth: {depth}", ":hidden:"]
    return "\n".join(["", "```{toctree}", *options, "", *pages, "```", ""])
