"Perturbations move what they should and nothing else; recipes survive a file; guided strengths obey the closed form."
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlvgm_mi import perturb as module
from mlvgm_mi.generators.core import LinearGaussian, linear_pair_mi
from mlvgm_mi.latents import Block, Layout, rng_for
from mlvgm_mi.perturb import (
    Additive, EqualLoss, Keep, Perturb, Recipe, Resample, SpareTop, VariancePreserving, WaterFilling, displacement, mi_guided,
    moves, single, spare_top, uniform,
)

SLOTS = Layout.of([Block(f"w{i}", (8,)) for i in range(6)], {"a": (0, 2), "b": (2, 4), "c": (4, 6)})
CHUNKS = Layout.of([Block(name, (5,)) for name in "xyz"])


def streams(seed=0):
    return lambda group: rng_for(seed, f"step/{group}")


def correlation(a, b):
    return np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]


# steps

@pytest.mark.parametrize("step, scale, spread", [
    (Keep(), 1, 0), (VariancePreserving(0), 1, 0), (VariancePreserving(0.6), 0.8, 0.6), (VariancePreserving(1), 0, 1),
    (Resample(), 0, 1), (Additive(0), 1, 0), (Additive(0.25), 1, 0.25), (Additive(2), 1, 2),
])
def test_a_step_is_what_scale_and_spread_say(step, scale, spread):
    z = torch.randn(200_000, generator=rng_for(0, "z"))
    moved = step(z, rng_for(0, "step"))
    assert (step.scale, step.spread) == pytest.approx((scale, spread))
    assert (moved * z).mean() == pytest.approx(scale, abs=0.015)
    assert (moved - scale * z).std() == pytest.approx(spread, abs=0.01)
    assert (moved is z) == (spread == 0)


def test_resampling_is_the_variance_preserving_step_at_full_strength():
    z = torch.randn(4, 8)
    assert torch.equal(Resample()(z, rng_for(0, "e")), VariancePreserving(1)(z, rng_for(0, "e")))


@pytest.mark.parametrize("clip", [0.9, 2.0])
def test_cut_noise_stays_within_its_cut(clip):
    z = torch.randn(50_000, generator=rng_for(0, "z"))
    moved = Additive(0.25, clip)(z, rng_for(0, "e")) - z
    assert 0.24 * clip < moved.abs().max() <= 0.25 * clip + 1e-6


def test_double_precision_moves_alike():
    z = torch.randn(5, 8)
    single_, double = (VariancePreserving(0.5)(t, rng_for(0, "e")) for t in (z, z.double()))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single_.double(), double, atol=1e-6, rtol=0)


@pytest.mark.parametrize("build, named", [
    (lambda: VariancePreserving(-0.1), "strength=-0.1"), (lambda: VariancePreserving(1.01), "strength=1.01"),
    (lambda: VariancePreserving(math.nan), "strength=nan"), (lambda: Additive(-1), "sigma=-1"),
    (lambda: Additive(math.inf), "sigma=inf"),
])
def test_bad_strengths_are_refused(build, named):
    with pytest.raises(ValueError, match=named):
        build()


# perturbations

def test_groups_move_independently():
    "One seed for all groups, as in the paper's release, would give a correlation of 1."
    z = torch.zeros(500, 8)
    moved = uniform(SLOTS, Additive(1))((z,) * 6, streams())
    assert moved[0] is moved[5]
    moved = Perturb(SLOTS, {name: Additive(1) for name in "abc"})((z,) * 6, streams())
    for first, second in itertools.combinations(moved[::2], 2):
        assert abs(correlation(first, second)) < 0.05


def test_a_shared_tensor_moves_once_per_group():
    z, calls = torch.randn(3, 8), []

    def step(tensor, rng):
        calls.append(tensor)
        return tensor + 1

    moved = Perturb(SLOTS, {"a": step, "c": step})((z,) * 6, streams())
    assert len(calls) == 2 and moved[0] is moved[1] and moved[4] is moved[5] and moved[0] is not moved[4]
    assert moved[2] is z and moved[3] is z


def test_distinct_tensors_of_a_group_get_distinct_noise():
    zeros = tuple(torch.zeros(400, 5) for _ in range(3))
    moved = uniform(CHUNKS, Additive(1))(zeros, streams())
    for first, second in itertools.combinations(moved, 2):
        assert abs(correlation(first, second)) < 0.07


def test_equal_streams_give_equal_positives_and_order_of_groups_does_not_matter():
    z = tuple(torch.randn(3, 5) for _ in range(3))
    steps = {"x": VariancePreserving(0.5), "z": Resample()}
    first, second = Perturb(CHUNKS, steps), Perturb(CHUNKS, dict(reversed(steps.items())))
    for a, b in zip(first(z, streams()), second(z, streams())):
        assert torch.equal(a, b)
    assert not torch.equal(first(z, streams())[0], first(z, streams(1))[0])


def test_the_anchor_is_left_as_it_was():
    z = tuple(torch.randn(3, 5) for _ in range(3))
    before = [t.clone() for t in z]
    uniform(CHUNKS, VariancePreserving(0.7))(z, streams())
    assert all(torch.equal(a, b) for a, b in zip(before, z))


def test_wrong_groups_and_draws_are_named():
    with pytest.raises(KeyError, match="name='d' .* a, b, c"):
        Perturb(SLOTS, {"d": Keep()})
    with pytest.raises(KeyError, match="'w'"):
        single(CHUNKS, "w", Keep())
    with pytest.raises(ValueError, match="latents has 2 blocks, the layout 3"):
        Perturb(CHUNKS, {})((torch.zeros(1, 5),) * 2, streams())


def test_moves_are_the_covariances_of_pairs():
    perturb = Perturb(CHUNKS, {"x": VariancePreserving(0.6), "y": Additive(0.5)})
    z = tuple(torch.randn(40_000, 5, generator=rng_for(0, name)) for name in "xyz")
    pairs = moves(perturb)
    assert set(pairs) == {"x", "y"}
    for name, before, after in zip("xyz", z, perturb(z, streams())):
        a, b = pairs.get(name, (1, 0))
        assert (before * after).mean() == pytest.approx(a, abs=0.015)
        assert after.var() == pytest.approx(a * a + b * b, abs=0.02)


def test_moves_name_the_groups_of_another_layout():
    assert moves(uniform(CHUNKS, VariancePreserving(0.6)), CHUNKS) == dict.fromkeys("xyz", (0.8, 0.6))
    coarse = CHUNKS.regroup({"xy": (0, 2), "z": (2, 3)})
    with pytest.raises(ValueError, match="'xy'"):
        moves(single(CHUNKS, "x", Resample()), coarse)


@pytest.mark.parametrize("step", [Additive(0.2, clip=2), lambda z, rng: z + 1])
def test_moves_refuse_what_has_no_closed_form(step):
    with pytest.raises(ValueError, match="'x' has no closed form"):
        moves(single(CHUNKS, "x", step))


# recipes

RECIPE = Recipe({"x": 0.1, "y": 0.123456789012345, "z": 1}, "equal loss per group", "toy", 2.5, 2.48, 0.01, 0.1)


def test_a_recipe_survives_its_file(tmp_path):
    RECIPE.to_yaml(tmp_path / "new" / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "new" / "recipe.yaml") == RECIPE
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["recipe.yaml"]


def test_a_failed_write_leaves_the_old_recipe(tmp_path, monkeypatch):
    RECIPE.to_yaml(tmp_path / "recipe.yaml")
    monkeypatch.setattr(module.yaml, "safe_dump", lambda *args, **kw: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Recipe({"x": 1}).to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == RECIPE
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text, problem", [
    ("strengths: {x: 1.2}", r"strengths\.x=1\.2 is out of range; give a finite number in \[0, 1\]"),
    ("strengths: {x: -0.1}", r"strengths\.x=-0\.1"),
    ("strengths: {x: .nan}", r"strengths\.x=nan"),
    ("strengths: {x: true}", r"strengths\.x=True is no number"),
    ("strengths: {x: strong}", r"strengths\.x='strong' is no number"),
    ("strengths: {}", "strengths={} must map"),
    ("strengths: [0.1]", r"strengths=\[0\.1\] must map"),
    ("strengths: {x: 0}\nbudget: -2", "budget=-2 is out of range"),
    ("strengths: {x: 0}\nse: -2", "se=-2"),
    ("strengths: {x: 0}\nsigma_x: a", "sigma_x='a' is no number"),
    ("strengths: {x: 0}\nrule: 7", "rule=7 is no text"),
    ("strengths: {x: 0}\ngenerator: [a]", "generator="),
    ("strengths: {x: 0}\nstrength: 1", "unknown key 'strength' = 1; choose from strengths, rule"),
    ("budget: 1", "no key 'strengths'"),
    ("", "no key 'strengths'"),
    ("- x", "no key 'strengths'"),
    ("strengths: {x: 0", "not a YAML file"),
])
def test_a_bad_recipe_file_names_file_key_and_value(tmp_path, text, problem):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.yaml: .*{problem}"):
        Recipe.from_yaml(path)


def test_a_recipe_does_not_run_code(tmp_path):
    path, flag = tmp_path / "bad.yaml", tmp_path / "flag"
    path.write_text(f"strengths: !!python/object/apply:os.mkdir ['{flag}']")
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        Recipe.from_yaml(path)
    assert not flag.exists()


def test_a_recipe_becomes_a_perturbation():
    perturb = Recipe({"x": 0, "y": 0.5}).perturb(CHUNKS)
    assert perturb.steps == {"x": Keep(), "y": VariancePreserving(0.5)}
    with pytest.raises(KeyError, match="'nose'"):
        Recipe({"nose": 0.5}).perturb(CHUNKS)


def test_scaling_caps_at_one_and_forgets_the_measurement():
    scaled = RECIPE.scaled(2)
    assert scaled.strengths == pytest.approx({"x": 0.2, "y": 0.24691357802469, "z": 1})
    assert (scaled.budget, scaled.generator, scaled.mi_nats, scaled.se) == (2.5, "toy", None, None)
    assert set(RECIPE.scaled(0).strengths.values()) == {0}
    with pytest.raises(ValueError, match="factor=-1"):
        RECIPE.scaled(-1)


# strengths from curves

STRENGTHS = np.linspace(0, 1, 41).round(6).tolist()


def exact_curves(line, strengths=STRENGTHS, sigma_x=0.5):
    return {name: {s: linear_pair_mi(line, moves(single(line.layout, name, VariancePreserving(s))), sigma_x)
                   for s in strengths} for name in line.layout.group_names}


def kept(line, recipe, sigma_x=0.5):
    return linear_pair_mi(line, moves(recipe.perturb(line.layout)), sigma_x)


@pytest.fixture(params=[0, 1, 2])
def line(request):
    return LinearGaussian.random([1.5, 1.0, 0.5, 0.25], pixels=16, width=4, seed=request.param)


@pytest.mark.parametrize("rule", [mi_guided, spare_top])
def test_more_budget_never_moves_anything_further(rule, line):
    curves = exact_curves(line)
    budgets = np.linspace(0, curves["z0"][0], 23)
    strengths = np.array([list(rule(curves, min(b, curves["z0"][0])).strengths.values()) for b in budgets])
    assert (np.diff(strengths, axis=0) <= 1e-9).all() and (strengths >= 0).all() and (strengths <= 1).all()


def test_a_louder_group_moves_less(line):
    curves = exact_curves(line)
    for share in (0.2, 0.5, 0.8):
        strengths = list(mi_guided(curves, share * curves["z0"][0]).strengths.values())
        assert strengths == sorted(strengths) and strengths[0] < strengths[2]


def test_the_ends_of_the_budget_are_exact(line):
    curves = exact_curves(line)
    whole = curves["z0"][0]
    assert set(mi_guided(curves, whole).strengths.values()) == {0.0}
    assert set(mi_guided(curves, 0).strengths.values()) == {1.0}
    assert kept(line, mi_guided(curves, 0)) == pytest.approx(0, abs=1e-9)


def test_every_group_loses_the_same_unless_it_is_resampled(line):
    curves = exact_curves(line)
    recipe = mi_guided(curves, curves["z0"][0] / 2)
    lost = {name: curves[name][0] - linear_pair_mi(line, {name: pair}, 0.5)
            for name, pair in moves(recipe.perturb(line.layout)).items()}
    moved = [lost[name] for name, s in recipe.strengths.items() if s < 1]
    assert max(moved) - min(moved) < 0.01
    assert all(lost[name] <= max(moved) for name, s in recipe.strengths.items() if s == 1)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_where_losses_add_up_the_budget_is_met(share):
    "Blocks that light different pixels: their informations add, and the rule has no excuse."
    mixing = [torch.zeros(12, 4) for _ in range(3)]
    for k, gain in enumerate((2.0, 1.0, 0.4)):
        mixing[k][4 * k: 4 * k + 4] = gain * torch.eye(4)
    line = LinearGaussian(mixing)
    curves = exact_curves(line)
    budget = share * curves["z0"][0]
    assert kept(line, mi_guided(curves, budget)) == pytest.approx(budget, abs=0.02)


def test_the_guess_is_in_the_right_direction_elsewhere(line):
    curves = exact_curves(line)
    nats = [kept(line, mi_guided(curves, share * curves["z0"][0])) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert nats == sorted(nats)


def test_six_points_do_nearly_as_well_as_forty_one(line):
    few, many = exact_curves(line, [0, 0.2, 0.4, 0.6, 0.8, 1]), exact_curves(line)
    budget = many["z0"][0] / 2
    a, b = (kept(line, mi_guided(curves, budget)) for curves in (few, many))
    assert a == pytest.approx(b, abs=0.3)


def test_wiggles_of_an_estimate_do_not_turn_the_rule_around(line):
    rng = np.random.default_rng(0)
    noisy = {name: {s: v + rng.normal(0, 0.05) for s, v in curve.items()} for name, curve in exact_curves(line).items()}
    recipes = [mi_guided(noisy, budget) for budget in np.linspace(0.1, 0.9, 9) * noisy["z0"][0]]
    strengths = np.array([list(r.strengths.values()) for r in recipes])
    assert (np.diff(strengths, axis=0) <= 1e-9).all()
    exact = mi_guided(exact_curves(line), recipes[4].budget)
    assert strengths[4] == pytest.approx(list(exact.strengths.values()), abs=0.15)


def test_a_group_that_the_image_does_not_use_is_moved_for_nothing():
    curves = {"used": {0: 3.0, 1: 0.0}, "unused": {0: 3.0, 1: 3.0}}
    assert mi_guided(curves, 2.0).strengths["unused"] == 1
    assert mi_guided(curves, 3.0).strengths == {"used": 0, "unused": 0}


def test_known_strengths_of_a_curve_that_is_straight_in_the_share_of_variance():
    curves = {"a": {0: 4.0, 1: 0.0}, "b": {0: 4.0, 1: 3.0}}
    recipe = mi_guided(curves, 2.4)  # to lose: 0.4 * (4 + 1) = 2, so b gives its 1 and a another 1 of its 4
    assert recipe.strengths == pytest.approx({"a": 0.5, "b": 1.0})
    assert mi_guided(curves, 3.2).strengths == pytest.approx({"a": math.sqrt(1 / 8), "b": math.sqrt(1 / 2)})
    assert (recipe.budget, recipe.mi_nats) == (2.4, None)


def test_spare_top_leaves_the_group_of_largest_impact(line):
    curves = exact_curves(line)
    recipe = spare_top(curves, 0.7 * curves["z0"][0])
    assert recipe.strengths["z0"] == 0 and all(recipe.strengths[f"z{k}"] > 0 for k in (1, 2, 3))
    assert spare_top(dict(reversed(curves.items())), recipe.budget).strengths == recipe.strengths
    assert set(spare_top(curves, 0).strengths.values()) == {0.0, 1.0}


@pytest.mark.parametrize("rule", [mi_guided, spare_top])
@pytest.mark.parametrize("curves, budget, problem", [
    ({"a": {0: 3.0, 1: 1.0}}, -0.1, r"budget=-0\.1 must lie between 0 and 3"),
    ({"a": {0: 3.0, 1: 1.0}}, 3.1, r"budget=3\.1 must lie between 0 and 3"),
    ({"a": {0: 3.0, 1: 1.0}}, math.nan, "budget=nan"),
    ({"a": {0: 3.0}}, 1, r"'a' has 1 point\(s\)"),
    ({"a": {}}, 1, r"'a' has 0 point\(s\)"),
    ({"a": {0: 3.0, 1.2: 1.0}}, 1, r"'a' has strengths 0 to 1\.2"),
    ({"a": {-0.2: 3.0, 1: 1.0}}, 1, r"'a' has strengths -0\.2 to 1"),
    ({"a": {0.1: 3.0, 1: 1.0}}, 1, r"'a' has strengths 0\.1 to 1; measure from 0"),
    ({"a": {0: math.nan, 1: 1.0}}, 1, "'a' has values .* not finite"),
    ({"a": {0: 0.0, 1: 0.0}}, 0, "curves start at 0 nats"),
    ({}, 0, "curves={}"),
])
def test_bad_curves_and_budgets_are_named(rule, curves, budget, problem):
    with pytest.raises(ValueError, match=problem):
        rule(curves, budget)


def test_measured_values_go_into_a_recipe():
    recipe = replace(mi_guided({"a": {0: 3.0, 1: 1.0}}, 2), mi_nats=2.1, se=0.02, sigma_x=0.1, generator="toy")
    assert recipe.rule == "equal loss per group" and recipe.mi_nats == 2.1


# allocation rules

RULES = [EqualLoss(), SpareTop(), WaterFilling(), SpareTop(WaterFilling())]


def line_curves(line, sigma_x=0.5):
    strengths = np.linspace(0, 1, 11).round(2).tolist()
    exact = lambda name, s: linear_pair_mi(line, moves(single(line.layout, name, VariancePreserving(s))), sigma_x)
    return {name: {s: exact(name, s) for s in strengths} for name in line.layout.group_names}


def lost(curves, recipe):
    "Nats lost group by group, read off the exact curves, straight in the share of variance."
    total = 0.0
    for name, s in recipe.strengths.items():
        known, nats = np.array(list(curves[name])), np.array(list(curves[name].values()))
        total += nats[0] - np.interp(s * s, known**2, nats)
    return total


@pytest.mark.parametrize("rule", RULES, ids=["equal", "spare", "fill", "spare-fill"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_no_rule_overspends_and_none_wastes_what_can_be_spent(line, rule, share):
    curves = line_curves(line)
    start = curves["z0"][0.0]
    caps = {name: start - curve[1.0] for name, curve in curves.items()}
    recipe = mi_guided(curves, share * start, rule)
    total = (1 - share) * sum(caps.values())
    movable = sum(caps.values()) - max(caps.values()) * isinstance(rule, SpareTop)
    assert set(recipe.strengths) == set(curves) and recipe.rule == rule.name
    assert lost(curves, recipe) == pytest.approx(min(total, movable), rel=0.02)


def test_water_filling_moves_furthest(line):
    curves = line_curves(line)
    far = lambda rule: sum(map(displacement, mi_guided(curves, 0.6 * curves["z0"][0.0], rule).strengths.values()))
    assert far(WaterFilling()) > far(EqualLoss()) and far(WaterFilling()) > far(SpareTop())
    assert far(WaterFilling(portions=600)) >= far(WaterFilling()) - 0.02


def test_water_filling_beats_every_division_on_a_grid(line):
    "Brute force over all strengths in steps of 0.1 that lose no more."
    curves = line_curves(line)
    recipe = mi_guided(curves, 0.7 * curves["z0"][0.0], WaterFilling())
    names, budget = list(curves), lost(curves, recipe) + 1e-9
    losses = {name: {s: curve[0.0] - nats for s, nats in curve.items()} for name, curve in curves.items()}
    best = max(sum(map(displacement, s)) for s in itertools.product(curves["z0"], repeat=len(names))
               if sum(losses[name][x] for name, x in zip(names, s)) <= budget)
    assert sum(map(displacement, recipe.strengths.values())) >= best - 0.02


def test_water_filling_buys_what_it_is_told_to_want(line):
    curves = line_curves(line)
    for wanted in curves:
        worth = {name: {0.0: 0.0, 1.0: float(name == wanted)} for name in curves}
        recipe = mi_guided(curves, 0.3 * curves["z0"][0.0], WaterFilling(worth, "only " + wanted))
        assert recipe.strengths[wanted] == 1 and recipe.rule == "only " + wanted


def test_a_worth_without_a_group_is_named(line):
    with pytest.raises(ValueError, match="worth has no group 'z0', only z9"):
        mi_guided(line_curves(line), 1.0, WaterFilling({"z9": {0: 0, 1: 1}}))


def test_your_own_rule(line):
    class Halves:
        name = "half of everything"

        def __call__(self, losses, total):
            return dict.fromkeys(losses, 0.5)

    recipe = mi_guided(line_curves(line), 1.0, Halves())
    assert set(recipe.strengths.values()) == {0.5} and recipe.rule == "half of everything"


def test_spare_top_is_its_rule(line):
    curves = line_curves(line)
    assert spare_top(curves, 1.0) == mi_guided(curves, 1.0, SpareTop())


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_displacement_is_the_distance_moved(strength):
    z = torch.randn(100_000, generator=rng_for(0, "z"))
    moved = VariancePreserving(strength)(z, rng_for(0, "e"))
    assert (moved - z).square().mean().sqrt().item() == pytest.approx(displacement(strength), abs=0.01)
