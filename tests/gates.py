"""Rules about the repository itself. A gate takes a repository and returns its violations, one line each."""

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Iterator

import yaml

Gate = Callable[[Path], list[str]]
PACKAGE = "mlvgm_mi"
NAME = re.compile(r"(\d\d)([a-z]?)_([\w.]+)\.ipynb")

EXPORTED_CELL = 40  # code lines
MODULE = 350  # code lines
BODY, BODY_P90 = 60, 25  # lines of a function without its docstring
EXPERIMENT_FUNCTION = 5  # lines

# design: files that others rely on, and the columns they may count on
COLUMNS = {
    "generators.csv": "generator metric value",
    "impact.csv": "generator group step strength mi_nats se ceiling n estimator sigma_x seed",
    "delta.csv": "generator group mi_nats delta delta_se space seed",
    "encoders.csv": "source objective t_x seed probe dataset split accuracy",
    "claims.csv": "claim text criterion estimate low high verdict notebook",
    "speed.csv": "case ours peer unit ratio low high",
    "faults.csv": "fault trials recovered refused lost",
}


# ---- reading a repository ------------------------------------------------------------------------------------


def tool(root: Path, *words: str) -> subprocess.CompletedProcess:
    "Run a program of this environment in `root`, on the code of `root`."
    command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def tracked(root: Path) -> list[Path]:
    "Files of a repository that are, or would be, committed (every file, where there is no git repository)."
    if not (root / ".git").exists():
        return sorted(path for path in root.rglob("*") if path.is_file())
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(path for name in names if name and (path := root / name).is_file())


def library(root: Path) -> list[Path]:
    "The library notebooks in order."
    return sorted((root / "nbs").glob("*.ipynb"))


def modules(root: Path) -> list[Path]:
    "The exported modules."
    return sorted(path for path in (root / PACKAGE).rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    "The cells of a notebook, with `source` as one string."
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found]


def directive(cell: dict[str, Any], names: str) -> bool:
    "Whether a code cell carries one of the `#|` directives (a regular expression)."
    return cell["cell_type"] == "code" and bool(re.search(rf"^#\|\s*({names})\b", cell["source"], re.M))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    "Every function and method below `tree`."
    yield from (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def body_lines(function: ast.FunctionDef) -> int:
    "Lines of a function's body without its docstring."
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def code_lines(source: str, tree: ast.Module) -> int:
    "Lines of a source that are neither empty nor comment nor docstring."
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)]
    left_out = {line for doc in docs for line in range(doc.lineno, doc.end_lineno + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and i not in left_out for i, line in lines)


def dotted(node: ast.AST) -> str:
    "`a.b.c` of a name or attribute; what is not a name (a call, say) stands as an empty part."
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


# ---- notebooks and the package -------------------------------------------------------------------------------


def export_in_sync(root: Path) -> list[str]:
    "The package is what the notebooks export."
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("nbs", PACKAGE):
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
        shutil.copy(root / "settings.ini", copy)
        for path in [*modules(copy), copy / PACKAGE / "_modidx.py"]:
            path.unlink(missing_ok=True)
        done = tool(copy, "nbdev_export")
        if done.returncode:
            return [f"nbdev_export fails: {done.stderr.strip().splitlines()[-1]}"]
        texts = lambda top: {str(p.relative_to(top)): p.read_text() for p in (top / PACKAGE).rglob("*.py")}  # noqa: E731
        ours, fresh = texts(root), texts(copy)
    names = sorted(name for name in ours.keys() | fresh.keys() if ours.get(name) != fresh.get(name))
    return [f"{name} is not what the notebooks export; run `make export`" for name in names]


def notebooks_clean(root: Path) -> list[str]:
    "nbdev_clean would change nothing."
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(root / "nbs", copy / "nbs")
        shutil.copy(root / "settings.ini", copy)
        tool(copy, "nbdev_clean")
        dirty = [p.relative_to(copy) for p in sorted(copy.rglob("*.ipynb"))
                 if p.read_bytes() != (root / p.relative_to(copy)).read_bytes()]  # fmt: skip
    return [f"{path} is not clean; run `make clean-notebooks`" for path in dirty]


def import_order(root: Path) -> list[str]:
    "A module imports only from modules of lower-numbered notebooks."
    order = {f"{PACKAGE}.{match[3]}": match[1] + match[2] for path in library(root) if (match := NAME.match(path.name))}
    problems = []
    for path in modules(root):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        for imported in sorted(_imports(name, ast.parse(path.read_text(encoding="utf-8")))):
            if imported not in order:
                problems.append(f"{name} imports {imported}, which is not the module of a notebook")
            elif order[imported] >= order.get(name, ""):
                problems.append(f"{name} ({order.get(name)}) imports {imported} ({order[imported]})")
    return problems


def _imports(name: str, tree: ast.AST) -> set[str]:
    "Modules of the package that the module `name` imports, relative imports (nbdev writes them) resolved."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{PACKAGE}.{alias.name}" for alias in node.names} if source == PACKAGE else {source}
    return {imported for imported in found if imported.split(".")[0] == PACKAGE}


def notebook_shape(root: Path) -> list[str]:
    "Title cell, module name, cells of imports alone, short exported cells, something to see at the end."
    problems, numbers = [], {}
    for path in library(root):
        problems += [f"nbs/{path.name}: {problem}" for problem in _shape(path)]
        number = path.name.split("_")[0]
        if numbers.setdefault(number, path.name) != path.name:
            problems.append(f"nbs/{path.name}: number {number} is taken by {numbers[number]}")
    others = (path for path in tracked(root) if path.is_relative_to(root / "nbs"))
    return problems + [
        f"{path.relative_to(root)}: only notebooks and their profiles belong into nbs"
        for path in others
        if path.suffix not in (".ipynb", ".yaml") and path.name != ".notest"
    ]


def _shape(path: Path) -> Iterator[str]:
    found, match = cells(path), NAME.fullmatch(path.name)
    if not match:
        yield "the name should be two digits, perhaps a letter, an underscore and the module's name"
        return
    if not re.fullmatch(r"# .+\n+> .+", found[0]["source"].strip()):
        yield "the first cell should hold `# title` and `> one-line description` and nothing else"
    exports = any(directive(cell, "export") for cell in found)  # a page that only uses the library has no module
    if exports and not any(re.search(rf"^#\|\s*default_exp {re.escape(match[3])}$", cell["source"], re.M) for cell in found):
        yield f"`#| default_exp {match[3]}` is missing"
    for cell in found:
        if directive(cell, "export"):
            yield from _exported_cell(cell["source"])
    shown = [cell for cell in found if cell["cell_type"] == "code" and not directive(cell, "hide|export|default_exp")]
    if not shown or not shown[-1]["outputs"]:
        yield "the last cell that is shown has no stored output; execute the notebook"


def _exported_cell(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    first = ast.unparse(tree.body[0]).splitlines()[0] if tree.body else ""
    if (lines := code_lines(source, tree)) > EXPORTED_CELL:
        yield f"the exported cell `{first}` ... has {lines} code lines, at most {EXPORTED_CELL}"
    imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body]
    if any(imports) and not all(imports):
        yield f"the exported cell `{first}` mixes imports with other code"


def experiment_shape(root: Path) -> list[str]:
    "Experiments have one cell of parameters, no functions to speak of, and stay out of nbdev_test."
    folder, problems = root / "nbs" / "experiments", []
    if folder.exists() and not (folder / ".notest").exists():
        problems.append("nbs/experiments/.notest is missing: nbdev_test would run the experiments")
    for path in sorted(folder.glob("*.ipynb")):
        found = cells(path)
        tagged = sum("parameters" in cell["metadata"].get("tags", []) for cell in found)
        if tagged != 1:
            problems.append(f"nbs/experiments/{path.name}: {tagged} cells are tagged `parameters`, not one")
        for cell in found:
            if cell["cell_type"] == "code":
                problems += [f"nbs/experiments/{path.name}: {name}" for name in _long_functions(cell["source"])]
    return problems


def _long_functions(source: str) -> list[str]:
    source = re.sub(r"^[%!].*$", "", source, flags=re.M)
    long = [node for node in functions(ast.parse(source)) if body_lines(node) > EXPERIMENT_FUNCTION]
    return [f"`{node.name}` has {body_lines(node)} lines; move it into a module" for node in long]


# ---- code ----------------------------------------------------------------------------------------------------


def ruff(root: Path) -> list[str]:
    "ruff has nothing to say."
    done = tool(root, "ruff", "check", "--no-cache", "--output-format", "concise", ".")
    return done.stdout.strip().splitlines()[:-1] + done.stderr.strip().splitlines() if done.returncode else []


def pyflakes(root: Path) -> list[str]:
    "pyflakes finds no undefined or unused name in the exported package."
    done = tool(root, "pyflakes", PACKAGE)
    return (done.stdout + done.stderr).strip().splitlines() if done.returncode else []


def budgets(root: Path) -> list[str]:
    "Modules and functions stay small."
    problems, bodies = [], []
    for path in modules(root):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        if (lines := code_lines(source, tree)) > MODULE:
            problems.append(f"{path.relative_to(root)} has {lines} code lines, at most {MODULE}")
        bodies += [(body_lines(node), f"{path.relative_to(root)}: {node.name}") for node in functions(tree)]
    problems += [f"{name} has {lines} lines, at most {BODY}" for lines, name in bodies if lines > BODY]
    over = [f"{name} ({lines})" for lines, name in sorted(bodies, reverse=True) if lines > BODY_P90]
    if len(over) > len(bodies) / 10:
        problems.append(f"more than a tenth of the functions have over {BODY_P90} lines: {', '.join(over)}")
    return problems


def methods_documented(root: Path) -> list[str]:
    "Public methods have a docstring, unless they override one from a base class (ruff sees to all the rest)."
    problems = []
    for path in modules(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not node.bases:
                bare = (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name[0] != "_")
                problems += [
                    f"{path.relative_to(root)}: {node.name}.{item.name} has no docstring"
                    for item in bare
                    if not ast.get_docstring(item)
                ]
    return problems


GLOBAL_STATE = {
    "torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "random.seed",
    "np.random.seed", "numpy.random.seed", "seed_everything", "lightning.seed_everything", "L.seed_everything",
    "pl.seed_everything",
}  # fmt: skip
UNSAFE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"}


def safe_calls(root: Path) -> list[str]:
    "The package seeds nothing globally, unpickles nothing and leaves the device to its input."
    problems = []
    for path in modules(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            problem = _unsafe(node) if isinstance(node, ast.Call) else ""
            problems += [f"{path.relative_to(root)}:{node.lineno}: {problem}"] if problem else []
    return problems


def _unsafe(call: ast.Call) -> str:
    name = dotted(call.func)
    if name in GLOBAL_STATE:
        return f"{name} seeds a global state; take an `rng` instead"
    if name in UNSAFE:
        return f"{name} may execute what it reads"
    if name.endswith(".cuda"):
        return "`.cuda()`: follow the device of the input"
    safe = any(word.arg == "weights_only" and getattr(word.value, "value", None) is True for word in call.keywords)
    return "torch.load without weights_only=True" if name == "torch.load" and not safe else ""


# ---- the project ---------------------------------------------------------------------------------------------

FOLDERS = "work|tmp|root|home|farm|Users|mnt"
MACHINE = re.compile(rf"(?<![\w/+.\-:])/({FOLDERS})/[A-Za-z]\w+")
REGISTRIES = re.compile("|".join(re.escape(host) for host in (
    "pypi" + ".org", "pythonhosted" + ".org", "npmjs" + ".org", "deb" + ".debian.org", "proxy.golang" + ".org",
)))  # fmt: skip


def no_traces(root: Path) -> list[str]:
    "No path of one machine and no registry's address in any file."
    problems = []
    for path in tracked(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found = MACHINE.search(line) or REGISTRIES.search(line)
            problems += [f"{path.relative_to(root)}:{number}: {found[0]}"] if found else []
    return problems


def one_version(root: Path) -> list[str]:
    "settings.ini, the package, CITATION.cff and the changelog agree on the version."
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    version = settings["DEFAULT"]["version"]
    init = re.search(r'__version__ = "([^"]+)"', (root / PACKAGE / "__init__.py").read_text())
    released = re.search(r"^## \[(\d[^\]]*)\]", (root / "CHANGELOG.md").read_text(), re.M)
    found = {
        f"{PACKAGE}/__init__.py": init and init[1],
        "CITATION.cff": yaml.safe_load((root / "CITATION.cff").read_text())["version"],
        "CHANGELOG.md": released[1] if released else version,
    }
    return [f"{name} says {other}, settings.ini {version}" for name, other in found.items() if other != version]


def result_columns(root: Path) -> list[str]:
    "Committed tables have the columns that others rely on."
    problems = []
    for path in tracked(root):
        if path.is_relative_to(root / "results") and path.name in COLUMNS:
            with open(path, newline="", encoding="utf-8") as file:
                have = next(csv.reader(file), [])
            if missing := [column for column in COLUMNS[path.name].split() if column not in have]:
                problems.append(f"{path.relative_to(root)} lacks {', '.join(missing)}")
    return problems


GATES: dict[str, Gate] = {
    gate.__name__: gate
    for gate in (
        export_in_sync, notebooks_clean, import_order, notebook_shape, experiment_shape, ruff, pyflakes, budgets,
        methods_documented, safe_calls, no_traces, one_version, result_columns,
    )
}  # fmt: skip
