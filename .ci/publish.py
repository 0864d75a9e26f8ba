"""Copy finished tables, figures and notebooks from build/<profile> to results/<profile> and figures/<profile>."""

import argparse
import json
from pathlib import Path

from mlvgm_mi.checkpoints import atomic_path
from mlvgm_mi.experiments import publish


def drop_warnings(notebook: Path) -> None:
    "Remove what cells wrote to stderr: progress, warnings, paths of the machine that ran them."
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    with atomic_path(notebook) as path:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    "Publishes, then writes the list of files to build/<profile>/published.txt."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--keep-cells", action="store_true", help="publish the finished cells of the grid too")
    known = parser.parse_args()
    build = Path("build") / known.profile
    for notebook in (build / "notebooks").glob("*.ipynb"):
        drop_warnings(notebook)
    files = publish(build, ".", known.profile, known.keep_cells)
    with atomic_path(build / "published.txt") as path:
        path.write_text("\n".join(map(str, files)) + "\n")


if __name__ == "__main__":
    main()
