"The command line: verbs hand files to each other, mistakes cost one line."
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mlvgm_mi import cli, contrastive
from mlvgm_mi.cli import app, main
from mlvgm_mi.contrastive import Stream, load_encoder, save_encoder, small_resnet
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


@pytest.fixture
def pictures(tmp_path):
    "A folder of 2 x 20 pictures in colour, wider than high."
    for label, n in ((label, n) for label in "ab" for n in range(20)):
        path = tmp_path / "pictures" / label / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200 * (label == "b"), n, 90)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def judged(monkeypatch):
    "The shapes of the images that `evaluate` judged."
    shapes = []
    judge = cli.judge
    monkeypatch.setattr(cli, "judge", lambda network, splits, *rest: shapes.append(splits.train.image_shape)
                        or judge(network, splits, *rest))
    return shapes


def test_the_file_of_an_encoder_keeps_the_shape_of_the_images_of_its_training(tmp_path):
    encoder, path = small_resnet(1, width=4), tmp_path / "encoder.safetensors"
    old = load_encoder(save_encoder(path, encoder))
    assert old.config == encoder.config and "image_shape" not in old.config
    back = load_encoder(save_encoder(path, encoder, image_shape=torch.Size([1, 40, 24])))
    assert back.config == encoder.config | {"image_shape": [1, 40, 24]}
    assert load_encoder(save_encoder(path, back)).config == back.config
    assert all(map(torch.equal, back.parameters(), encoder.parameters()))


@pytest.mark.parametrize("words, shape, note", [
    ([], (1, 24, 24), ""),
    (["--size", "16"], (1, 16, 16), "trained on images of 24x24 pixels, those of folder have 16x16"),
    (["--size", "24"], (1, 24, 24), ""),
])
def test_an_encoder_is_judged_at_the_size_of_its_training(tmp_path, pictures, judged, capsys, words, shape, note):
    save_encoder(tmp_path / "e.safetensors", small_resnet(1, width=4), (1, 24, 24))
    command = ["evaluate", str(tmp_path / "e.safetensors"), "--dataset", "folder", "--folder", str(pictures), "--no-few-labels"]
    main(lambda: app([*command, *words], standalone_mode=False))
    error = capsys.readouterr().err
    assert judged == [shape] and (note in error if note else "note" not in error)
    assert error.count("note") == bool(note)


def test_a_file_that_does_not_say_its_size_is_judged_at_a_size_that_is_said(tmp_path, pictures, judged, capsys):
    save_encoder(tmp_path / "e.safetensors", small_resnet(3, width=4))
    words = ["evaluate", str(tmp_path / "e.safetensors"), "--dataset", "folder", "--folder", str(pictures), "--no-few-labels"]
    for more in ([], ["--size", "16"]):
        main(lambda: app([*words, *more], standalone_mode=False))
    error = capsys.readouterr().err
    assert judged == [(3, 32, 32), (3, 16, 16)]
    assert error.count("note") == 1 and "does not say on what size it was trained; pictures are cut to 32 pixels" in error


def test_a_set_of_one_size_says_so(tmp_path, judged, capsys):
    save_encoder(tmp_path / "e.safetensors", small_resnet(1, width=4), (1, 24, 24))
    words = ["evaluate", str(tmp_path / "e.safetensors"), "--dataset", "digits", "--size", "24", "--no-few-labels"]
    main(lambda: app(words, standalone_mode=False))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert judged == [(1, 32, 32)] and len(notes) == 2
    assert "trained on images of 24x24 pixels, those of digits have 32x32" in notes[0]
    assert notes[1] == "note: digits images do not depend on --size"


@pytest.mark.parametrize("words, shape, note", [
    ([], [3, 32, 32], "pictures of folder are cut to 32 pixels, in colour"),
    (["--size", "24"], [3, 24, 24], "pictures of folder are cut to 24 pixels, in colour"),
    (["--channels", "1"], [1, 32, 32], "pictures of folder are cut to 32 pixels, in grey"),
    (["--size", "24", "--channels", "1"], [1, 24, 24], ""),
    (["--generator", "linear-gaussian"], [3, 32, 32], "real views do not depend on --generator"),
])
def test_real_pictures_are_trained_on_in_a_shape_that_was_asked_for_or_is_said(tmp_path, pictures, capsys, words, shape, note):
    words = ["train", "--source", "real", "--dataset", "folder", "--folder", str(pictures), "--steps", "2", "--batch-size", "4",
             "--out", str(tmp_path / "run"), *words]
    main(lambda: app(words, standalone_mode=False))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert load_encoder(tmp_path / "run" / "encoder.safetensors").config["image_shape"] == shape
    assert any(note in line for line in notes) if note else not notes


def test_pictures_beside_generated_images_take_their_shape(tmp_path, pictures, capsys):
    RECIPE.to_yaml(tmp_path / "recipe.yaml")
    words = ["train", "--source", "mixed-0.5", "--recipe", str(tmp_path / "recipe.yaml"), "--dataset", "folder", "--folder",
             str(pictures), "--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "run")]
    main(lambda: app(words, standalone_mode=False))
    assert load_encoder(tmp_path / "run" / "encoder.safetensors").config["image_shape"] == [1, 32, 32]
    assert "pictures of folder are cut to 32 pixels, in grey" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"real has images of shape \(3, 32, 32\)"):
        run(*words, "--channels", 3)


def test_the_papers_probe_adds_its_rows(tmp_path):
    save_encoder(tmp_path / "e.safetensors", small_resnet(1, width=4), (1, 32, 32))
    words = ("evaluate", tmp_path / "e.safetensors", "--dataset", "digits", "--no-few-labels", "--out")
    run(*words, tmp_path / "without.csv")
    run(*words, tmp_path / "with.csv", "--sgd", 2)
    without, frame = (pd.read_csv(tmp_path / name) for name in ("without.csv", "with.csv"))
    assert set(without.probe) == {"linear", "knn"}
    pd.testing.assert_frame_equal(frame[:4], without)
    assert frame.probe[4:].tolist() == ["sgd"] * 2 + ["sgd_top5"] * 2 + ["sgd_best"] * 2
    assert frame.split[4:].tolist() == ["val", "test"] * 3 and set(frame.dataset) == {"digits"}
    accuracy = frame.set_index(["probe", "split"]).accuracy
    assert accuracy["sgd_top5", "test"] > accuracy["sgd", "test"]


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
    (("train", "--source", "real", "--dataset", "cifar10", "--size", "0", "--out", "x"), "--size 0 must be at least 1"),
    (("evaluate", "nowhere.safetensors", "--dataset", "digits"), "no such file"),
    (("evaluate", "nowhere.safetensors", "--sgd", "-1"), "--sgd -1"),
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
    unread = ["--group-sigma", "z0=1", "--dataset", "digits", "--uniform-sigma", "0.25", "--channels", "3"]
    main(lambda: app(["train", "--source", "synthetic", "--generator", "fashion-bigbigan", *unread,
                      "--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "a")], standalone_mode=False))
    notes = capsys.readouterr().err
    assert [line.split()[-1] for line in notes.splitlines()] == ["--uniform-sigma", "--group-sigma", "--dataset", "--channels"]
    assert notes.startswith("note: synthetic views do not depend on")
    main(lambda: app(["train", "--source", "uniform", "--uniform-sigma", "0.25", "--steps", "2", "--batch-size", "4",
                      "--out", str(tmp_path / "b")], standalone_mode=False))
    assert not capsys.readouterr().err
    main(lambda: app(["train", "--source", "real", "--dataset", "digits", "--size", "16", "--steps", "2", "--batch-size", "4",
                      "--out", str(tmp_path / "c")], standalone_mode=False))
    assert capsys.readouterr().err == "note: digits images do not depend on --size\n"


def test_an_error_in_a_function_of_yours_says_which_was_called(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_decoders.py").write_text(
        "def value(): raise ValueError('shapes differ')\ndef key(): return {}['w']\ndef gone(): raise RuntimeError('gone')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, said in {"value": "shapes differ", "key": "w"}.items():
        with pytest.raises(SystemExit):
            main(lambda: app(["impact", f"broken_decoders:{name}"], standalone_mode=False))
        assert capsys.readouterr().err == f"error: {said} (while building broken_decoders:{name})\n"
    with pytest.raises(RuntimeError, match="gone") as caught:
        main(lambda: app(["impact", "broken_decoders:gone"], standalone_mode=False))
    assert caught.value.__notes__ == ["while building broken_decoders:gone"]


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


@pytest.mark.parametrize("words", [("evaluate", "e.safetensors"), ("explore", "linear-gaussian")])
def test_a_folder_in_the_place_of_a_file_is_named_before_any_work(tmp_path, monkeypatch, words):
    for name in ("load_encoder", "load_generator"):
        monkeypatch.setattr(cli, name, lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ValueError, match="--out: .* is a folder; name a file in it"):
        run(*words, "--out", tmp_path)


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
