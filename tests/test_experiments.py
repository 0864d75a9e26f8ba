"Profiles, sources by name, studies and publishing."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import mlvgm_mi.datasets  # noqa: F401 (adds the paper's sets to DATASETS)
from mlvgm_mi.cells import write_frame
from mlvgm_mi.contrastive import TrainConfig
from mlvgm_mi.data import DATASETS, load_digits
from mlvgm_mi.encoders import build_encoder
from mlvgm_mi.experiments import (
    MATERIAL_FILES, SOURCES, Materials, Run, at_strength, group_gaussian, load_profile, make_source, material_files, publish,
    recipe_file, source_kind,
)
from mlvgm_mi.generators.core import LinearGaussian, load_generator
from mlvgm_mi.latents import rng_for
from mlvgm_mi.methods import OBJECTIVES, SimCLR
from mlvgm_mi.perturb import Additive, Perturb, Recipe, moves
from mlvgm_mi.presets import PAPER
from mlvgm_mi.studies import Study, at_rates, best_on_validation, fingerprint, sources_table
from mlvgm_mi.views import AUGMENTATIONS, RealViews
from mlvgm_mi.walkers import all_groups, fresh_walkers, save_walkers

PROFILES = sorted((Path(__file__).parents[1] / "nbs" / "experiments" / "profiles").glob("*.yaml"))
RECIPE = Recipe({"w0-1": 0.1, "w2-3": 0.2, "w4-5": 0.9, "w6-7": 1.0})


NAMES = [name for name in SOURCES if "<" not in name] + ["fixed-30", "replayed-2", "mixed-0.5"]


def walkers(generator, *sets, seed=0):
    return fresh_walkers(generator, sets, seed).scaled(100)


@pytest.fixture(scope="module")
def materials():
    shipped = load_generator("fashion-stylegan2")
    return Materials(load_digits().train, shipped, RECIPE, walkers=walkers(shipped, "w0-1", "w4-5+w6-7"),
                     walker_all=walkers(shipped, all_groups(shipped.layout)))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_that_ship(path):
    profile = load_profile(path)
    assert profile.name == path.stem
    names = [run.name for run in profile.encoders + profile.continuous]
    assert [Run.parse(name).name for name in names] == names
    assert len(set(profile.seeds)) == len(profile.seeds) >= 2
    assert profile.dataset in DATASETS and set(profile.images) <= {"folder", "size", "channels"}
    assert build_encoder(channels=1, **profile.encoder).num_features > 0
    for run in profile.encoders:
        assert run.objective in OBJECTIVES and run.t_x in AUGMENTATIONS and source_kind(run.source)
        assert TrainConfig(**profile.train_for(run)).steps == profile.train["steps"]
    assert {*profile.train_of, *profile.rates, *profile.options} <= {run.objective for run in profile.encoders}
    assert all(OBJECTIVES[name](8, **options) for name, options in profile.options.items())
    assert all(len(rates) > 1 and min(rates) > 0 for rates in profile.rates.values())


@pytest.mark.parametrize("objective, preset", [("simclr", "simclr"), ("simsiam", "simsiam-stylegan2"), ("byol", "byol")])
def test_the_paper_profile_trains_as_the_papers_presets_for_a_stylegan2_do(objective, preset):
    profile = next(load_profile(path) for path in PROFILES if path.stem == "paper")
    steps, settings = profile.train["steps"], PAPER[preset]
    run = next(run for run in profile.encoders if run.objective == objective)
    ours, theirs = TrainConfig(**profile.train_for(run)), settings.config(steps, profile.batch_size)
    assert (ours.lr, ours.weight_decay) == pytest.approx((theirs.lr, theirs.weight_decay), rel=1e-5)
    assert replace(ours, lr=theirs.lr, weight_decay=theirs.weight_decay) == theirs
    assert profile.options.get(objective, {}) == settings.options and profile.encoder == {"encoder": settings.encoder}


def test_quick_and_full_have_three_seeds():
    assert all(len(load_profile(path).seeds) >= 3 for path in PROFILES if path.stem != "smoke")


@pytest.mark.parametrize("change, words", [({"bugdet": 1}, "unknown keys bugdet"), ({"seeds": None}, "seeds")])
def test_wrong_profiles_name_the_key(tmp_path, change, words):
    content = yaml.safe_load(PROFILES[0].read_text()) | change
    content = {key: value for key, value in content.items() if value is not None}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=words):
        load_profile(tmp_path / "p.yaml")


@pytest.mark.parametrize("text, words", [("", "holds NoneType, expected keys"), ("words", "holds str"), ("a: [1", "is no YAML")])
def test_what_is_no_profile_is_refused_by_its_file(tmp_path, text, words):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"p.yaml {words}"):
        load_profile(tmp_path / "p.yaml")


@pytest.mark.parametrize("name", ["real", "guided_simclr_no_color_0", "a__b__c__d"])
def test_run_names_are_checked(name):
    with pytest.raises(ValueError, match="source__objective"):
        Run.parse(name)


@pytest.mark.parametrize("t_x", AUGMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_source_takes_every_augmentation_and_repeats_itself(materials, name, t_x):
    plan = dict(t_x=t_x, batch_size=4, steps_per_epoch=2, seed=3)
    one = make_source(name, materials, **plan)
    assert one.batch(1).shape == (4, 2, 1, 32, 32) and not torch.equal(one.batch(0), one.batch(1))
    if t_x == "simclr":
        assert torch.equal(one.batch(1), make_source(name, materials, **plan).batch(1))


def test_the_names_cover_all_sources():
    assert {source_kind(name)[0] for name in NAMES} == set(SOURCES.values())


WRONG = ["fake", "", "-", "fixed", "fixed-", "fixed-2.5", "fixed-<size>", "mixed-half", "guided-3", "replayed-x"]


@pytest.mark.parametrize("name", WRONG)
def test_unknown_sources(materials, name):
    with pytest.raises(KeyError, match=f"name='{name}' is unknown; choose one of real"):
        make_source(name, materials, "none")


def test_unknown_augmentations(materials):
    with pytest.raises(KeyError, match="t_x='blur' is unknown; choose one of none"):
        make_source("real", materials, "blur")


@pytest.mark.parametrize("name", NAMES)
def test_a_source_says_which_material_it_lacks(materials, name):
    bare, files = Materials(materials.images, materials.generator), material_files(name)
    plan = dict(t_x="none", batch_size=4, steps_per_epoch=2)
    assert set(files.values()) <= {file for file, _, _ in MATERIAL_FILES.values()}
    if files:
        with pytest.raises(ValueError, match=f"{[*files][0]}=None, but this source needs it; (pass|teach)"):
            make_source(name, bare, **plan)
    else:
        make_source(name, bare, **plan).batch(0)


def test_materials_come_from_files(materials, tmp_path):
    RECIPE.to_yaml(tmp_path / "recipe.yaml")
    save_walkers(tmp_path / "walkers.safetensors", materials.walkers)
    read = Materials(materials.images, materials.generator, tmp_path / "recipe.yaml", walkers=str(tmp_path / "walkers.safetensors"))
    plan = dict(t_x="none", batch_size=4, steps_per_epoch=2)
    for name in ("guided", "group-walker"):
        assert torch.equal(make_source(name, read, **plan).batch(0), make_source(name, materials, **plan).batch(0))
        assert fingerprint(name, read) == fingerprint(name, materials)


@pytest.mark.parametrize("material", MATERIAL_FILES)
def test_a_missing_file_is_named(materials, material):
    with pytest.raises(ValueError, match=f"{material}='nowhere.bin' is no file; (pass|teach)"):
        Materials(materials.images, materials.generator, **{material: "nowhere.bin"})


def drawn(materials, name):
    "What moves in a draw, by group, and how many tensors the positive has."
    perturb = make_source(name, materials, "none", batch_size=4, steps_per_epoch=1).perturb
    anchor = materials.generator.sample(4, rng_for(0, "anchor"))
    positive = perturb(anchor, lambda group: rng_for(0, group))
    layout = materials.generator.layout
    changed = {group.name for group in layout.groups if positive[group.start] is not anchor[group.start]}
    return changed, len({id(z) for z in positive})


def test_a_strength_becomes_a_material(tmp_path):
    RECIPE.to_yaml(tmp_path / recipe_file("fashion-stylegan2", 3.0))
    assert recipe_file("fashion-stylegan2", 3.0) == "recipe-fashion-stylegan2-3.yaml"
    of = lambda source, strength: at_strength(source, strength, "fashion-stylegan2", tmp_path)
    assert Recipe.from_yaml(of("guided", 3.0)["recipe"]).strengths == RECIPE.strengths
    assert of("uniform", 0.5) == {"uniform_sigma": 0.5} and of("real", None) == of("guided", None) == {}
    for source in ("real", "walker-all"):
        with pytest.raises(ValueError, match="no strength.*guided, uniform"):
            of(source, 1.0)


def test_sources_move_the_groups_they_say(materials):
    every = set(materials.generator.layout.group_names)
    assert drawn(materials, "synthetic") == (set(), 1)
    assert drawn(materials, "uniform") == drawn(materials, "walker-all") == (every, 1)
    assert drawn(materials, "group-gaussian") == (every, 4)
    assert drawn(materials, "group-walker") == ({"w0-1", "w4-5", "w6-7"}, 3)  # one stays, two are moved as one
    assert drawn(materials, "guided") == (every, 4)


def test_the_papers_strengths_and_own_ones():
    four, six, five = (LinearGaussian.random([1.0] * n).layout for n in (4, 6, 5))
    assert moves(group_gaussian(four)) == {"z0": (1, 0.22), "z1": (1, 0.11), "z2": (1, 0.88), "z3": (1, 0.88)}
    assert moves(group_gaussian(six)) == {f"z{k}": (1, 1.0) for k in range(1, 6)}
    assert moves(group_gaussian(five, {"z4": 0.5, "z0": 0})) == {"z4": (1, 0.5)}
    with pytest.raises(ValueError, match="strengths for 4 or 6 groups and this layout has 5; give a sigma for each of z0, z1"):
        group_gaussian(five)


def test_only_sources_that_show_real_images_need_them(materials):
    without = Materials(None, materials.generator, RECIPE)
    assert drawn(without, "guided") == drawn(materials, "guided")
    for name in ("real", "mixed-0.5"):
        with pytest.raises(ValueError, match="images=None, but this source needs it; pass images"):
            make_source(name, without, "none", batch_size=8, steps_per_epoch=1)


def test_half_of_a_mixed_batch_is_real(materials):
    batch = make_source("mixed-0.5", materials, "none", batch_size=8, steps_per_epoch=1).batch(0)
    equal = [torch.equal(*pair) for pair in batch]
    assert equal == [True] * 4 + [False] * 4


CHANGES = {
    "images": lambda m: m.images.subset(slice(50)), "recipe": lambda m: m.recipe.scaled(0.5), "uniform_sigma": lambda m: 0.3,
    "group_sigmas": lambda m: {"w0-1": 0.1}, "walkers": lambda m: walkers(m.generator, "w0-1", "w4-5+w6-7", seed=1),
    "walker_all": lambda m: Perturb(m.generator.layout, {"w6-7": Additive(0.2)}),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_fingerprint_changes_with_what_a_source_reads_and_nothing_else(materials, name):
    before = fingerprint(name, materials)
    for material, change in CHANGES.items():
        given = {"recipe": RECIPE, "walkers": materials.walkers, "walker_all": materials.walker_all} | {material: change(materials)}
        after = fingerprint(name, Materials(**({"images": materials.images, "generator": materials.generator} | given)))
        assert (after != before) == (material in source_kind(name)[0].needs), material


def test_fixed_sets_repeat_and_continuous_ones_do_not(materials):
    plan = dict(t_x="none", batch_size=10, steps_per_epoch=6)
    distinct = lambda name: len({image.numpy().tobytes() for step in range(6)
                                 for image in make_source(name, materials, **plan).batch(step)[:, 0]})
    assert distinct("fixed-20") == 20 and distinct("guided") == 60


def test_replayed_anchors_come_back(materials):
    source = make_source("replayed-2", materials, "none", batch_size=4, steps_per_epoch=4)
    first, second = source.batch(1), source.batch(2)
    assert torch.equal(first[2:, 0], second[:2, 0]) and not torch.equal(first[2:, 1], second[:2, 1])


def rows(source, t_x, accuracies, split="test", objective="simclr"):
    return [dict(source=source, objective=objective, t_x=t_x, seed=seed, probe="linear", dataset="d", split=split, accuracy=value)
            for seed, value in enumerate(accuracies)]


def test_the_table_compares_like_with_like():
    frame = pd.DataFrame([
        *rows("real", "none", [0.5, 0.6, 0.7]), *rows("real", "none", [0.5, 0.5, 0.5], "val"),
        *rows("real", "simclr", [0.5, 0.5, 0.5]), *rows("real", "simclr", [0.9, 0.9, 0.9], "val"),
        *rows("uniform", "no_crop", [0.2, 0.2, 0.2]), *rows("uniform", "no_crop", [0.9, 0.9, 0.9], "val"),
        *rows("uniform", "simclr", [0.9, 0.9, 0.9]), *rows("uniform", "simclr", [0.2, 0.2, 0.2], "val"),
        *rows("guided", "none", [0.6, 0.7, 0.9]), *rows("guided", "none", [0.1, 0.1, 0.1], "val"),
        *rows("guided", "none", [0.3, 0.3, 0.3], objective="byol"),
    ])
    table = sources_table(frame).set_index(["objective", "t_x", "source"])
    guided = table.loc["simclr", "none", "guided"]
    assert guided.accuracy == pytest.approx(2.2 / 3) and guided.seeds == 3
    half = 4.302653 * 0.057735 / 3**0.5  # Student's t for two degrees of freedom, standard deviation of 0.1, 0.1, 0.2
    assert guided.minus_real == pytest.approx(0.4 / 3)
    assert (guided.minus_real_low, guided.minus_real_high) == pytest.approx((0.4 / 3 - half, 0.4 / 3 + half), abs=1e-5)
    assert guided.minus_best_real == pytest.approx(0.7 / 3)  # real with simclr: best on validation, not on test
    assert guided.minus_best_uniform == pytest.approx(1.6 / 3) and np.isnan(guided.minus_uniform)
    assert table.loc["simclr", "none", "real"].isna()[["minus_real", "minus_uniform"]].all()
    assert np.isnan(table.loc["simclr", "simclr", "real"].minus_best_real)
    alone = table.loc["byol", "none", "guided"]
    assert alone[["minus_real", "minus_uniform", "minus_best_real", "minus_best_uniform"]].isna().all()


def test_other_seeds_are_not_compared():
    frame = pd.DataFrame([*rows("real", "none", [0.5, 0.6]), *rows("uniform", "none", [0.5, 0.6, 0.7])])
    with pytest.raises(ValueError, match="pairs need the same ones"):
        sources_table(frame)


def test_what_is_decoded_once_is_part_of_the_key(materials, tmp_path, monkeypatch):
    "Only where it changes the batches: not for real images, nor for training that is no longer than what was decoded."
    monkeypatch.setattr("mlvgm_mi.studies.cell", lambda path, determines, *rest: determines)
    study = Study(tmp_path, "digits", load_digits(), {"width": 4}, batch_size=4)
    once, train = replace(study, decoded=2), dict(steps=5, warmup=1)
    real, guided = (Run(source, "simclr", "none", 0) for source in ("real", "guided"))
    assert len(once.views(guided, materials, 5)) == 2 and len(once.views(real, materials, 5)) == 5
    keys = [one.encoder_cell(guided, materials, train) for one in (study, once, replace(once, decoded=5))]
    assert keys[0] == keys[2] and keys[1] == keys[0] | {"decoded": 2}
    assert once.encoder_cell(real, materials, train) == study.encoder_cell(real, materials, train)


def test_a_cell_of_other_materials_is_not_what_was_trained_before(tmp_path):
    "The work of the first one lies in the same build folder."
    digits, run, train = load_digits(), Run("real", "simclr", "no_color", 0), dict(steps=3, warmup=1)
    dark = replace(digits.train, images=torch.zeros_like(digits.train.images))
    one, other = (Materials(images, LinearGaussian.random([1.0, 1.0])) for images in (digits.train, dark))
    study, alone = (Study(tmp_path / name, "digits", digits, {"width": 4}, batch_size=8) for name in ("build", "alone"))
    before = study.encoder_cell(run, one, train)
    after = study.encoder_cell(run, other, train)
    pd.testing.assert_frame_equal(after, alone.encoder_cell(run, other, train))
    assert not after.accuracy.equals(before.accuracy)
    assert len(list(study.work(run.name).glob("*/history.csv"))) == 2


def test_the_options_of_an_objective_reach_it_and_its_key(materials, tmp_path, monkeypatch):
    made, digits = [], load_digits()
    monkeypatch.setitem(OBJECTIVES, "simclr", lambda *args, **options: made.append(options) or SimCLR(*args, **options))
    study = Study(tmp_path, "digits", digits, {"width": 4}, batch_size=8, options={"simclr": {"temperature": 0.5}})
    run, train = Run("real", "simclr", "no_color", 0), dict(steps=2, warmup=1)
    hotter = study.encoder_cell(run, materials, train)
    usual = replace(study, options={}).encoder_cell(run, materials, train)
    assert [options.get("temperature") for options in made] == [0.5, None] and not hotter.equals(usual)


def test_a_set_of_ones_own_is_part_of_the_key(materials, tmp_path, monkeypatch):
    "Its name does not tell which folder it was read from, nor at which size."
    monkeypatch.setattr("mlvgm_mi.studies.cell", lambda path, determines, *rest: determines)
    sets, run, train = [load_digits(seed=seed) for seed in (0, 0, 1)], Run("guided", "simclr", "none", 0), dict(steps=5, warmup=1)
    keys = lambda **how: [Study(tmp_path, "digits", one, {}, 4, **how).encoder_cell(run, materials, train) for one in sets]
    own, usual = keys(images={"size": 32}), keys()
    assert own[0] == own[1] != own[2] and usual[0] == usual[2] == {key: own[0][key] for key in own[0] if key != "splits"}


def test_other_probes_do_not_train_again(tmp_path, monkeypatch):
    "They make another cell, from the training that is there."
    digits, run = load_digits(), Run("real", "simclr", "no_color", 0)
    needs = Materials(digits.train, LinearGaussian.random([1.0, 1.0]))
    made, draw = [], RealViews.batch
    monkeypatch.setattr(RealViews, "batch", lambda self, step, epoch=0: made.append(step) or draw(self, step, epoch))
    study = Study(tmp_path, "digits", digits, {"width": 4}, batch_size=8)
    before = study.encoder_cell(run, needs, dict(steps=3, warmup=1))
    more = replace(study, shares={"linear_50pct": 0.5}).encoder_cell(run, needs, dict(steps=3, warmup=1))
    assert made == [0, 1, 2] and set(more.probe) == {"linear", "knn", "linear_50pct"}
    pd.testing.assert_frame_equal(more[more.probe != "linear_50pct"], before)


def test_what_cannot_be_judged_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("mlvgm_mi.studies.fit", lambda *args, **options: pytest.fail("trained all the same"))
    digits = load_digits()
    needs = Materials(digits.train, LinearGaussian.random([1.0, 1.0]))
    study = Study(tmp_path, "digits", digits, {"width": 4}, batch_size=8, shares={"linear_1pct": 0.001})
    with pytest.raises(ValueError, match="share=0.001"):
        study.encoder_cell(Run("real", "simclr", "no_color", 0), needs, dict(steps=3, warmup=1))


def trial(lr, val, test):
    "A frame as `at_rates` makes it."
    accuracies = {("linear", "val"): val, ("linear", "test"): test, ("knn", "val"): 1 - val}
    return pd.DataFrame([dict(probe=probe, split=split, accuracy=a, lr=lr) for (probe, split), a in accuracies.items()])


def test_the_try_that_is_kept_does_best_on_validation_images_by_the_linear_probe():
    tries = [trial(0.1, 0.5, 0.9), trial(0.2, 0.7, 0.1), trial(0.4, 0.7, 0.8)]
    assert best_on_validation(tries) is tries[1] and best_on_validation(tries[::-1]) is tries[2]


def test_a_run_is_tried_at_every_rate_under_a_name_of_its_own(materials, tmp_path, monkeypatch):
    found = {}

    def remember(path, determines, compute, also_in):
        found[path.name] = determines["train"]["lr"], also_in
        return trial(0, 0.5, 0.5)

    monkeypatch.setattr("mlvgm_mi.studies.cell", remember)
    study, run = Study(tmp_path, "digits", load_digits(), {"width": 4}, batch_size=4), Run("real", "simsiam", "none", 0)
    tries = at_rates(study, run, materials, dict(steps=5, warmup=1, lr=0.3), [0.4, 3.2], also_in=["there"])
    assert found == {f"{run.name}__0.4.csv": (0.4, ["there"]), f"{run.name}__3.2.csv": (3.2, ["there"])}
    assert [one.lr.unique().item() for one in tries] == [0.4, 3.2]
    found.clear()
    assert [one.lr.unique().item() for one in at_rates(study, run, materials, dict(steps=5, warmup=1, lr=0.3))] == [0.3]
    assert found == {f"{run.name}.csv": (0.3, ())}
    found.clear()
    at_rates(study, run, materials, dict(steps=5, warmup=1), [1.0], stem="longer")
    assert found == {"longer__1.csv": (1.0, ())}


def test_replays_are_compared_with_fixed_sets():
    profile = load_profile(next(path for path in PROFILES if path.stem == "smoke"))
    runs = replace(profile, fixed_sizes=[10, 20], replays=[4], seeds=[0, 1]).continuous
    assert [run.source for run in runs] == ["fixed-10"] * 2 + ["fixed-20"] * 2 + ["replayed-4"] * 2 + ["guided"] * 2


def test_publishing_copies_tables_figures_notebooks(tmp_path):
    for name in ("results/t.csv", "figures/f.csv", "notebooks/n.csv", "cells/c.csv", "work/w.csv"):
        write_frame(pd.DataFrame({"a": [1]}), tmp_path / "build" / name)
    found = {path.relative_to(tmp_path).as_posix() for path in publish(tmp_path / "build", tmp_path, "p")}
    assert found == {"results/p/t.csv", "figures/p/f.csv", "results/p/notebooks/n.csv"}
    found = {path.relative_to(tmp_path).as_posix() for path in publish(tmp_path / "build", tmp_path, "p", keep_cells=True)}
    assert "results/p/cells/c.csv" in found
