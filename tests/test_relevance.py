"Measures of relevance against closed forms and second derivations; rank correlations, variants and verdicts on made tables."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mlvgm_mi.generators.core import LinearGaussian, linear_direct_mi
from mlvgm_mi.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from mlvgm_mi.impact import ImpactConfig
from mlvgm_mi.latents import rng_for
from mlvgm_mi.perturb import displacement
from mlvgm_mi.relevance import (
    DirectConfig, changes, conditional_information, direct_information, equal_norm_strengths, group_rates, group_sizes,
    independent_groups, jacobian_relevance, linear_conditional_mi, rank_correlations, worths,
)
from mlvgm_mi.stability import (
    CLAIM_COLUMNS, Claim, displacement_ratio, least_share, least_step, linear_trials, ordered_pairs, share_interval,
    usual_variants, verdict,
)

SMALL = StyleGAN2Config(z_dim=8, w_dim=8, img_resolution=8, img_channels=1, num_layers=1, channel_base=64)


@pytest.fixture(scope="module")
def line() -> LinearGaussian:
    return LinearGaussian.random([0.8, 0.5, 0.2], pixels=10, width=3, seed=4)


@pytest.fixture(scope="module")
def styled() -> StyleGAN2:
    return StyleGAN2(SMALL, {"coarse": (0, 2), "fine": (2, 4)}).eval().requires_grad_(False)


# --- information


def test_conditional_information_is_the_log_determinant(line):
    for name in line.layout.group_names:
        found, exact = conditional_information(line, name, contexts=6, candidates=256), linear_conditional_mi(line, name, 1.0)
        assert found.nats <= exact + 3 * found.se and found.nats == pytest.approx(exact, rel=0.1, abs=3 * found.se)


def test_what_the_rest_tells_only_helps(line):
    "Independent groups: I(x; z_k | rest) >= I(x; z_k), exactly."
    for name in line.layout.group_names:
        assert linear_conditional_mi(line, name, 1.0) > linear_direct_mi(line, name, 1.0)


def test_direct_information_is_a_lower_bound_near_the_truth(line):
    found = direct_information(line, DirectConfig(pool=8192, steps=250, candidates=512, features=32))
    for name, estimate in found.items():
        exact = linear_direct_mi(line, name, 1.0)
        assert exact - 0.15 * exact - 0.06 <= estimate.nats <= exact + 3 * estimate.se


def test_groups_of_a_style_mixed_draw_are_independent(styled):
    latents = independent_groups(styled, 4000, lambda stream: rng_for(0, stream))
    assert latents[0] is latents[1] and latents[2] is latents[3]
    cross = latents[0].T @ latents[2] / 4000
    assert cross.abs().max() < 0.08
    assert group_sizes(styled) == {"coarse": 8, "fine": 8}


# --- Jacobian


def test_the_jacobian_of_a_linear_decoder(line):
    found = jacobian_relevance(line, samples=3)
    for name, mixing in zip(line.layout.group_names, line.mixing):
        assert found[name][0] == pytest.approx(mixing.square().sum().item(), rel=1e-3)


def test_differences_agree_with_forward_mode(styled):
    "The same relevance from exact directional derivatives of the whole decoder."
    double = styled.double()
    found = jacobian_relevance(_Double(double), samples=4, axes=100, epsilon=1e-4)
    anchor = independent_groups(_Double(double), 4, lambda stream: rng_for(0, stream))
    codes = [anchor[0], anchor[2]]
    for k, name in enumerate(("coarse", "fine")):
        total = 0.0
        for axis in range(8):
            tangents = [torch.zeros_like(z) for z in codes]
            tangents[k][:, axis] = 1
            decode = lambda a, b: double.decode((a, a, b, b))  # noqa: E731
            _, slope = torch.func.jvp(decode, tuple(codes), tuple(tangents))
            total += slope.abs().mean(0).square().sum().item()
        assert found[name][0] == pytest.approx(total, rel=1e-3)
    styled.float()


class _Double:
    "A generator whose draws are in double precision."

    def __init__(self, generator):
        self.generator = generator

    def __getattr__(self, name):
        return getattr(self.generator, name)

    def sample(self, n, rng, clip=None):
        z = self.generator.sample(n, rng, clip)[0].double()
        return (z,) * len(self.generator.layout.blocks)


def test_a_selection_of_axes_is_unbiased_and_says_how_sure_it_is():
    wide = LinearGaussian.random([1.0], pixels=6, width=60, seed=1)
    exact = wide.mixing[0].square().sum().item()
    found = [jacobian_relevance(wide, samples=1, axes=20, seed=seed)["z0"] for seed in range(30)]
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(exact, abs=4 * values.std() / math.sqrt(30))
    assert values.std() == pytest.approx(errors.mean(), rel=0.4)


# --- changes


class Sign(torch.nn.Module):
    def features(self, images):
        return images.flatten(1)

    def forward(self, images):
        return torch.stack([images.sum((1, 2, 3)), -images.sum((1, 2, 3))], 1)


def test_changes_have_their_closed_forms(line):
    strengths = {name: (0.4, 1.0) for name in line.layout.group_names}
    seen = changes(line, Sign(), strengths, pairs=6000).set_index(["measure", "group", "strength"])["value"]
    for name, mixing in zip(line.layout.group_names, line.mixing):
        for s in (0.4, 1.0):
            mean_square = displacement(s) ** 2 * mixing.square().sum().item() / 10
            assert seen["pixels", name, s] ** 2 <= 1.02 * mean_square, "the mean of a root is below the root of the mean"
            assert seen["pixels", name, s] ** 2 > 0.6 * mean_square
            parts = [m.sum(0).square().sum().item() for m in line.mixing]
            own = mixing.sum(0).square().sum().item()
            rho = 1 - own * (1 - math.sqrt(1 - s * s)) / sum(parts)
            assert seen["flips", name, s] == pytest.approx(math.acos(rho) / math.pi, abs=0.025)


def test_everything_resampled_is_unrelated():
    one = LinearGaussian.random([1.0], pixels=8, width=4)
    seen = changes(one, Sign(), {"z0": (1.0,)}, pairs=4000).set_index("measure")["value"]
    assert seen["features"] == pytest.approx(1, abs=0.03) and seen["flips"] == pytest.approx(0.5, abs=0.03)


def test_equal_norms():
    uneven = LinearGaussian([torch.ones(4, 2), torch.ones(4, 8)])
    found = equal_norm_strengths(uneven, 0.7)
    assert found["z0"] == pytest.approx(0.7)
    assert 8 * displacement(found["z1"]) ** 2 == pytest.approx(2 * displacement(0.7) ** 2)


def test_worths_start_at_nothing(line):
    seen = changes(line, Sign(), {"z0": (0.5, 1.0)}, pairs=64)
    found = worths(seen, "pixels")
    assert list(found["z0"]) == [0.0, 0.5, 1.0] and found["z0"][0.0] == 0 < found["z0"][0.5] < found["z0"][1.0]
    with pytest.raises(ValueError, match="measure='colour'.*pixels, features, flips"):
        worths(seen, "colour")


def test_rates_sum_over_the_blocks_of_a_group():
    grouped = LinearGaussian([torch.ones(2, 1)] * 3, {"a": (0, 2), "b": (2, 3)})
    rates = group_rates(grouped, torch.tensor([[1.0, 2, 5], [3, 2, 5]]))
    assert rates == {"a": (4.0, 1.0), "b": (5.0, 0.0)}


# --- ranks


def made(measures, seeds=1, se=0.0, generator="made"):
    rows = [(generator, group, measure, value, se, seed) for seed in range(seeds)
            for measure, values in measures.items() for group, value in zip("abcdef", values)]
    return pd.DataFrame(rows, columns=["generator", "group", "measure", "value", "se", "seed"])


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    impact, other = rng.normal(size=6), rng.normal(size=6)
    tied = [1, 1, 2, 2, 3, 0]
    found = rank_correlations(made({"impact": impact, "other": other, "tied": tied}), draws=50).set_index("measure")
    for name, values in {"other": other, "tied": tied}.items():
        assert found.loc[name, "spearman"] == pytest.approx(stats.spearmanr(impact, values)[0])
        assert found.loc[name, "kendall"] == pytest.approx(stats.kendalltau(impact, values)[0])


def test_intervals_widen_with_the_errors_and_cover():
    values = {"impact": [6, 5, 4, 3, 2, 1], "same": [6, 5, 4, 3, 2, 1], "turned": [1, 2, 3, 4, 5, 6]}
    sure, unsure = (rank_correlations(made(values, se=se)).set_index("measure") for se in (0.01, 1.0))
    assert (sure.loc["same", ["spearman", "spearman_low", "kendall_low"]] == 1).all() and sure.loc["turned", "kendall"] == -1
    assert unsure.loc["same", "spearman_low"] < 0.95 and unsure.loc["same", "spearman_high"] <= 1


def test_a_measure_that_ranks_nothing_correlates_with_nothing():
    found = rank_correlations(made({"impact": [3, 2, 1], "flat": [1, 1, 1]}))
    assert found["spearman"].item() == 0 and found["kendall"].item() == 0


def test_every_generator_is_ranked_by_itself():
    both = pd.concat([made({"impact": [2, 1], "x": [2, 1]}), made({"impact": [2, 1], "x": [1, 2]}, generator="other")])
    assert list(rank_correlations(both)["spearman"]) == [1, -1]
    with pytest.raises(ValueError, match="reference='delta'.*impact, x"):
        rank_correlations(both, reference="delta")


# --- stability and verdicts


def test_variants_leave_out_the_reference():
    found = usual_variants(ImpactConfig(), losses=("infonce", "nwj"), features=(128, 32), batches=(64,), seeds=2)
    assert [(v.kind, v.name) for v in found] == [
        ("trained by", "nwj"), ("features", "32"), ("batch", "64"), ("seed", "+1"), ("seed", "+2")]


def test_groups_three_tenths_apart_are_ordered():
    "Small sweeps on linear generators of random gains; the study of a hundred trials is in results/."
    config = ImpactConfig(strengths=(1.0,), candidates=512, pool=60 * 128, steps=100, features=32, lr=1e-2)
    marked = linear_trials(4, config)
    pairs = ordered_pairs(marked)
    assert len(pairs) >= 10 and pairs["right"].mean() >= 0.95
    assert marked[["truth", "mi_nats"]].corr(method="spearman").iloc[0, 1] > 0.9


def test_pairs_are_those_of_one_trial_that_differ_enough():
    rows = [(0, 1.0, "a", 1.0, 2.0), (0, 1.0, "b", 1.2, 1.0), (0, 1.0, "c", 2.0, 1.5), (1, 1.0, "a", 9.0, 9.0),
            (0, 0.5, "a", 5.0, 5.0), (0, 1.0, "all groups", 0.1, 0.1)]
    marked = pd.DataFrame(rows, columns=["seed", "strength", "group", "truth", "mi_nats"]).assign(estimator="infonce")
    pairs = ordered_pairs(marked, least=0.5).set_index(["group_a", "group_b"]).right
    assert pairs.to_dict() == {("c", "a"): False, ("c", "b"): True}


def test_trials_know_the_truth_and_their_seed():
    "The truth is the closed form of the same generator, whatever the sweep says; later trials do not depend on earlier ones."
    config = ImpactConfig(strengths=(1.0,), candidates=64, pool=128, batch=64, steps=2, features=4, sigma_x=1.5)
    both, second = linear_trials(2, config, seed=3), linear_trials(1, config, seed=4)
    pd.testing.assert_frame_equal(both[both.seed == 4].reset_index(drop=True), second)
    resampled = second.set_index("group").truth
    assert resampled["all groups"] == pytest.approx(0, abs=1e-6) and (resampled.drop("all groups") > 0.1).all()
    assert (second.low == second.mi_nats - 1.96 * second.se).all() and (second.high > second.mi_nats + 1.96 * second.se).all()
    assert (second.inside == second.truth.between(second.low, second.high)).all() and second.inside.nunique() == 2


@pytest.mark.parametrize("hits, trials", [(95, 100), (0, 10), (10, 10)])
def test_share_intervals_hold_the_share(hits, trials):
    share, low, high = share_interval(hits, trials)
    assert 0 <= low <= share <= high <= 1 and low < high


@pytest.mark.parametrize("low, high, expected", [(0.6, 0.9, "confirmed"), (0.1, 0.4, "refuted"), (0.4, 0.6, "undecided")])
def test_verdicts(low, high, expected):
    assert verdict((low + high) / 2, low, high, threshold=0.5) == expected


def test_a_claim_is_judged_where_it_is_weakest():
    claim = Claim(1, "Groups differ.", "ratio > 1.5", 1.5, "E7_relevance")
    row = claim.judge({"strong": (3.0, 2.0, 4.0), "weak": (1.6, 1.2, 2.0)}).iloc[0]
    assert (row["generator"], row["verdict"], row["claim"]) == ("weak", "undecided", 1)
    assert set(CLAIM_COLUMNS) < set(row.index) and row["threshold"] == 1.5
    with pytest.raises(ValueError, match="does not end in '> 1.499'"):
        Claim(1, "Groups differ.", "ratio > 1.5", 1.499, "E7_relevance")
    with pytest.raises(ValueError, match="claim 1: no generator"):
        claim.judge({})
    with pytest.raises(ValueError, match="estimate=3.0 is not between"):
        claim.judge({"odd": (3.0, 1.0, 2.0)})


def test_numbers_of_the_claims():
    table = pd.DataFrame({"group": ["a", "b"], "share": [0.8, 0.05], "share_low": [0.7, 0.03], "share_high": [0.9, 0.07],
                          "strength_at_2.00": [0.2, math.inf], "strength_at_2.00_low": [0.15, 0.95],
                          "strength_at_2.00_high": [0.25, math.inf]})
    assert least_share(table) == (0.05, 0.03, 0.07)
    ratio, low, high = displacement_ratio(table, "strength_at_2.00")
    assert ratio == pytest.approx(displacement(1) / displacement(0.2))
    assert (low, high) == pytest.approx((displacement(0.95) / displacement(0.25), displacement(1) / displacement(0.15)))
    falls = pd.DataFrame({"value": [0.4, 0.3, 0.35], "se": [0.0, 0.0, 0.0]})
    assert least_step(falls) == pytest.approx((-0.05, -0.05, -0.05))
