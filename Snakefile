# Every table and figure, by papermill:  snakemake --cores 2 --config profile=quick
#
# Jobs write to build/<profile>/ and the last one publishes to results/<profile>/ and figures/<profile>/, so a fresh clone always
# computes and what is published is always complete. The executed notebook of a job is its log: it stays when the job fails.
import json
from dataclasses import asdict

from mlvgm_mi.experiments import load_profile

P = load_profile(f"nbs/experiments/profiles/{config.get('profile', 'quick')}.yaml")
ALL = asdict(P)
BUILD = f"build/{P.name}"
NB = "nbs/experiments"
PAPERMILL = "OMP_NUM_THREADS=1 papermill --no-progress-bar -k python3 --cwd ."

ENCODERS = [run.name for run in P.encoders]
FIXED = [run.name for run in P.fixed + P.continuous]
GUIDED = ("guided", "fixed-")


def code(*modules):
    "The modules whose change makes a result stale."
    return [f"mlvgm_mi/{name}.py" for name in ("latents", "checkpoints", "data", "generators/core", "generators/stylegan2", *modules)]


def picture(name):
    return [f"{BUILD}/figures/{name}.{kind}" for kind in ("png", "pdf")]


def parameters(*names, **more):
    "Papermill's parameters as JSON; only config values and wildcards, so that a change of them is seen as one."
    return json.dumps({"build": BUILD} | {name: ALL[name] for name in names} | more)


rule all:
    input:
        f"{BUILD}/published.txt"


rule generators:
    input:
        nb=f"{NB}/E0_generators.ipynb", code=code("generators/training", "plot")
    output:
        f"{BUILD}/results/generators.csv", picture("samples")
    params:
        y=lambda w: parameters("generator", "dataset", "quality")
    log:
        nb=f"{BUILD}/notebooks/E0_generators.ipynb", txt=f"{BUILD}/logs/E0_generators.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule impact:
    input:
        nb=f"{NB}/E1_impact.ipynb", code=code("mi", "perturb", "impact", "plot")
    output:
        f"{BUILD}/results/impact.csv", f"{BUILD}/results/impact_table.csv", f"{BUILD}/results/budget.csv",
        recipe=f"{BUILD}/results/recipe.yaml", pictures=picture("impact") + picture("budget")
    params:
        y=lambda w: parameters("generator", "impact", "impact_seeds", "budget")
    log:
        nb=f"{BUILD}/notebooks/E1_impact.ipynb", txt=f"{BUILD}/logs/E1_impact.txt"
    priority:
        10
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


rule encoder:
    input:
        nb=f"{NB}/train.ipynb", code=code("perturb", "views", "contrastive", "evaluate", "experiments"),
        recipe=lambda w: rules.impact.output.recipe if w.name.startswith(GUIDED) else []
    output:
        f"{BUILD}/cells/{{name}}.csv"
    params:
        y=lambda w: parameters("generator", "dataset", "uniform_sigma", "encoder", "train", "batch_size", "probe_images",
                                   name=w.name, profile=P.name)
    log:
        nb=f"{BUILD}/runs/{{name}}.ipynb", txt=f"{BUILD}/logs/{{name}}.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule sources:
    input:
        nb=f"{NB}/E3_sources.ipynb", code=code("evaluate", "plot"),
        cells=[f"{BUILD}/cells/{name}.csv" for name in ENCODERS]
    output:
        f"{BUILD}/results/encoders.csv", f"{BUILD}/results/sources_table.csv", picture("sources")
    params:
        y=lambda w: parameters("sources", "train", "batch_size", "probe_images", cells=ENCODERS)
    log:
        nb=f"{BUILD}/notebooks/E3_sources.ipynb", txt=f"{BUILD}/logs/E3_sources.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule continuous:
    input:
        nb=f"{NB}/E4_continuous.ipynb", code=code("evaluate", "plot"),
        cells=[f"{BUILD}/cells/{name}.csv" for name in FIXED]
    output:
        f"{BUILD}/results/continuous.csv", f"{BUILD}/results/continuous_table.csv", picture("continuous")
    params:
        y=lambda w: parameters("fixed_sizes", "train", "batch_size", cells=FIXED)
    log:
        nb=f"{BUILD}/notebooks/E4_continuous.ipynb", txt=f"{BUILD}/logs/E4_continuous.txt"
    shell:
        "{PAPERMILL} {input.nb} {log.nb} -y '{params.y}' > {log.txt} 2>&1"


rule publish:
    input:
        rules.generators.output, rules.impact.output, rules.views.output, rules.sources.output, rules.continuous.output
    output:
        f"{BUILD}/published.txt"
    params:
        keep="--keep-cells" if P.keep_cells else "",
    shell:
        "python .ci/publish.py {P.name} {params.keep}"
