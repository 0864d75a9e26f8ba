"""Fills the tables of README.md and docs/results.md; `--check` only says whether they are up to date.

    python docs/readme_tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->` and is made from results/quick, or from another profile's
results if it reads `<!-- table: NAME of PROFILE -->`.
"""
import math
import re
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md")
T_X = {"none": "none", "no_color": "crops, flips", "no_crop": "flips, colour", "simclr": "crops, flips, colour"}  # in words


def percent(row: pd.Series, *names: str) -> str:
    "`mean [low, high]` in percent."
    mean, low, high = (100 * row[name] for name in names)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def interval(row: pd.Series, name: str, scale: float = 1, digits: int = 2) -> str:
    "`mean [low, high]` of the columns `name`, `name_low`, `name_high`; infinite is out of reach, NaN is empty."
    mean, low, high = (scale * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if math.isnan(mean):
        return ""
    return "not reached" if math.isinf(mean) else f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def generators(results: Path) -> pd.DataFrame:
    "Quality of the shipped generators, one a column."
    values = pd.read_csv(results / "generators.csv").set_index(["metric", "generator"])["value"].unstack(sort=False)
    share = lambda name: [f"{100 * value:.1f}%" for value in values.loc[name]]
    number = lambda name, digits: [f"{value:,.{digits}f}" for value in values.loc[name]]
    rows = {
        "accuracy on real test images of a classifier trained on samples only": share("cas"),
        "the same, trained on real images, for as many steps": share("oracle_accuracy"),
        "Frechet distance": number("fd", 2),
        "the same, real against real": number("fd_floor", 2),
        "the same, untrained network": number("fd_untrained", 0),
        "share of the rarest class": share("class_min"),
        "share of the commonest class": share("class_max"),
        "training images shown, thousands": number("kimg", 0),
        "weights, MB": number("megabytes", 2),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(values.columns)).rename_axis("measure").reset_index()


def impact(results: Path) -> pd.DataFrame:
    "What is left of an anchor when a group is drawn anew, and what that took off."
    table = pd.read_csv(results / "impact_table.csv")
    return pd.DataFrame([
        {"generator": row["generator"], "group": row["group"], "nats left": interval(row, "resampled"),
         "nats lost": interval(row, "lost"), "share, %": interval(row, "share", 100, 0)} for _, row in table.iterrows()
    ])


def table1(results: Path) -> pd.DataFrame:
    "Nats lost by resampling beside the displacement of a learned walker at common levels, and the two orders."
    table = pd.read_csv(results / "table1.csv")
    levels = [name for name in table if name.startswith("delta_at_") and not name.endswith(("_low", "_high"))]
    return pd.DataFrame([
        {"generator": row["generator"], "group": row["group"], "nats lost": interval(row, "lost")}
        | {f"displacement with {float(name.removeprefix('delta_at_')):g} nats left": interval(row, name) for name in levels}
        | {"rank by nats": row["impact_rank"], "rank by displacement": row["paper_rank"]} for _, row in table.iterrows()
    ])


def coverage(results: Path) -> pd.DataFrame:
    "How often the interval of the impact sweep holds the truth, by true nats."
    table = pd.read_csv(results / "coverage.csv")
    table = table[table.estimator == "infonce (sweep)"]
    bands = table.band.str.replace("stated: (.*)", r"\1, the range they are stated for", regex=True)
    return pd.DataFrame({
        "true nats": bands, "values": table.trials,
        "intervals that hold the truth, %": [percent(row, "share", "low", "high") for _, row in table.iterrows()],
        "the same, with no allowance for the ceiling, %": [f"{100 * value:.1f}" for value in table.plain],
        "mean error, nats": [f"{value:+.3f}" for value in table.bias],
    })


def claims(results: Path) -> pd.DataFrame:
    "Verdicts of the quick and the full profile on the claims of the paper that they can test."
    rows = {}
    for profile in ("quick", "full"):
        for row in pd.read_csv(results.parent / profile / "claims.csv").itertuples():
            found = rows.setdefault((row.claim, row.text), {"claim": f"{row.claim}. {row.text}", "criterion": row.criterion})
            found[profile] = f"{row.verdict}: {row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}], {row.generator}"
    return pd.DataFrame([rows[key] for key in sorted(rows, key=lambda key: key[0])]).fillna("")


def verdicts(results: Path) -> pd.DataFrame:
    "The last word on every claim: of `full` if it judges it, and of its longest training."
    rows = {}
    for profile in ("quick", "full"):
        for row in pd.read_csv(results.parent / profile / "claims.csv").itertuples():
            text, _, after = row.text.removesuffix(".").partition(", after ")
            measured = f"**{row.verdict}**: {row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}]"
            criterion = row.criterion.replace(f", after {after}", "")
            rows[row.claim, text] = {"claim": f"{row.claim}. {text}.", "criterion": criterion, "verdict": measured,
                                     "judged in": ", ".join(filter(None, [f"`{profile}`", after]))}
    return pd.DataFrame([rows[key] for key in sorted(rows, key=lambda key: key[0])])


CASES = {  # benchmark -> what is timed, and what it is compared with
    "impact": ("the nats of all groups, to equal standard errors",
               "a fresh critic per group, pairs decoded whole, the critic run twice a step"),
    "impact-sweep": ("pairs for one sweep over groups and strengths", "every pair decoded whole"),
    "decode-stylegan2": ("decoding, StyleGAN2", "convolutions modulated sample by sample"),
    "decode-bigbigan": ("decoding, BigBiGAN", "spectral norms anew and attention materialised at every pass"),
    "decode-nvae": ("decoding, NVAE", "layers as published, none merged"),
    "step-float32": ("a training step in bfloat16", "the same in float32"),
    "step-bfloat16": ("a training step in float32, on a CPU without bfloat16", "the same in bfloat16"),
    "step-contiguous": ("a training step, channels last", "the same, channels first"),
    "step-compiled": ("a training step, not compiled", "the same, compiled"),
    "continuous-prefetched": ("training, views prefetched in a thread", "training, views decoded in the step"),
    "continuous-replayed-4": ("training, each anchor used four times", "training, fresh anchors at every step"),
    "continuous-official": ("training, views decoded in the step", "two full decodes and a generator that is moved, as published"),
    "continuous-overhead": ("training, views decoded in the step", "its encoder plus its decode, measured alone"),
}


def speed(results: Path) -> pd.DataFrame:
    "Benchmarks, a row each: the ratio with its interval, or the least and the greatest over the settings that were timed."
    table = pd.read_csv(results.parent / "bench" / "speed.csv")
    unnamed = sorted(set(table.case) - set(CASES) - set(table.case[table.case.str.startswith("objective-")]))
    if unnamed:
        raise ValueError(f"CASES does not say what {', '.join(unnamed)} of {results.parent / 'bench' / 'speed.csv'} time")
    rows = []
    for case, (what, against) in CASES.items():
        own = table[table.case == case]
        if own.empty:
            continue
        low, high = (own.low.min(), own.high.max()) if len(own) == 1 else (own.ratio.min(), own.ratio.max())
        head = f"{own.ratio.item():.2f} [{low:.2f}, {high:.2f}]" if len(own) == 1 else f"{low:.2f} to {high:.2f}"
        rows.append({"case": case, "ours": what, "compared with": against, "settings": len(own),
                     "times faster": f"costs {head} times as much" if case == "continuous-overhead" else head})
    return pd.DataFrame(rows)


def sources(results: Path) -> pd.DataFrame:
    "Linear probe and nearest neighbours per source."
    table = pd.read_csv(results / "sources_table.csv")
    rows = []
    for (source, t_x), part in table.groupby(["source", "t_x"], sort=False):
        part = part.set_index("probe")
        gain = part.loc["linear"]
        rows.append({
            "views from": source, "augmentation": T_X[t_x],
            "linear probe, %": percent(gain, "accuracy", "low", "high"),
            "minus real, points": interval(gain, "minus_real", 100, 1),
            "kNN, %": percent(part.loc["knn"], "accuracy", "low", "high"),
        })
    return pd.DataFrame(rows)


def _linear(results: Path) -> pd.DataFrame:
    return pd.read_csv(results / "sources_table.csv").query("probe == 'linear'")


def objectives(results: Path) -> pd.DataFrame:
    "Linear probe per source and objective, under the augmentation that all have; below, real views under what suits them best."
    table = _linear(results)
    own = table[table.t_x == table.t_x.value_counts().index[0]]
    best = table[(table.source == "real") & table.minus_best_real.isna()].assign(source="real, augmented as suits it best")
    rows = []
    for source, part in pd.concat([own, best]).groupby("source", sort=False):
        row = {"views from": source}
        rows.append(row | {one.objective: percent(one, "accuracy", "low", "high") for _, one in part.iterrows()})
    return pd.DataFrame(rows)


def gains(results: Path) -> pd.DataFrame:
    "What guided views gain in the linear probe, by objective and augmentation."
    table = _linear(results).query("source == 'guided'")
    against = {"real, same augmentation": "real", "real at its best": "best_real", "uniform, same augmentation": "uniform",
               "uniform at its best": "best_uniform"}
    return pd.DataFrame([
        {"objective": row.objective, "augmentation": T_X[row.t_x]}
        | {f"guided minus {title}": interval(row, f"minus_{name}", 100, 1) for title, name in against.items()}
        for _, row in table.iterrows()
    ])


def _by_augmentation(table: pd.DataFrame) -> pd.DataFrame:
    text = pd.Series([percent(row, "accuracy", "low", "high") for _, row in table.iterrows()], [table.source, table.t_x])
    columns = [t_x for t_x in T_X if t_x in set(table.t_x)]
    wide = text.unstack().reindex(index=table.source.unique(), columns=columns).fillna("").rename(columns=T_X)
    return wide.rename_axis("views from").reset_index()


def augmentations(results: Path) -> pd.DataFrame:
    "Linear probe per source and augmentation, for the first objective."
    table = _linear(results)
    return _by_augmentation(table[table.objective == table.objective.iloc[0]])


def _over_this(row: dict[str, float], minus: str) -> str:
    "What the other gains over a row that lists what it has less, in points."
    less, low, high = (-row[f"{minus}{end}"] for end in ("", "_high", "_low"))
    return interval({"gain": less, "gain_low": low, "gain_high": high}, "gain", 100, 1)


def longer_augmentations(results: Path) -> pd.DataFrame:
    "The same after as many updates as most rows have, for the generator that most are from."
    return _by_augmentation(pd.read_csv(results / "longer_t_x.csv").query("probe == 'linear'"))


def longer_augmentation_gains(results: Path) -> pd.DataFrame:
    "What guided views gain over every source under the same augmentation."
    table = pd.read_csv(results / "longer_t_x.csv")
    table, rows = table[table.minus_guided.notna()], {}
    for probe, title in {"linear": "linear", "knn": "kNN"}.items():
        for own in table[table.probe == probe].to_dict("records"):
            row = rows.setdefault((probe, own["source"]), {"probe": title, "guided minus": own["source"]})
            row[own["t_x"]] = _over_this(own, "minus_guided")
    columns = ["probe", "guided minus", *(t_x for t_x in T_X if t_x in set(table.t_x))]
    return pd.DataFrame(rows.values())[columns].rename(columns=T_X).fillna("")


def _views_from(source: str, generator: str) -> str:
    return source if source == "real" else f"{source}, {generator}"


def longer_sources(results: Path) -> pd.DataFrame:
    "Linear probe of all sources after as many updates, per objective, and what guided views gain over each."
    table = pd.read_csv(results / "longer_sources.csv").query("probe == 'linear'")
    rows = {}
    for source in ["real", *(name for name in table.source.unique() if name != "real")]:
        rows[source] = {"views from": source}
        for own in table[table.source == source].to_dict("records"):
            rows[source][f"{own['objective']}, {own['steps']:,} updates"] = percent(own, "accuracy", "low", "high")
            rows[source][f"{own['objective']}, guided minus this"] = _over_this(own, "minus_best_guided")
    return pd.DataFrame(rows.values()).fillna("")


def _long_runs(results: Path) -> pd.DataFrame:
    "Rows that were trained for other lengths than the one that most of an objective's rows have."
    table = pd.read_csv(results / "longer_table.csv")
    usual = table.groupby("objective").steps.transform(lambda steps: steps.mode().max())
    row_of = [table[name] for name in ("objective", "generator", "source", "t_x")]
    return table[(table.steps != usual).groupby(row_of).transform("any")]


def longer(results: Path) -> pd.DataFrame:
    "Linear probe by number of updates, and nearest neighbours where a row ends."
    table = _long_runs(results)
    rows = []
    for (objective, generator, source, t_x), part in table.groupby(["objective", "generator", "source", "t_x"], sort=False):
        linear, knn = (part[part.probe == probe].set_index("steps").sort_index() for probe in ("linear", "knn"))
        row = {"objective": objective, "views from": _views_from(source, generator), "augmentation": T_X[t_x]}
        row |= {f"{steps:,} updates": percent(own, "accuracy", "low", "high") for steps, own in linear.iterrows()}
        rows.append(row | {"kNN, at the end": percent(knn.iloc[-1], "accuracy", "low", "high")})
    shown = pd.DataFrame(rows).fillna("")
    return shown.assign(**{"kNN, at the end": shown.pop("kNN, at the end")})  # behind all lengths


def longer_gains(results: Path) -> pd.DataFrame:
    "What guided views gain over real and uniform ones, each under what suits it best, by number of updates."
    table = _long_runs(results).query("source == 'guided' and probe in ['linear', 'knn']")
    rows = []
    for key, part in table.groupby(["objective", "generator", "t_x", "steps"], sort=False):
        row = dict(zip(["objective", "generator", "augmentation", "updates"], [*key[:2], T_X[key[2]], f"{key[3]:,}"]))
        for other in ("real", "uniform"):
            row |= {f"{own.probe}, minus {other}": interval(own, f"minus_best_{other}", 100, 1) for _, own in part.iterrows()}
        rows.append(row)
    return pd.DataFrame(rows)


def ends(results: Path) -> pd.DataFrame:
    "Guided views after the most updates that they, real and uniform ones all had; each under what suits it best on validation."
    table, runs = pd.read_csv(results / "longer_table.csv"), pd.read_csv(results / "longer.csv")
    chosen = runs[(runs.split == "val") & (runs.probe == "linear") & (runs.source == "guided")]
    chosen = chosen.groupby(["objective", "generator", "steps", "t_x"], sort=False).accuracy.mean()
    rows = []
    for (objective, generator), by_t_x in chosen.groupby(["objective", "generator"], sort=False):
        own = table[(table.objective == objective) & table.generator.isin([generator, "images"])]
        steps = max(n for n, part in own.groupby("steps") if {"real", "uniform", "guided"} <= set(part.source))
        *_, t_x = by_t_x.xs(steps, level="steps", drop_level=False).idxmax()
        guided = own[(own.source == "guided") & (own.steps == steps) & (own.t_x == t_x)].set_index("probe")
        linear, knn = guided.loc["linear"], guided.loc["knn"]
        rows.append({"objective": objective, "views made by": generator, "augmentation": T_X[t_x], "updates": f"{steps:,}",
                     "guided, linear probe, %": percent(linear, "accuracy", "low", "high")}
                    | {f"{name}, minus {other}": interval(row, f"minus_best_{other}", 100, 1)
                       for name, row in (("linear", linear), ("kNN", knn)) for other in ("real", "uniform")})  # fmt: skip
    return pd.DataFrame(rows)


def fresh(results: Path) -> pd.DataFrame:
    "Rows that stood out, on seeds that had no say in anything and on all."
    table = pd.read_csv(results / "fresh_table.csv")
    return pd.DataFrame([
        {"objective": row["objective"], "probe": row["probe"], "seeds": f"{row['seeds']} ({row['of'].split()[0]})",
         "views from": row["source"], "accuracy, %": percent(row, "accuracy", "low", "high"),
         "guided minus this, points": interval(row, "gain", 100, 1)} for _, row in table.iterrows()
    ])


def doubling(results: Path) -> pd.DataFrame:
    "What twice the updates bring at the end of every row, in points of the linear probe."
    table, rows = pd.read_csv(results / "longer_doubling.csv"), []
    for _, part in table.groupby(["objective", "generator", "source", "t_x"], sort=False):
        row = part.iloc[0]
        rows.append({
            "objective": row.objective, "views from": _views_from(row.source, row.generator),
            "augmentation": T_X[row.t_x], "updates": f"{row.start:,} to {row.end:,}",
        })
        for own in part.itertuples():
            images = {"val": "validation"}.get(own.split, own.split)
            rows[-1][f"points on {images} images"] = f"{own.points:+.2f} [{own.low:+.2f}, {own.high:+.2f}]"
    return pd.DataFrame(rows)


def continuous(results: Path) -> pd.DataFrame:
    "Accuracy against the number of distinct anchors."
    table = pd.read_csv(results / "continuous_table.csv")
    table = table[table.probe == "linear"]
    kinds = {"guided": "fresh at every step", "fixed": "{:,} stored", "replayed": "{:,}, each with a fresh positive every time"}
    names = [kinds[row.source.partition("-")[0]].format(row.anchors) for row in table.itertuples()]
    return pd.DataFrame({
        "anchors": names,
        "times each is seen": [f"{value:.1f}" for value in table.repeats],
        "linear probe, %": [percent(row, "accuracy", "low", "high") for _, row in table.iterrows()],
    })


TABLES = {table.__name__: table for table in (
    generators, impact, table1, coverage, claims, sources, objectives, gains, augmentations, longer_sources, longer_augmentations,
    longer_augmentation_gains, longer, longer_gains, ends, fresh, doubling, continuous, speed, verdicts)}


def markdown(frame: pd.DataFrame) -> str:
    "A pipe table."
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).values]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(text: str, results: Path) -> str:
    "`text` with every table between its markers made anew, from folders of profiles in `results`."
    def table(match: re.Match) -> str:
        profile = match[3] or "quick"
        made_by = "" if match[2] in ("speed", "claims", "verdicts") else f"\n\n*Profile `{profile}`.*"
        return f"{match[1]}\n{markdown(TABLES[match[2]](results / profile))}{made_by}\n{match[4]}"

    return re.sub(r"(<!-- table: (\w+)(?: of (\w+))? -->)\n.*?(<!-- end -->)", table, text, flags=re.S)


def main(arguments: list[str]) -> int:
    "Fills or checks; 1 if a check fails."
    stale = []
    for name in PAGES:
        old = (ROOT / name).read_text(encoding="utf-8")
        new = fill(old, ROOT / "results")
        if old != new:
            stale.append(name)
            if "--check" not in arguments:
                (ROOT / name).write_text(new, encoding="utf-8")
    if "--check" in arguments:
        differ = f"{', '.join(stale)}: tables differ from results; run docs/readme_tables.py"
        print(differ if stale else "all tables are up to date")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
