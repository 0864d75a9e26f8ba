"The table that all benchmarks write to."

from pathlib import Path

import pandas as pd

from mlvgm_mi.checkpoints import atomic_path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "results" / "bench" / "speed.csv"


def keep(frame: pd.DataFrame) -> None:
    "Replaces the rows of these cases in the table of all benchmarks, whole or not at all."
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    old = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=["case"])
    table = pd.concat([old[~old["case"].isin(frame["case"])], frame]).sort_values("case", kind="stable")
    with atomic_path(TABLE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    print(f"written: {TABLE.relative_to(ROOT)}")
