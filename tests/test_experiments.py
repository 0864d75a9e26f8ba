"Profiles, sources by name, cells and publishing."
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from mlvgm_mi.data import load_digits
from mlvgm_mi.experiments import SOURCES, Materials, Run, cell, load_profile, make_source, publish, weights_digest, write_frame
from mlvgm_mi.generators.core import load_generator
from mlvgm_mi.perturb import Recipe

PROFILES = sorted((Path(__file__).parents[1] / "nbs" / "experiments" / "profiles").glob("*.yaml"))
RECIPE = Recipe({"w0-1": 0.1, "w2-3": 0.2, "w4-5": 0.9, "w6-7": 1.0})


@pytest.fixture(scope="module")
def materials():
    return Materials(load_digits().train, load_generator("fashion-stylegan2"), RECIPE)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_that_ship(path):
    profile = load_profile(path)
    assert profile.name == path.stem
    names = [run.name for run in profile.encoders + profile.fixed + profile.continuous]
    assert [Run.parse(name).name for name in names] == names
    assert len(set(profile.seeds)) == len(profile.seeds) >= 2


def test_quick_and_full_have_three_seeds():
    assert all(len(load_profile(path).seeds) >= 3 for path in PROFILES if path.stem != "smoke")


@pytest.mark.parametrize("change, words", [({"bugdet": 1}, "unknown keys bugdet"), ({"seeds": None}, "seeds")])
def test_wrong_profiles_name_the_key(tmp_path, change, words):
    content = yaml.safe_load(PROFILES[0].read_text()) | change
    content = {key: value for key, value in content.items() if value is not None}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=words):
        load_profile(tmp_path / "p.yaml")


@pytest.mark.parametrize("name", ["real", "guided_simclr_no_color_0", "a__b__c__d"])
def test_run_names_are_checked(name):
    with pytest.raises(ValueError, match="source__objective"):
        Run.parse(name)


@pytest.mark.parametrize("name", [*SOURCES, "fixed-30"])
def test_every_source_gives_repeatable_batches(materials, name):
    plan = dict(t_x="no_color", batch_size=4, steps_per_epoch=2, seed=3)
    one, two = make_source(name, materials, **plan), make_source(name, materials, **plan)
    assert one.batch(1).shape == (4, 2, 1, 32, 32)
    assert torch.equal(one.batch(1), two.batch(1)) and not torch.equal(one.batch(0), one.batch(1))


def test_unknown_sources_and_augmentations(materials):
    with pytest.raises(KeyError, match="name='fake' is unknown; choose one of real"):
        make_source("fake", materials, "none")
    with pytest.raises(KeyError, match="t_x='blur' is unknown; choose one of none"):
        make_source("real", materials, "blur")
    with pytest.raises(ValueError, match="recipe=None"):
        make_source("guided", Materials(materials.images, materials.generator), "none", steps_per_epoch=1)


def test_fixed_sets_repeat_and_continuous_ones_do_not(materials):
    plan = dict(t_x="none", batch_size=10, steps_per_epoch=6)
    distinct = lambda name: len({image.numpy().tobytes() for step in range(6)
                                 for image in make_source(name, materials, **plan).batch(step)[:, 0]})
    assert distinct("fixed-20") == 20 and distinct("guided") == 60


def test_cells_are_keyed_by_what_determines_them(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return pd.DataFrame({"value": [0.1 + 0.2], "n": [1]})

    first = cell(tmp_path / "c.csv", {"a": 1}, compute)
    content = (tmp_path / "c.csv").read_bytes()
    pd.testing.assert_frame_equal(cell(tmp_path / "c.csv", {"a": 1}, compute), first)
    assert len(calls) == 1 and (tmp_path / "c.csv").read_bytes() == content
    cell(tmp_path / "new" / "c.csv", {"a": 1}, compute, also_in=[tmp_path])
    assert len(calls) == 1 and (tmp_path / "new" / "c.csv").read_bytes() == content
    cell(tmp_path / "c.csv", {"a": 2}, compute)
    assert len(calls) == 2


def test_a_failing_cell_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cell(tmp_path / "c.csv", {}, fail)
    assert not list(tmp_path.iterdir())


def test_publishing_copies_tables_figures_notebooks(tmp_path):
    for name in ("results/t.csv", "figures/f.csv", "notebooks/n.csv", "cells/c.csv", "work/w.csv"):
        write_frame(pd.DataFrame({"a": [1]}), tmp_path / "build" / name)
    found = {path.relative_to(tmp_path).as_posix() for path in publish(tmp_path / "build", tmp_path, "p")}
    assert found == {"results/p/t.csv", "figures/p/f.csv", "results/p/notebooks/n.csv"}
    found = {path.relative_to(tmp_path).as_posix() for path in publish(tmp_path / "build", tmp_path, "p", keep_cells=True)}
    assert "results/p/cells/c.csv" in found


def test_digests_follow_the_weights():
    one, two = load_generator("fashion-stylegan2"), load_generator("fashion-stylegan2")
    assert weights_digest(one) == weights_digest(two)
    two.mapping.fc0.bias[0] += 1e-3
    assert weights_digest(one) != weights_digest(two)
