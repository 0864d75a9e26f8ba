"""What users get: the wheel, the program in the README, the workflow on its smallest profile."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from gates import PACKAGE, modules, tracked
from minirepo import ROOT

pytestmark = [pytest.mark.product, pytest.mark.slow]

PROGRAM = re.compile(r"^<!-- program:.*?-->\n+```python\n(.*?)^```", re.M | re.S)


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    "Run a command with `path` as PYTHONPATH (none: without)."
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    "A copy of what is, or would be, committed."
    copy = tmp_path_factory.mktemp("product") / "checkout"
    for path in tracked(ROOT):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return copy


@pytest.fixture(scope="session")
def wheel(checkout: Path) -> Path:
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert list(checkout.glob("dist/*.tar.gz")), "no source distribution"
    (found,) = checkout.glob("dist/*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory) -> Path:
    "A folder with the wheel's package, as pip installs it; its dependencies are those of the environment."
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target)
    done = run(*pip, wheel, cwd=target.parent)
    assert done.returncode == 0, done.stderr
    return target


def test_the_wheel_is_complete(wheel: Path, checkout: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = (path for path in (checkout / PACKAGE / "weights").glob("*") if path.is_file())
    expected = [*modules(checkout), *data, checkout / PACKAGE / "py.typed"]
    assert {path.relative_to(checkout).as_posix() for path in expected} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("nbs", "tests", "docs", "results")) for name in names)


def test_the_wheel_is_built_from_the_source_distribution_too(wheel: Path, tmp_path: Path):
    (source,) = wheel.parent.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    done = run(*pip, "--wheel-dir", tmp_path, source, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (rebuilt,) = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(rebuilt).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_the_readme_program_runs_from_the_wheel(installed: Path, tmp_path: Path):
    programs = PROGRAM.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(programs) == 1, "README.md should mark one ```python block with <!-- program: ... -->"
    lines = [line for line in programs[0].splitlines() if line.strip()]
    assert len(lines) <= 12, f"the program has {len(lines)} lines; ten are meant to do"
    where = f"import {PACKAGE}; assert {PACKAGE}.__file__.startswith({str(installed)!r}), {PACKAGE}.__file__\n"
    (tmp_path / "program.py").write_text(where + programs[0])
    done = run(sys.executable, "program.py", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr


def test_the_commands_start_from_the_wheel(installed: Path, tmp_path: Path):
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    for entry in settings["DEFAULT"].get("console_scripts", "").split():
        done = run(installed / "bin" / entry.split("=")[0], "--help", cwd=tmp_path, path=installed)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


@pytest.fixture(scope="session")
def smoke(checkout: Path) -> Path:
    "The copy after the workflow ran there, whole, on the profile made for this test."
    committed = {path: path.stat().st_mtime_ns for path in checkout.rglob("*") if path.is_file()}
    done = workflow(checkout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:] + logs(checkout)
    assert {path for path, time in committed.items() if not path.exists() or path.stat().st_mtime_ns != time} == set()
    return checkout


def workflow(root: Path, *words: str) -> subprocess.CompletedProcess:
    command = (sys.executable, ".ci/workflow.py", "--profile", "smoke", "--cores", "2", *words)
    return run(*command, cwd=root, path=root)


def logs(root: Path) -> str:
    found = sorted((root / "build" / "smoke" / "logs").glob("*"))
    return "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in found)


def test_the_workflow_runs_from_a_fresh_checkout(smoke: Path):
    results = smoke / "results" / "smoke"
    assert list(results.glob("*.csv")), "no table"
    assert all(path.stat().st_size for path in results.rglob("*") if path.is_file())


def test_a_second_run_has_nothing_to_do(smoke: Path):
    done = workflow(smoke)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr, done.stderr


def test_the_lock_of_a_killed_run_is_removed(smoke: Path):
    lock = smoke / ".snakemake" / "locks" / "0.output.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(str(next((smoke / "results" / "smoke").glob("*.csv"))) + "\n")
    done = workflow(smoke)
    assert done.returncode == 0 and "removing the lock" in done.stdout, done.stdout + done.stderr


def test_the_readme_quotes_the_committed_results():
    done = run(sys.executable, "docs/readme_tables.py", "--check", cwd=ROOT, path=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
