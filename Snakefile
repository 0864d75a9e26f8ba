# Every table and figure, by papermill:  snakemake --cores 2 --config profile=quick
#
# Jobs write to build/<profile>/ and the last one publishes to results/<profile>/ and figures/<profile>/, so a fresh clone always
# computes and what is published is always complete. The executed notebook of a job is its log: it stays when the job fails.
import json
from dataclasses import asdict

from mlvgm_mi.experiments import Run, load_profile, material_files, recipe_file

P = load_profile(f"nbs/experiments/profiles/{config.get('profile', 'quick')}.yaml")
ALL = asdict(P)
BUILD = f"build/{P.name}"
NB = "nbs/experiments"
PAPERMILL = "OMP_NUM_THREADS=1 papermill --no-progress-bar -k python3 --cwd ."

ENCODERS = [run.name for run in P.encoders]
CONTINUOUS = [run.name for run in P.continuous]
FAMILIES = [f"generators/{name}" for name in ("core", "stylegan2", "bigbigan", "nvae", "nvae_training")]
ENGINE = ["mi", "perturb", "optics", "impact"]
ENCODERS_CODE = ["perturb", "walkers", "views", "streams", "objectives", "methods", "encoders", "contrastive", "evaluate",
                 "precision", "experiments", "studies"]


def code(*modules):
    "The modules whose change makes a result stale."
    return [f"mlvgm_mi/{name}.py" for name in ("latents", "checkpoints", "cells", "data", *FAMILIES, *modules)]


def picture(name):
    return [f"{BUILD}/figures/{name}.{kind}" for kind in ("png", "pdf")]


def parameters(*names, **more):
    "Papermill's parameters as JSON; only config values and wildcards, so that a change of them is seen as one."
    return json.dumps({"build": BUILD} | {name: ALL[name] for name in names} | more)


def only(experiment):
    "The parameters that nothing but this experiment has."
    return ALL["parameters"].get(experiment, {})


def results(*names):
    return [f"{BUILD}/results/{name}" for name in names]


def budgets(generator):
    "The nats of the recipes that E1 writes for a generator."
    own = only("E1_impact")
    return {own.get("budgets", {}).get(generator, P.budget), *own.get("other_budgets", [])}


rule all:
    input:
        f"{BUILD}/published.txt"


rule generators:
    input:
        nb=f"{NB}/E0_generators.ipynb", code=code("generators/training", "plot")
    output:
        f"{BUILD}/results/generators.csv", picture("samples")
    params:
        y=lambda w: parameters("generators", "dataset", "images", "quality")
    log:
        nb=f"{BUILD}/notebooks/E0_generators.ipynb", txt=f"{BUILD}/logs/E0_generators.txt"
    priority:
        20
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule impact:
    input:
        nb=f"{NB}/E1_impact.ipynb", code=code(*ENGINE, "plot")
    output:
        results("impact.csv", "impact_table.csv", "budget.csv", "recipes.csv"), recipe=f"{BUILD}/results/recipe.yaml",
        recipes=[f"{BUILD}/results/{recipe_file(name, nats)}" for name in P.generators for nats in budgets(name)],
        pictures=picture("impact") + picture("budget")
    params:
        y=lambda w: parameters("generator", "generators", "impact", "impact_seeds", "budget", **only("E1_impact"))
    log:
        nb=f"{BUILD}/notebooks/E1_impact.ipynb", txt=f"{BUILD}/logs/E1_impact.txt"
    priority:
        30
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule calibration:
    input:
        nb=f"{NB}/E5_calibration.ipynb", code=code(*ENGINE, "mi_truths", "mi_estimators", "plot")
    output:
        results("calibration.csv", "trusted.csv", "ordering.csv", "coverage.csv"), picture("calibration")
    params:
        y=lambda w: parameters(**only("E5_calibration"))
    log:
        nb=f"{BUILD}/notebooks/E5_calibration.ipynb", txt=f"{BUILD}/logs/E5_calibration.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule delta:
    input:
        nb=f"{NB}/E6_delta.ipynb", code=code(*ENGINE, "walkers", "delta", "plot"), impact=results("impact_table.csv")
    output:
        results("delta.csv", "delta_table.csv", "table1.csv"), picture("delta"), picture("table1")
    params:
        y=lambda w: parameters("generators", **only("E6_delta"))
    log:
        nb=f"{BUILD}/notebooks/E6_delta.ipynb", txt=f"{BUILD}/logs/E6_delta.txt"
    priority:
        5
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule relevance:
    input:
        nb=f"{NB}/E7_relevance.ipynb", code=code(*ENGINE, "relevance", "stability", "plot"), impact=results("impact.csv")
    output:
        results("relevance.csv", "rank_correlations.csv", "claims_relevance.csv"), picture("relevance")
    params:
        y=lambda w: parameters("generators", "dataset", "images", **only("E7_relevance"))
    log:
        nb=f"{BUILD}/notebooks/E7_relevance.ipynb", txt=f"{BUILD}/logs/E7_relevance.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule stability:
    input:
        nb=f"{NB}/E8_stability.ipynb", code=code(*ENGINE, "relevance", "stability", "plot"), ordering=results("ordering.csv")
    output:
        results("stability.csv", "conditioned.csv", "claims_stability.csv"), picture("stability")
    params:
        y=lambda w: parameters("generators", **only("E8_stability"))
    log:
        nb=f"{BUILD}/notebooks/E8_stability.ipynb", txt=f"{BUILD}/logs/E8_stability.txt"
    priority:
        9
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule views:
    input:
        nb=f"{NB}/E2_views.ipynb", code=code("perturb", "views", "plot"), recipe=rules.impact.output.recipe
    output:
        picture("groups") + picture("views")
    params:
        y=lambda w: parameters("generator", "dataset", "uniform_sigma")
    log:
        nb=f"{BUILD}/notebooks/E2_views.ipynb", txt=f"{BUILD}/logs/E2_views.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule walkers:
    input:
        nb=f"{NB}/E2a_walkers.ipynb", code=code(*ENGINE, "walkers", "delta", "plot")
    output:
        results("walkers.safetensors", "walker_all.safetensors", "walkers.csv"), picture("walkers")
    params:
        y=lambda w: parameters("generator", "budget", **only("E2a_walkers"))
    log:
        nb=f"{BUILD}/notebooks/E2a_walkers.ipynb", txt=f"{BUILD}/logs/E2a_walkers.txt"
    priority:
        8
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule rates:
    input:
        nb=f"{NB}/E2b_rates.ipynb", code=code(*ENCODERS_CODE, "plot"), recipes=rules.impact.output.recipes
    output:
        results("rates.csv"), picture("rates")
    params:
        y=lambda w: parameters("generator", "dataset", "images", "encoder", "batch_size", "probe_images", "train", "train_of",
                               "budget", "uniform_sigma", main_t_x=P.fixed_t_x, study_rates=P.rates, **only("E2b_rates"))
    log:
        nb=f"{BUILD}/notebooks/E2b_rates.ipynb", txt=f"{BUILD}/logs/E2b_rates.txt"
    priority:
        7
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule encoder:
    input:
        nb=f"{NB}/train.ipynb",
        code=code(*ENCODERS_CODE),
        materials=lambda w: results(*material_files(Run.parse(w.name).source).values())
    output:
        f"{BUILD}/cells/{{name}}.csv"
    params:
        y=lambda w: parameters("generator", "dataset", "images", "uniform_sigma", "group_sigmas", "encoder", "batch_size",
                               "probe_images", "shares", "options", name=w.name, profile=P.name,
                               train=P.train_for(Run.parse(w.name)), rates=P.rates.get(Run.parse(w.name).objective, []))
    log:
        nb=f"{BUILD}/runs/{{name}}.ipynb", txt=f"{BUILD}/logs/{{name}}.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule sources:
    input:
        nb=f"{NB}/E3_sources.ipynb", code=code("evaluate", "studies", "plot"),
        cells=[f"{BUILD}/cells/{name}.csv" for name in ENCODERS]
    output:
        results("encoders.csv", "sources_table.csv"), picture("sources") + picture("sources_t_x")
    params:
        y=lambda w: parameters("train", "batch_size", "probe_images", cells=ENCODERS, main_t_x=P.fixed_t_x)
    log:
        nb=f"{BUILD}/notebooks/E3_sources.ipynb", txt=f"{BUILD}/logs/E3_sources.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule choice:
    input:
        nb=f"{NB}/E2c_choice.ipynb", code=code(*ENCODERS_CODE, "plot"), recipes=rules.impact.output.recipes
    output:
        results("choice.csv"), picture("choice")
    params:
        y=lambda w: parameters("generator", "dataset", "images", "encoder", "batch_size", "probe_images", "train",
                               objective=P.objectives[0], longer=only("E3b_longer").get("rows", {}).get(P.objectives[0], []),
                               **only("E2c_choice"))
    log:
        nb=f"{BUILD}/notebooks/E2c_choice.ipynb", txt=f"{BUILD}/logs/E2c_choice.txt"
    priority:
        6
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule long_rates:
    input:
        nb=f"{NB}/E2d_long_rates.ipynb", code=code(*ENCODERS_CODE, "plot"), recipes=rules.impact.output.recipes
    output:
        results("longer_rates.csv"), picture("longer_rates")
    params:
        y=lambda w: parameters("generator", "dataset", "images", "encoder", "batch_size", "probe_images", "train",
                               in_use=only("E3b_longer").get("rates", {}), **only("E2d_long_rates"))
    log:
        nb=f"{BUILD}/notebooks/E2d_long_rates.ipynb", txt=f"{BUILD}/logs/E2d_long_rates.txt"
    priority:
        6
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


def longer_materials(experiment="E3b_longer", rows_in="rows"):
    "The files that the rows of E3b or E3c read, beside the recipes."
    rows = [row for of_one in only(experiment).get(rows_in, {}).values() for row in of_one]
    return results(*sorted({file for row in rows for file in material_files(row["source"]).values()}))


rule longer:
    input:
        nb=f"{NB}/E3b_longer.ipynb", code=code(*ENCODERS_CODE, "plot"), recipes=rules.impact.output.recipes,
        materials=longer_materials()
    output:
        results("longer.csv", "longer_table.csv", "longer_doubling.csv", "longer_sources.csv", "longer_t_x.csv"),
        pictures=picture("longer") + picture("longer_sources") + picture("longer_t_x")
    params:
        y=lambda w: parameters("dataset", "images", "encoder", "batch_size", "probe_images", "shares", "seeds", "train", "train_of",
                               **only("E3b_longer"))
    log:
        nb=f"{BUILD}/notebooks/E3b_longer.ipynb", txt=f"{BUILD}/logs/E3b_longer.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule fresh_seeds:
    input:
        nb=f"{NB}/E3c_fresh_seeds.ipynb", code=code(*ENCODERS_CODE, "plot"), recipes=rules.impact.output.recipes,
        materials=longer_materials("E3c_fresh_seeds", "again"), longer=results("longer.csv")
    output:
        results("fresh.csv", "fresh_table.csv"), picture("fresh")
    params:
        y=lambda w: parameters("dataset", "images", "encoder", "batch_size", "probe_images", "shares", "train", "train_of",
                               decoded=only("E3b_longer")["decoded"],
                               **only("E3c_fresh_seeds"))
    log:
        nb=f"{BUILD}/notebooks/E3c_fresh_seeds.ipynb", txt=f"{BUILD}/logs/E3c_fresh_seeds.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule continuous:
    input:
        nb=f"{NB}/E4_continuous.ipynb", code=code("evaluate", "plot"),
        cells=[f"{BUILD}/cells/{name}.csv" for name in CONTINUOUS]
    output:
        f"{BUILD}/results/continuous.csv", f"{BUILD}/results/continuous_table.csv", picture("continuous")
    params:
        y=lambda w: parameters("fixed_sizes", "train", "batch_size", cells=CONTINUOUS)
    log:
        nb=f"{BUILD}/notebooks/E4_continuous.ipynb", txt=f"{BUILD}/logs/E4_continuous.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule claims:
    input:
        nb=f"{NB}/E9_claims.ipynb", code=code("evaluate", "stability", "plot"),
        tables=results("encoders.csv", "continuous.csv", "claims_relevance.csv", "claims_stability.csv"),
        longer=results("longer.csv") if "E3b_longer" in P.parameters else []
    output:
        results("claims.csv"), picture("claims")
    params:
        y=lambda w: parameters("generator", main_t_x=P.fixed_t_x, objective=P.objectives[0])
    log:
        nb=f"{BUILD}/notebooks/E9_claims.ipynb", txt=f"{BUILD}/logs/E9_claims.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule publish:
    input:
        rules.generators.output, rules.impact.output, rules.views.output, rules.walkers.output, rules.calibration.output,
        rules.delta.output, rules.relevance.output, rules.stability.output, rules.sources.output, rules.continuous.output, rules.claims.output,
        rules.rates.output if "E2b_rates" in P.parameters else [],  # tuning and length are for studies
        rules.choice.output if "E2c_choice" in P.parameters else [],
        rules.long_rates.output if "E2d_long_rates" in P.parameters else [],
        rules.longer.output if "E3b_longer" in P.parameters else [],
        rules.fresh_seeds.output if "E3c_fresh_seeds" in P.parameters else []
    output:
        f"{BUILD}/published.txt"
    params:
        keep="--keep-cells" if P.keep_cells else "",
    shell:
        "python .ci/publish.py {P.name} {params.keep}"
