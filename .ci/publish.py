"""Copy finished tables, figures and notebooks from build/<profile> to results/<profile> and figures/<profile>."""

import argparse
from pathlib import Path

from mlvgm_mi.checkpoints import atomic_path
from mlvgm_mi.experiments import publish


def main() -> None:
    "Publishes, then writes the list of files to build/<profile>/published.txt."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--keep-cells", action="store_true", help="publish the finished cells of the grid too")
    known = parser.parse_args()
    build = Path("build") / known.profile
    files = publish(build, ".", known.profile, known.keep_cells)
    with atomic_path(build / "published.txt") as path:
        path.write_text("\n".join(map(str, files)) + "\n")


if __name__ == "__main__":
    main()
