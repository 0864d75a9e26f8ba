"The sweep, its table and the budget, against the linear generator where every answer is known."
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mlvgm_mi.generators.core import Generator, LinearGaussian, linear_pair_mi, load_generator
from mlvgm_mi.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from mlvgm_mi.impact import (
    ALL_GROUPS,
    COLUMNS,
    ImpactConfig,
    ImpactCritic,
    ImpactSweep,
    Optics,
    OutOfReachError,
    curves,
    decode_pairs,
    decode_pool,
    draw_conditions,
    fit_impact,
    impact,
    impact_table,
    meet_budget,
)
from mlvgm_mi.latents import Block, Layout, normal, rng_for
from mlvgm_mi.mi import initialise
from mlvgm_mi.perturb import Recipe, mi_guided

CONFIG = ImpactConfig(sigma_x=1.0, steps=500, pool=500 * 128, blocks=2, looks=1, estimators=("infonce", "nwj", "dv", "smile"))
TINY = ImpactConfig(strengths=(0.5, 1.0), candidates=16, blocks=2, pool=16, batch=8, steps=3, features=8)


@pytest.fixture(scope="module")
def line() -> LinearGaussian:
    return load_generator("linear-gaussian")


@pytest.fixture(scope="module")
def sweep(line):
    return fit_impact(line, CONFIG, seed=0, name="linear-gaussian")


@pytest.fixture(scope="module")
def frame(sweep) -> pd.DataFrame:
    return sweep.frame


def exact(line, strengths) -> float:
    return linear_pair_mi(line, {g: (math.sqrt(1 - s * s), s) for g, s in strengths.items()}, CONFIG.sigma_x)


def of(frame, estimator="infonce"):
    return frame[(frame["estimator"] == estimator) & (frame["group"] != ALL_GROUPS)]


# --- closed forms


def test_every_group_at_every_strength_is_within_ten_percent(line, frame):
    checked = 0
    for row in of(frame).itertuples():
        truth = exact(line, {row.group: row.strength})
        if 0.5 <= truth <= 3.3:
            assert row.mi_nats == pytest.approx(truth, rel=0.10), row
            checked += 1
    assert checked >= 20


def test_the_ranking_is_exact_at_every_strength(line, frame):
    for strength, part in of(frame).groupby("strength"):
        if strength >= 0.4:
            truth = [exact(line, {group: strength}) for group in part["group"]]
            assert list(np.argsort(part["mi_nats"])) == list(np.argsort(truth))


def test_moving_further_never_keeps_more(frame):
    for _, part in of(frame).groupby("group"):
        part = part.sort_values("strength")
        drops = np.diff(part["mi_nats"])
        assert (drops <= 2 * part["lost_se"].to_numpy()[1:]).all()


def test_recipes_are_within_ten_percent(line, sweep):
    rng, errors = rng_for(1, "recipes"), []
    for _ in range(10):
        strengths = dict(zip(line.layout.group_names, torch.rand(4, generator=rng).tolist()))
        truth = exact(line, strengths)
        if truth >= 0.5:
            errors.append(sweep.measure(strengths).nats / truth - 1)
    assert len(errors) >= 5 and max(map(abs, errors)) < 0.10


def test_nothing_is_left_when_everything_is_resampled(frame):
    row = frame[(frame["group"] == ALL_GROUPS) & (frame["estimator"] == "infonce")].iloc[0]
    assert row["strength"] == 1 and abs(row["mi_nats"]) < 0.05


def test_infonce_stays_below_the_truth(line, frame):
    for row in of(frame).itertuples():
        assert row.mi_nats <= exact(line, {row.group: row.strength}) + 3 * row.se


def test_losses_are_paired_differences(line, frame):
    part = of(frame)
    start = part.loc[part["strength"] == 0, "mi_nats"].iloc[0]
    np.testing.assert_allclose(part["lost"], start - part["mi_nats"], atol=1e-9)
    moved = part[(part["strength"] > 0) & (part["strength"] < 0.7)]
    assert (moved["lost_se"] < 0.8 * moved["se"]).all(), "common anchors should make differences sharper"
    for row in part[part["strength"] == 1].itertuples():
        truth = exact(line, {}) - exact(line, {row.group: 1.0})
        assert row.lost == pytest.approx(truth, abs=0.06 * exact(line, {}) + 3 * row.lost_se)


@pytest.mark.parametrize("estimator", ["nwj", "dv", "smile"])
def test_other_estimators_read_the_same_critic(line, frame, estimator):
    for row in of(frame, estimator).itertuples():
        truth = exact(line, {row.group: row.strength})
        if 0.5 <= truth <= 2:
            assert row.mi_nats == pytest.approx(truth, rel=0.12, abs=3 * row.se), row


def test_few_anchors_do_not_inflate_the_estimate(line):
    "Measured on fresh anchors, a critic that memorised 256 of them reads too little, never too much."
    memorised = ImpactConfig(strengths=(1.0,), pool=256, steps=300, candidates=512, blocks=1)
    for row in of(impact(line, memorised)).itertuples():
        assert row.mi_nats <= exact(line, {row.group: row.strength}) + 3 * row.se


# --- the frame


def test_frame_has_a_row_per_group_strength_and_estimator(line, frame):
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == (4 * 6 + 1) * 4 and not frame.duplicated(["group", "strength", "estimator"]).any()
    assert list(dict.fromkeys(frame["group"])) == [*line.layout.group_names, ALL_GROUPS]
    starts = of(frame)[of(frame)["strength"] == 0]
    assert len(starts) == 4 and starts["mi_nats"].nunique() == 1 and (starts["lost"] == 0).all()
    assert set(frame["step"]) == {"vp"} and set(frame["n"]) == {2048} and set(frame["generator"]) == {"linear-gaussian"}
    assert of(frame)["ceiling"].unique() == pytest.approx(math.log(1024))
    assert np.isinf(of(frame, "dv")["ceiling"]).all() and frame["mi_nats"].notna().all()


def test_seeds_repeat_and_differ(line):
    first, again, other = (impact(line, TINY, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first["mi_nats"], other["mi_nats"])


def test_draws_are_other_anchors(sweep):
    one, two = (sweep.measure({"z0": 0.5}, draw=draw) for draw in (0, 1))
    assert one.nats != two.nats and abs(one.nats - two.nats) < 4 * math.hypot(one.se, two.se)
    assert sweep.measure({"z0": 0.5}).nats == one.nats


class Recording(LinearGaussian):
    seen: list

    def decode_views(self, anchor, positives):
        self.seen.append([torch.cat(z, 1) for z in (anchor, *positives)])
        return super().decode_views(anchor, positives)


def test_measuring_uses_other_anchors_and_other_noise_than_training(line):
    generator = Recording(list(line.mixing))
    generator.seen = []
    sweep = fit_impact(generator, TINY)
    trained = len(generator.seen)
    assert trained == TINY.pool // TINY.batch
    sweep.frame, sweep.measure({"z1": 1.0}, draw=3)
    drawn = [{tuple(row.tolist()) for row in part[0]} for part in generator.seen]
    assert len(generator.seen) > trained
    assert not set().union(*drawn[:trained]) & set().union(*drawn[trained:])
    assert not drawn[0] & drawn[1], "two runs of the pool share anchors"
    fresh = [part[-1] for part in generator.seen[:trained]]
    assert not torch.equal(fresh[0], fresh[1])


def test_the_same_condition_on_the_same_anchors(line):
    "Common random numbers: frame and measure agree on a condition that both hold."
    sweep = fit_impact(line, TINY)
    row = of(sweep.frame).query("group == 'z1' and strength == 0.5").iloc[0]
    assert sweep.measure({"z1": 0.5}).nats == pytest.approx(row["mi_nats"], abs=1e-5)


def test_a_network_with_shared_latents(line):
    config = StyleGAN2Config(z_dim=8, w_dim=8, img_resolution=8, img_channels=1, num_layers=1, channel_base=64)
    generator = StyleGAN2(config, {"coarse": (0, 2), "fine": (2, 4)}).eval().requires_grad_(False)
    found = impact(generator, TINY)
    assert list(dict.fromkeys(found["group"])) == ["coarse", "fine", ALL_GROUPS] and found["mi_nats"].notna().all()


def test_a_layout_of_one_group():
    generator = LinearGaussian.random([1.0], pixels=8, width=2)
    assert set(impact(generator, TINY)["group"]) == {"z0", ALL_GROUPS}


# --- pairs, optics, critic


def test_conditions_have_nothing_moved_each_group_alone_and_a_recipe():
    drawn = torch.stack([draw_conditions(3, rng_for(0, "conditions", step=i)) for i in range(400)])
    assert drawn.shape == (400, 5, 3) and 0 <= drawn.min() and drawn.max() == 1
    assert (drawn[:, 0] == 0).all()
    alone = drawn[:, 1:4].diagonal(dim1=1, dim2=2)
    assert (alone > 0).all() and torch.equal(torch.diag_embed(alone), drawn[:, 1:4])
    assert 0.15 < (alone == 1).float().mean() < 0.25


def test_pairs_follow_the_variance_preserving_step(line):
    conditions = torch.tensor([[0.0, 0, 0, 0], [0.6, 0, 0, 0], [1, 1, 1, 1]])
    z = line.sample(20_000, rng_for(0, "anchor"))
    images = decode_pairs(line, z, conditions, lambda c, g: rng_for(0, f"{c}/{g}"))[:, :, 0, 0]
    assert torch.equal(images[:, 1], images[:, 0])
    parts = [m @ m.T for m in line.mixing]
    expected = [0.8 * parts[0] + sum(parts[1:]), torch.zeros(16, 16)]
    for c, covariance in zip((2, 3), expected):
        cross = images[:, 0].T @ images[:, c] / len(images)
        assert (cross - covariance).abs().max() < 0.06
        assert (images[:, c].T.cov() - sum(parts)).abs().max() < 0.08, "the positive must stay on the prior"


def test_optics_agree_between_covariance_and_gram_matrix():
    wide = torch.randn(40, 3, generator=rng_for(0, "low")) @ torch.randn(3, 60, generator=rng_for(0, "rank"))
    many = torch.cat([wide, wide])  # 80 rows of 60 numbers take the other route and have the same covariance
    a, b = Optics(wide, 0.5, 128), Optics(many, 0.5, 128)
    assert a.size == b.size <= 3
    torch.testing.assert_close(a.basis @ a.basis.T, b.basis @ b.basis.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(a.scale, b.scale, atol=1e-4, rtol=1e-4)


def test_optics_drop_what_the_noise_hides():
    scales = torch.tensor([3.0, 2.0, 1.0, 0.01, 0.01])
    images = scales * torch.randn(4000, 5, generator=rng_for(0, "images"))
    assert [Optics(images, noise, most).size for noise, most in ((1.0, 128), (0.001, 128), (0.001, 2))] == [3, 5, 2]
    optics = Optics(images, 1.0, 128)
    seen = optics.observe(optics.project(images[:, None, None]), normal((4000, 3), rng_for(0, "noise")))
    torch.testing.assert_close(seen.std(0), torch.ones(3), atol=0.05, rtol=0)


def test_a_condition_does_not_depend_on_its_neighbours():
    critic = initialise(ImpactCritic(6, 2, 8), rng_for(0, "critic"))
    x, y = normal((5, 8), rng_for(0, "x")), normal((3, 5, 8), rng_for(0, "y"))
    conditions = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 1.0]])
    together = critic(x, y, conditions)
    for c in range(3):
        torch.testing.assert_close(together[c], critic(x, y[c : c + 1], conditions[c : c + 1])[0])
    assert not torch.allclose(critic(x, y[:1], conditions[:1]), critic(x, y[:1], conditions[2:]))


# --- the budget


@pytest.mark.parametrize("budget", [0.8, 1.5, 2.5])
def test_the_budget_is_met_and_true(line, sweep, frame, budget):
    recipe, estimate, search = meet_budget(sweep, mi_guided(curves(frame), budget), budget)
    assert abs(estimate.nats - budget) <= 0.05 and search["mi_nats"].iloc[-1] == estimate.nats
    assert exact(line, recipe.strengths) == pytest.approx(budget, rel=0.10)
    assert (recipe.mi_nats, recipe.se, recipe.budget) == (estimate.nats, estimate.se, budget)
    assert recipe.generator == "linear-gaussian" and recipe.sigma_x == CONFIG.sigma_x and len(search) < 12
    fresh = sweep.measure(recipe.strengths, draw=9)
    assert fresh.nats == pytest.approx(budget, abs=0.05 + 3 * math.hypot(fresh.se, estimate.se))


def test_a_budget_along_one_group(line, sweep):
    recipe, estimate, _ = meet_budget(sweep, Recipe({"z0": 0.1}), budget=2.0)
    assert set(recipe.strengths) == {"z0"} and exact(line, recipe.strengths) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("budget, strengths, words", [
    (8.0, {"z0": 1.0}, "budget=8.0.*ceiling.*6.931.*candidates"),
    (-1.0, {"z0": 1.0}, "budget=-1.0 must be positive"),
    (math.nan, {"z0": 1.0}, "budget=nan"),
    (5.0, {"z0": 1.0}, "budget=5.0 exceeds the 3.*shares with itself"),
    (0.5, {"z3": 0.5}, "budget=0.5 is out of reach.*move more groups"),
    (2.0, {"z0": 0.0}, "no direction"),
])
def test_budgets_that_cannot_be_met(sweep, budget, strengths, words):
    with pytest.raises(ValueError, match=words):
        meet_budget(sweep, Recipe(strengths), budget)


# --- the table, on frames whose answers are set


def made_frame(seeds, self_nats=4.0, se=0.1, joint=True):
    "Group `a` falls in a straight line to `ends[seed]`, group `b` not at all."
    rows = []
    for seed, end in enumerate(seeds):
        points = [("a", s, self_nats + (end - self_nats) * s) for s in (0.0, 0.5, 1.0)]
        points += [("b", s, self_nats) for s in (0.0, 0.5, 1.0)] + [(ALL_GROUPS, 1.0, 0.0)] * joint
        for group, strength, nats in points:
            rows.append({"group": group, "strength": strength, "mi_nats": nats, "lost": self_nats - nats, "seed": seed})
    constant = {"generator": "made", "step": "vp", "ceiling": 6.9, "n": 1000, "estimator": "infonce", "sigma_x": 1.0}
    return pd.DataFrame(rows).assign(se=se, lost_se=se / 2, **constant)[list(COLUMNS)]


def test_table_of_one_seed():
    a, b = impact_table(made_frame([1.0]), levels=[2.5]).to_dict("records")
    assert (a["group"], a["resampled"], a["lost"], a["share"]) == ("a", 1.0, 3.0, 0.75)
    assert (a["lost_low"], a["lost_high"]) == pytest.approx((3 - 0.098, 3 + 0.098))
    assert a["strength_at_2.50"] == pytest.approx(0.5)
    assert a["strength_at_2.50_low"] < 0.5 < a["strength_at_2.50_high"] < 1
    assert b["share"] == 0 and b["strength_at_2.50"] == math.inf


def test_table_of_several_seeds_has_t_intervals():
    a = impact_table(made_frame([1.0, 1.2, 1.4]), levels=[2.5]).iloc[0]
    half = stats.t.ppf(0.975, 2) * 0.2 / math.sqrt(3)
    assert a["resampled"] == pytest.approx(1.2)
    assert (a["resampled_low"], a["resampled_high"]) == pytest.approx((1.2 - half, 1.2 + half))
    assert curves(made_frame([1.0, 1.2, 1.4]))["a"][1.0] == pytest.approx(1.2)


def test_table_without_the_joint_rows_takes_zero_as_the_floor():
    pd.testing.assert_series_equal(
        impact_table(made_frame([1.0], joint=False))["share"], impact_table(made_frame([1.0]))["share"])


def test_tables_of_the_sweep(line, frame):
    table = impact_table(frame).set_index("group")
    assert list(table.index) == list(line.layout.group_names)
    assert (table["lost"].diff().dropna() < 0).all(), "the demo's gains fall from coarse to fine"
    for group in table.index:
        truth = 1 - exact(line, {group: 1.0}) / exact(line, {})
        assert table["share"][group] == pytest.approx(truth, abs=0.05)


def test_curves_are_what_mi_guided_wants(line, frame):
    plain = curves(frame)
    assert list(plain) == list(line.layout.group_names) and ALL_GROUPS not in plain
    assert list(plain["z0"]) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert isinstance(mi_guided(plain, budget=2.0), Recipe)


def test_frames_of_two_generators_are_refused():
    both = pd.concat([made_frame([1.0]), made_frame([1.0]).assign(generator="other")])
    with pytest.raises(ValueError, match="generator.*'made'.*'other'.*select one"):
        curves(both)
    with pytest.raises(ValueError, match="estimator='dv'"):
        impact_table(made_frame([1.0]), estimator="dv")


# --- looks and pools


def test_looks_make_values_sharper_and_their_errors_honest(line, sweep):
    "Over fresh draws the scatter is what the standard error says; and it is smaller than that of single looks."
    strengths, spread = {"z0": 0.3}, {}
    for looks in (1, 4):
        few = ImpactSweep(sweep.pool, sweep.critic, replace(CONFIG, looks=looks, candidates=256), 0, "x", [])
        found = [few.measure(strengths, draw=draw) for draw in range(100, 124)]
        spread[looks] = np.std([e.nats for e in found], ddof=1)
        assert spread[looks] == pytest.approx(np.mean([e.se for e in found]), rel=0.45)
    assert np.mean([e.se for e in found]) < 0.95 * few_error(sweep, strengths)


def few_error(sweep, strengths) -> float:
    single = ImpactSweep(sweep.pool, sweep.critic, replace(CONFIG, looks=1, candidates=256), 0, "x", [])
    return np.mean([single.measure(strengths, draw=draw).se for draw in range(100, 124)])


def test_a_pool_gives_what_decoding_anew_gives(line):
    pool = decode_pool(line, TINY, seed=3)
    pd.testing.assert_frame_equal(fit_impact(line, TINY, 3, pool=pool).frame, impact(line, TINY, 3))


def test_a_pool_is_decoded_once(line):
    generator = Recording(list(line.mixing))
    generator.seen = []
    pool = decode_pool(generator, TINY)
    assert len(fit_impact(generator, TINY, pool=pool).frame)
    decoded = len(generator.seen)
    assert len(fit_impact(generator, replace(TINY, features=16), pool=pool).frame)
    assert len(generator.seen) == decoded


def test_runs_are_cut_into_batches(line):
    pool = decode_pool(line, TINY)
    small = pool.batches(3)
    assert [len(run.components) for run in small] == [3, 3, 3, 3]
    assert torch.equal(small[0].components, pool.runs[0].components[:3])
    with pytest.raises(ValueError, match="size=9 exceeds the 8 anchors"):
        pool.batches(9)


def test_a_pool_of_one_group_moves_no_other(line):
    pool = decode_pool(line, TINY).only("z1")
    assert all((run.conditions[:, [0, 2, 3]] == 0).all() and (run.conditions[:, 1] > 0).any() for run in pool.runs)
    assert all(run.components.shape[1] == 1 + len(run.conditions) for run in pool.runs)


@pytest.mark.parametrize("loss", ["nwj", "smile", "mine"])
def test_critics_of_other_losses(line, loss):
    found = fit_impact(line, replace(TINY, trained_by=loss)).frame
    assert found["mi_nats"].notna().all()


def test_out_of_reach_has_a_name(sweep):
    with pytest.raises(OutOfReachError, match="budget=0.5 is out of reach"):
        meet_budget(sweep, Recipe({"z3": 0.5}), 0.5)


# --- refusals


@pytest.mark.parametrize("field, value, words", [
    ("strengths", (-0.2, 1.0), "strengths: -0.2 is no strength"),
    ("strengths", (0.5, 1.2), "strengths: 1.2"),
    ("strengths", (0.5,), "lack 1.0"),
    ("joint", (2.0,), "joint: 2.0"),
    ("sigma_x", 0.0, "sigma_x=0.0 must be positive"),
    ("sigma_x", math.nan, "sigma_x=nan"),
    ("candidates", 1, "candidates=1 is too small"),
    ("batch", 1, "batch=1 is too small; use 2"),
    ("pool", 64, "pool=64 is too small; use 128"),
    ("steps", 0, "steps=0"),
    ("blocks", 0, "blocks=0"),
    ("estimators", ("mime",), "'mime' is unknown; choose from infonce"),
    ("trained_by", "mime", "'mime' is unknown; choose from infonce"),
    ("looks", 0, "looks=0"),
])
def test_bad_configurations(field, value, words):
    with pytest.raises(ValueError, match=words):
        ImpactConfig(**{field: value})


def test_bad_strengths_and_groups(sweep):
    with pytest.raises(ValueError, match="z1: 1.5 is no strength"):
        sweep.measure({"z1": 1.5})
    with pytest.raises(ValueError, match="z1: -0.1 is no strength"):
        sweep.measure({"z1": -0.1})
    with pytest.raises(KeyError, match="z9"):
        sweep.measure({"z9": 0.5})


class Constant(Generator):
    "Every pixel is `value`."

    layout, image_shape = Layout.of([Block("z", (2,))]), (1, 4, 4)

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def start(self, batch):
        return self.value.expand(batch, *self.image_shape)

    def stage(self, k, state, code):
        return state

    def render(self, state):
        return state


@pytest.mark.parametrize("value, words", [
    (1.5, r"span \[1.5, 1.5\].*image_range is \[0.0, 1.0\]"), (-0.5, "image_range"),
    (math.nan, "not finite"), (math.inf, "not finite"),
])
def test_bad_images(value, words):
    with pytest.raises(ValueError, match=f"images.*{words}"):
        impact(Constant(value), TINY)


def test_images_that_never_change():
    with pytest.raises(ValueError, match="images.*all alike"):
        impact(Constant(0.5), TINY)
