"""Find distributions that a broken-off installation left with files missing.

Prints `name==version` of each on one line. With `--imports` it ends with an error if there are any, or if the
packages everything else rests on cannot be imported together.
"""

import importlib
import sys
from importlib.metadata import Distribution, distributions

PILLARS = ("torch", "torchvision", "lightning", "lightly", "kornia", "nbdev.export", "snakemake", "sphinx", "mlvgm_mi")


def incomplete(distribution: Distribution) -> bool:
    "Whether a file that the installer recorded is gone (compiled caches may come and go)."
    files = distribution.files
    return files is None or any(file.suffix != ".pyc" and not file.locate().exists() for file in files)


def broken_imports() -> list[str]:
    "What goes wrong on importing the pillars, one line each."
    problems = []
    for name in PILLARS:
        try:
            importlib.import_module(name)
        except Exception as error:
            problems.append(f"import {name}: {type(error).__name__}: {error}")
    return problems


if __name__ == "__main__":
    found = (d for d in distributions() if d.name != "mlvgm_mi")  # which set-up installs anew in any case
    broken = sorted({f"{d.name}=={d.version}" for d in found if incomplete(d)})
    print(*broken)
    if "--imports" in sys.argv:
        problems = broken_imports()
        print(*problems, sep="\n", file=sys.stderr)
        if broken or problems:
            sys.exit("The environment is not usable. Remove it (or name another: VENV=...) and run the command again.")
