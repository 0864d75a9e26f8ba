"The pages that only read tables or choose between finished runs, run on small numbers with a known answer."
import json
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mlvgm_mi.cells import write_frame
from mlvgm_mi.experiments import Run
from mlvgm_mi.perturb import Recipe

PAGES = Path(__file__).parents[1] / "nbs" / "experiments"
SEEDS = [0, 1, 2]


def run_page(name, **parameters):
    "The names that a page has defined in the end; its first code cell holds the parameters, as for papermill."
    cells = json.loads((PAGES / f"{name}.ipynb").read_text())["cells"]
    first, *rest = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {}
    exec(first, names)
    assert set(parameters) <= set(names), "no such parameter"
    names.update(parameters)
    for source in rest:
        exec(source, names)
    plt.close("all")
    return names


def accuracies(source, t_x, points, **more):
    "Test accuracy by the linear probe for three seeds, a quarter of a point apart."
    columns = dict(source=source, objective="simclr", t_x=t_x, probe="linear", dataset="digits", split="test") | more
    return pd.DataFrame([columns | dict(seed=seed, accuracy=points / 100 + seed / 400) for seed in SEEDS])


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    short = {"real": 83, "synthetic": 80, "uniform": 81, "guided": 84}
    write_frame(pd.concat([accuracies(*row) for row in ((s, "no_color", p) for s, p in short.items())]), folder / "encoders.csv")
    return folder


def longer(steps, generator="fashion-stylegan2", **points):
    made_by = lambda source: "images" if source == "real" else generator
    return [accuracies(source, "no_color", p, generator=made_by(source), steps=steps) for source, p in points.items()]


def verdicts(claims, number):
    return claims[claims.claim == number].verdict.tolist()


def test_claims_of_a_study_that_ends_early_are_judged_once(results):
    page = run_page("E9_claims", build=str(results.parent))
    assert list(page["studies"]) == [""]
    assert verdicts(page["claims"], 6) == verdicts(page["claims"], 8) == verdicts(page["claims"], 11) == ["confirmed"]
    assert not set(page["claims"].claim) & {7, 9, 10, 12, 15}  # no such rows here


def test_claims_are_judged_again_on_the_longest_training_that_all_sources_had(results):
    frames = [
        *longer(600, real=99, synthetic=10, uniform=10, guided=50),  # a shorter one
        *longer(2400, real=86, synthetic=80, uniform=85, guided=84),
        *longer(4800, real=99, uniform=10, guided=50),  # one source is missing
        *longer(9600, "another", real=99, synthetic=10, uniform=10, guided=50),  # nor does another generator count
    ]
    write_frame(pd.concat(frames), results / "longer.csv")
    claims = run_page("E9_claims", build=str(results.parent))["claims"]
    assert verdicts(claims, 6) == verdicts(claims, 11) == ["confirmed", "refuted"] and verdicts(claims, 8) == ["confirmed"] * 2
    again = claims[claims.text.str.endswith("after 2,400 updates.")].set_index("claim")
    assert set(again.index) == {6, 8, 11} and (len(claims), len(again)) == (6, 3)
    assert again.estimate.round(6).to_dict() == {6: -1, 8: 4, 11: -2}
    assert again.criterion.str.contains("after 2,400 updates > ").all()


def trial(run, steps, lr):
    "Accuracies of a rate that is the better one early and falls off later."
    slope = 0.5 if steps < 40 else -0.5
    accuracy = {"real": 0.6, "uniform": 0.5, "guided": 0.7}[run.source] + 0.01 * run.seed**2 + slope * (lr - 0.2)
    rows = product(("linear", "knn"), ("val", "test"))
    columns = dict(source=run.source, objective=run.objective, t_x=run.t_x, seed=run.seed, dataset="digits", lr=lr)
    return pd.DataFrame([columns | dict(probe=probe, split=split, accuracy=accuracy) for probe, split in rows])


def test_a_rate_is_kept_unless_the_row_offers_all_of_them_again(tmp_path, monkeypatch):
    offered = {}

    def at_rates(study, run, materials, train, rates, stem, also_in):
        offered[run.objective, run.source, train["steps"], run.seed] = rates
        return [trial(run, train["steps"], lr) for lr in rates or [train["lr"]]]

    monkeypatch.setattr("mlvgm_mi.studies.at_rates", at_rates)
    Recipe({"w0-1": 0.1, "w2-3": 0.2, "w4-5": 0.9, "w6-7": 1.0}).to_yaml(tmp_path / "results" / "recipe.yaml")
    lengths = {"t_x": "none", "lengths": [20, 40]}
    made = lengths | {"generator": "fashion-stylegan2"}
    ends = [{"source": "real", **lengths}, {"source": "guided", **made}]
    again = {"source": "uniform", "strength": 1.0, "rates_again": [40], **made}
    rows = {"simsiam": [*ends, again], "simclr": ends, "byol": ends[:1]}  # the last on real images only
    page = run_page(
        "E3b_longer", build=str(tmp_path), dataset="digits", train={"steps": 20, "lr": 0.3, "warmup": 2}, probe_images=100,
        rates={"simsiam": [0.2, 0.4]}, rows=rows, seeds=SEEDS,
    )
    both = [0.2, 0.4]
    for seed in SEEDS:
        simsiam = {key[1:3]: rates for key, rates in offered.items() if key[0] == "simsiam" and key[3] == seed}
        assert simsiam == {("real", 20): both, ("guided", 20): both, ("uniform", 20): both,
                           ("real", 40): [0.4], ("guided", 40): [0.4], ("uniform", 40): both}
        simclr = [rates for key, rates in offered.items() if key[0] == "simclr" and key[3] == seed]
        assert simclr == [[]] * 4  # one rate: that of `train`
    frame = pd.read_csv(tmp_path / "results" / "longer.csv")
    kept = {key: lr.unique().tolist() for key, lr in frame.groupby(["objective", "source", "steps"]).lr}
    late = {key[1]: lr for key, lr in kept.items() if key[0] == "simsiam" and key[2] == 40}
    assert late == {"real": [0.4], "guided": [0.4], "uniform": [0.2]}
    assert all(lr == ([0.4] if objective == "simsiam" else [0.3]) for (objective, _, steps), lr in kept.items() if steps == 20)
    assert list(page["of_objective"]["byol"].source.unique()) == ["real"]
    points = page["doubling"].set_index(["objective", "source", "split"]).points
    assert points["simsiam", "guided", "test"] == pytest.approx(-20) and points["simsiam", "uniform", "test"] == pytest.approx(-10)


def test_fresh_seeds_are_judged_alone_and_with_the_earlier_ones(tmp_path, monkeypatch):
    "Guided views were three points ahead on the seeds that were looked at; on fresh ones they are one ahead."
    offered = set()
    trials = lambda run, steps, lead, lr: trial(run, steps, lr).assign(
        accuracy=0.6 + (lead if run.source == "guided" else 0) + 0.001 * run.seed**2)

    def at_rates(study, run, materials, train, rates, *rest):
        offered.add((run.source, train["steps"], *rates))
        return [trials(run, train["steps"], 0.01, lr) for lr in rates]

    monkeypatch.setattr("mlvgm_mi.studies.at_rates", at_rates)
    Recipe({"w0-1": 0.1, "w2-3": 0.2, "w4-5": 0.9, "w6-7": 1.0}).to_yaml(tmp_path / "results" / "recipe.yaml")
    guided = {"source": "guided", "generator": "fashion-stylegan2"}
    again = {"simclr": [row | {"t_x": "none", "lengths": [20, 40]} for row in ({"source": "real"}, guided)]}
    kept = lambda source, steps, seed: 0.3 if source == "real" or steps < 40 or seed == 1 else 0.2
    seen = [trials(Run(source, "simclr", "none", seed), steps, 0.03, kept(source, steps, seed)).assign(generator=name, steps=steps)
            for source, name in (("real", "images"), ("guided", "fashion-stylegan2")) for seed in SEEDS for steps in (20, 40, 80)]
    write_frame(pd.concat([*seen, seen[0].assign(t_x="simclr")]), tmp_path / "results" / "longer.csv")  # another augmentation
    train = {"steps": 20, "lr": 0.2, "warmup": 2}
    settings = dict(build=str(tmp_path), dataset="digits", train=train, probe_images=100, again=again)
    page = run_page("E3c_fresh_seeds", **settings, fresh_seeds=[3, 4])
    table = page["table"].set_index(["probe", "of", "source"])
    assert set(page["last"].steps) == {40} and set(page["frame"].steps) == {20, 40} and len(table) == 8
    assert offered == {(source, steps, lr) for source, lr in (("real", 0.3), ("guided", 0.2)) for steps in (20, 40)}
    gains = table.xs("real", level="source").gain.round(6).unstack()
    assert gains["fresh seeds"].tolist() == [0.01] * 2 and gains["all seeds"].tolist() == [0.022] * 2
    assert table.xs("guided", level="source").gain.isna().all()
    assert table.xs("real", level="source").seeds.unstack().iloc[0].to_dict() == {"fresh seeds": 2, "all seeds": 5}
    assert table.loc["linear", "fresh seeds", "real"].accuracy == pytest.approx(0.6 + 0.001 * (9 + 16) / 2)
    with pytest.raises(AssertionError, match="looked at before"):
        run_page("E3c_fresh_seeds", **settings, fresh_seeds=[2, 3])
    longer = {"simclr": [again["simclr"][1] | {"lengths": [60]}]}
    with pytest.raises(AssertionError, match="E3b has no row of .*'steps': 60"):
        run_page("E3c_fresh_seeds", **settings | {"again": longer}, fresh_seeds=[3])
