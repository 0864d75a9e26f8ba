"The command line: verbs hand files to each other, mistakes cost one line."
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from mlvgm_mi import cli, contrastive
from mlvgm_mi.cli import app, main
from mlvgm_mi.contrastive import Stream, save_encoder, small_resnet
from mlvgm_mi.generators.core import load_generator
from mlvgm_mi.perturb import EqualLoss, Recipe, SpareTop, moves
from mlvgm_mi.walkers import fresh_walkers, save_walkers

RECIPE = Recipe({"w0-1": 0.1, "w2-3": 0.5, "w4-5": 1.0, "w6-7": 1.0})


def run(*words):
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_impact_writes_table_figure_and_recipe(tmp_path):
    output = run("impact", "linear-gaussian", "--budget", 1.0, "--steps", 60, "--out", tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"impact.csv", "impact_table.csv", "impact.png", "impact.pdf", "recipe.yaml"}
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.budget == 1.0 and "recipe at" in output
    assert set(recipe.strengths) <= set(pd.read_csv(tmp_path / "impact.csv").group)


def test_rule_and_blocks_reach_the_recipe_and_the_errors(tmp_path):
    "Sparing keeps the group that resampling costs most; four blocks are four times the pairs."
    for name, words in {"equal": ("--blocks", 4), "spare": ("--rule", "spare-top")}.items():
        run("impact", "linear-gaussian", "--budget", 2.0, "--steps", 60, "--out", tmp_path / name, *words)
    equal, spare = (pd.read_csv(tmp_path / name / "impact.csv") for name in ("equal", "spare"))
    assert (equal.n == 4 * spare.n).all() and equal.se.mean() < 0.7 * spare.se.mean()
    recipes = {name: Recipe.from_yaml(tmp_path / name / "recipe.yaml") for name in ("equal", "spare")}
    assert [recipes["equal"].rule, recipes["spare"].rule] == [EqualLoss().name, SpareTop().name]
    table = pd.read_csv(tmp_path / "spare" / "impact_table.csv").set_index("group")
    top = table.lost.idxmax()
    assert recipes["spare"].strengths[top] == 0 < recipes["equal"].strengths[top]


def test_a_budget_out_of_reach_still_leaves_the_table(tmp_path, capsys):
    words = ["impact", "linear-gaussian", "--budget", "0.1", "--rule", "spare-top", "--steps", "60", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main(lambda: app(words, standalone_mode=False))
    assert stop.value.code == 2 and "budget=0.1 is out of reach" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"impact.csv", "impact_table.csv", "impact.png", "impact.pdf"}


def test_views_train_evaluate(tmp_path):
    RECIPE.to_yaml(tmp_path / "recipe.yaml")
    run("views", "fashion-stylegan2", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "v", "--anchors", 2)
    assert (tmp_path / "v.png").stat().st_size > 1000
    train = ("train", "--source", "guided", "--recipe", tmp_path / "recipe.yaml", "--dataset", "digits")
    train += ("--steps", 4, "--batch-size", 8)
    run(*train, "--out", tmp_path / "run")
    first = (tmp_path / "run" / "encoder.safetensors").read_bytes()
    run(*train, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() == first
    output = run("evaluate", tmp_path / "run" / "encoder.safetensors", "--dataset", "digits", "--out", tmp_path / "e.csv")
    assert "knn" in output and set(pd.read_csv(tmp_path / "e.csv").split) == {"val", "test"}


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    firsts = []
    monkeypatch.setattr(contrastive, "Stream", lambda source, first, *rest: firsts.append(first) or Stream(source, first, *rest))
    RECIPE.to_yaml(tmp_path / "recipe.yaml")
    words = ("train", "--source", "continuous", "--recipe", tmp_path / "recipe.yaml", "--objective", "simsiam", "--dataset",
             "digits", "--steps", 40, "--batch-size", 8, "--checkpoint-every", 4, "--out")
    command = [sys.executable, "-c", "from mlvgm_mi.cli import main; main()", *map(str, words), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("step-*.ckpt")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "encoder.safetensors").exists()
    assert run(*words, tmp_path / "killed") == run(*words, tmp_path / "whole").replace("whole", "killed")
    assert firsts[0] > 0 == firsts[1]  # taken up, not begun again
    for name in ("encoder.safetensors", "history.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "linear" in run("evaluate", tmp_path / "killed" / "encoder.safetensors", "--dataset", "digits")


def test_train_with_walkers_another_objective_and_logs(tmp_path):
    network = load_generator("fashion-stylegan2")
    save_walkers(tmp_path / "walkers.safetensors", fresh_walkers(network, network.layout.group_names))
    words = ("train", "--source", "group-walker", "--walkers", tmp_path / "walkers.safetensors", "--objective", "simsiam",
             "--dataset", "digits", "--steps", 3, "--batch-size", 8, "--logs", tmp_path / "logs", "--out", tmp_path / "run")
    assert "3 updates" in run(*words)
    assert (tmp_path / "run" / "encoder.safetensors").exists() and list((tmp_path / "logs").rglob("views.png"))


def test_evaluate_reads_a_folder_of_pictures(tmp_path):
    save_encoder(tmp_path / "encoder.safetensors", small_resnet(1, width=4, seed=0))
    for label in range(2):
        for n in range(12):
            path = tmp_path / "set" / f"class{label}" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 40), 200 * label + n).save(path)
    output = run("evaluate", tmp_path / "encoder.safetensors", "--dataset", "folder", "--folder", tmp_path / "set",
                 "--no-few-labels")
    assert "linear" in output and "1pct" not in output


def test_few_labels_are_left_out_where_a_set_cannot_spare_them(tmp_path, capsys):
    save_encoder(tmp_path / "encoder.safetensors", small_resnet(1, width=4, seed=0))
    for label, n in ((label, n) for label in "ab" for n in range(40)):
        path = tmp_path / "set" / label / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 100 * (label == "b") + n).save(path)
    words = ("evaluate", tmp_path / "encoder.safetensors", "--dataset", "folder", "--folder", tmp_path / "set", "--size", 16)
    output = run(*words)
    assert "linear_1pct is left out: share=0.01 of" in output and "linear_10pct " in output and "knn" in output


def test_the_preset_can_be_overruled(tmp_path, monkeypatch):
    seen = {}

    def remember(module, source, out, every, workers, logs):
        seen.update(views=source.views, batch_size=source.batch_size, lr=module.config.lr, workers=workers, moved=source.perturb)
        raise ValueError("seen")

    monkeypatch.setattr(cli, "fit", remember)
    words = ["train", "--source", "group-gaussian", "--group-sigma", "w0-1=1e-1", "--group-sigma", "w6-7=2", "--views", "3",
             "--batch-size", "64", "--lr", "0.8", "--workers", "2", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="seen"):
        run(*words)
    assert moves(seen.pop("moved")) == {"w0-1": (1, 0.1), "w6-7": (1, 2.0)}
    assert seen == dict(views=3, batch_size=64, lr=0.2, workers=2)


@pytest.mark.parametrize("words, encoder, batch_size", [
    (["--scale", "small"], "small_resnet", 128),
    (["--scale", "paper"], "resnet50", 512),
    (["--scale", "paper", "--encoder", "small_resnet", "--batch-size", "8"], "small_resnet", 8),
])  # fmt: skip
def test_a_scale_brings_its_encoder_and_batch(tmp_path, monkeypatch, words, encoder, batch_size):
    def remember(module, source, *_, **__):
        raise ValueError(f"{module.encoder.config['encoder']} {source.batch_size}")

    monkeypatch.setattr(cli, "fit", remember)
    with pytest.raises(ValueError, match=f"^{encoder} {batch_size}$"):
        run("train", "--source", "synthetic", "--objective", "byol", *words, "--out", tmp_path)


def test_generated_views_need_no_real_images(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_dataset", lambda *_, **__: pytest.fail("loaded"))
    run("train", "--source", "synthetic", "--steps", 2, "--batch-size", 8, "--out", tmp_path)


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    words = ("train", "--dataset", "digits", "--steps", 2, "--batch-size", 8, "--out", tmp_path, "--source")
    run(*words, "real")
    others = {("synthetic",): "views", ("real", "--t-x", "simclr"): "views", ("real", "--objective", "dcl"): "objective"}
    for other, named in others.items():
        with pytest.raises(ValueError, match=f"other {named};"):
            run(*words, *other)


@pytest.mark.parametrize("words, message", [
    (("impact", "stylegan9"), "choose one of"),
    (("impact", "linear-gaussian", "--sigma-x", "0"), "sigma_x=0"),
    (("impact", "linear-gaussian", "--rule", "greed"), "rule='greed' is unknown; choose one of equal-loss, spare-top"),
    (("impact", "linear-gaussian", "--blocks", "0"), "blocks=0"),
    (("views", "linear-gaussian", "--recipe", "nowhere.yaml"), "nowhere.yaml"),
    (("train", "--source", "guided", "--dataset", "digits", "--out", "x"), "recipe=None"),
    (("train", "--source", "fake", "--dataset", "digits", "--out", "x"), "name='fake' is unknown"),
    (("train", "--source", "real", "--objective", "magic", "--dataset", "digits", "--out", "x"), "objective='magic'"),
    (("train", "--source", "real", "--scale", "huge", "--dataset", "digits", "--out", "x"), "scale='huge'"),
    (("train", "--source", "group-gaussian", "--group-sigma", "w0-1", "--out", "x"), "should read group=sigma"),
    (("train", "--source", "synthetic", "--lr", "0", "--out", "x"), "lr=0.0 positive"),
    (("train", "--source", "synthetic", "--batch-size", "0", "--out", "x"), "batch_size=0"),
    (("train", "--source", "real", "--dataset", "digits", "--checkpoint-every", "0", "--out", "x"), "checkpoint_every=0"),
    (("train", "--source", "real", "--dataset", "cifar10", "--out", "x"), "folder"),
    (("train", "--source", "real", "--dataset", "digits", "--folder", "there", "--out", "x"), "folder"),
    (("evaluate", "nowhere.safetensors", "--dataset", "digits"), "no such file"),
    (("reproduce",), "there is no Snakefile"),
    (("impact", "my_decoders:build"), "there is no module my_decoders"),
])
def test_mistakes_cost_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(lambda: app(list(words), standalone_mode=False))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(Path(tmp_path).iterdir())


def test_options_that_make_no_difference_are_named(tmp_path, capsys):
    unread = ["--group-sigma", "z0=1", "--dataset", "digits", "--uniform-sigma", "0.25"]
    main(lambda: app(["train", "--source", "synthetic", "--generator", "fashion-bigbigan", *unread,
                      "--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "a")], standalone_mode=False))
    notes = capsys.readouterr().err
    assert [line.split()[-1] for line in notes.splitlines()] == ["--uniform-sigma", "--group-sigma", "--dataset"]
    assert notes.startswith("note: synthetic views do not depend on")
    main(lambda: app(["train", "--source", "uniform", "--uniform-sigma", "0.25", "--steps", "2", "--batch-size", "4",
                      "--out", str(tmp_path / "b")], standalone_mode=False))
    assert not capsys.readouterr().err


def test_a_generator_of_the_folder_where_the_command_runs(tmp_path):
    (tmp_path / "my_decoders.py").write_text("from mlvgm_mi.generators.core import demo_linear_gaussian as build\n")
    command = Path(sys.executable).with_name("mlvgm-mi")
    words = ["impact", "my_decoders:build", "--steps", "20", "--budget", "0.5"]
    done = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Recipe.from_yaml(tmp_path / "impact" / "recipe.yaml").generator == "my_decoders:build"


def test_a_recipe_of_another_registered_generator_is_refused(tmp_path):
    replace(RECIPE, generator="fashion-bigbigan").to_yaml(tmp_path / "recipe.yaml")
    for words in (("views", "fashion-stylegan2"), ("train", "--source", "guided", "--steps", 2)):
        with pytest.raises(ValueError, match="was measured on fashion-bigbigan; run `mlvgm-mi impact fashion-stylegan2`"):
            run(*words, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [
    ("impact", "linear-gaussian"), ("train", "--source", "synthetic", "--steps", "2"), ("evaluate", "e.safetensors")])
def test_a_place_where_nothing_can_be_written_is_named_before_any_work(tmp_path, monkeypatch, words):
    for name in ("fit_impact", "fit", "load_encoder"):
        monkeypatch.setattr(cli, name, lambda *_, **__: pytest.fail("worked"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out: nothing can be written"):
        run(*words, "--out", tmp_path / "file" / "results")


def test_a_recipe_of_other_curves_does_not_stay(tmp_path):
    words = ("impact", "linear-gaussian", "--steps", 20, "--out", tmp_path, "--budget")
    run(*words, 0.5)
    assert (tmp_path / "recipe.yaml").exists()
    with pytest.raises(ValueError, match="budget=50"):
        run(*words, 50)
    assert (tmp_path / "impact.csv").exists() and not (tmp_path / "recipe.yaml").exists()


def test_a_run_that_is_told_to_stop_has_not_succeeded(tmp_path):
    words = ("train", "--source", "synthetic", "--steps", 4000, "--batch-size", 8, "--checkpoint-every", 2, "--out", tmp_path)
    command = [sys.executable, "-c", "from mlvgm_mi.cli import main; main()", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("step-*.ckpt")):
        time.sleep(0.01)
    process.terminate()
    assert "stopped by SIGTERM after" in process.communicate()[1] and process.returncode == 1
    assert not (tmp_path / "encoder.safetensors").exists()
