"Truths against second derivations; estimators against truths and the public benchmark's samples (`mi_tasks`)."
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from mlvgm_mi.generators.core import LinearGaussian, gaussian_mi, linear_pair_mi
from mlvgm_mi.latents import rng_for
from mlvgm_mi.mi import DV, ESTIMATORS, FLO, MINE, SMILE, CorrelatedGaussian, InfoNCE, MIEstimate
from mlvgm_mi.mi_estimators import CCA, KSG, Neural, joint
from mlvgm_mi.mi_truths import (
    FAMILIES,
    TRUTHS,
    LinearPair,
    StudentT,
    Transformed,
    check_estimator,
    half_cube,
    normal_cdf,
    spiral,
    unchanged,
)

FOLDER = Path(__file__).parent / "mi_tasks"
TASKS = json.loads((FOLDER / "tasks.json").read_text())


def samples(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(FOLDER / f"{task}.npz") as arrays:
        return torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])


def truth_of(task: str) -> float:
    return TASKS[task]["true_mi_nats"]


# --- truths


@pytest.mark.parametrize("dims, dof", [(1, 1), (3, 2)])
def test_student_agrees_with_the_benchmark(dims, dof):
    assert StudentT(dims, dof).nats == pytest.approx(truth_of(f"student-identity-{dims}-{dims}-{dof}"), abs=1e-9)


def test_student_agrees_with_an_integral():
    "The joint density of scipy, integrated against its margins."
    pair = StudentT(1, 4, rho=0.7)
    both, margin = stats.multivariate_t(shape=[[1, 0.7], [0.7, 1]], df=4), stats.t(4).logpdf
    grid = np.sinh(np.linspace(-6, 6, 241))
    x, y = np.meshgrid(grid, grid, indexing="ij")
    log_joint = both.logpdf(np.stack([x, y], -1))
    values = np.exp(log_joint) * (log_joint - margin(x) - margin(y))
    nats = integrate.simpson(integrate.simpson(values, x=grid), x=grid)
    assert pair.nats == pytest.approx(nats, abs=2e-3)


def test_student_without_tails_is_the_gaussian():
    assert StudentT(3, 100_000, rho=0.5).nats == pytest.approx(-1.5 * math.log(0.75), abs=1e-3)


def test_student_samples_have_their_margins():
    x, y = StudentT(2, 3, rho=0.5).sample(20_000, rng_for(0, "student"))
    for column in (*x.T, *y.T):
        assert stats.kstest(column.numpy(), stats.t(3).cdf).pvalue > 1e-3
    assert stats.kendalltau(x[:, 0], y[:, 0]).statistic == pytest.approx(2 / math.pi * math.asin(0.5), abs=0.02)


@pytest.mark.parametrize("transform", [half_cube, normal_cdf, unchanged])
def test_transforms_keep_the_order(transform):
    v = torch.linspace(-3, 3, 50)[:, None]
    assert bool((transform(v).diff(dim=0) > 0).all())


def test_the_spiral_can_be_unwound():
    v = 2 * torch.randn(50, 4, generator=rng_for(0, "v"), dtype=torch.float64)
    torch.testing.assert_close(spiral(spiral(v, 0.7), -0.7), v)
    torch.testing.assert_close(spiral(v).norm(dim=1), v.norm(dim=1))
    assert not torch.allclose(spiral(v), v)


@pytest.mark.parametrize("depth, nats", [(1, 0.5), (3, 2.0), (6, 4.0), (8, 6.0)])
def test_linear_pairs_share_what_was_asked_for(depth, nats):
    pair = LinearPair.sharing(nats, depth)
    assert len(pair.generator.layout.groups) == depth and pair.nats == pytest.approx(nats)
    estimate = CCA()(*pair.sample(4000, rng_for(0, "linear")))
    assert abs(estimate.nats - nats) < 4 * estimate.se


def test_linear_pair_is_the_closed_form_of_the_generator():
    generator = LinearGaussian.random([1.0, 0.5], pixels=4, width=2)
    pair = LinearPair(generator, {"z1": 0.6}, sigma_x=0.7)
    assert pair.nats == linear_pair_mi(generator, {"z1": (0.8, 0.6)}, 0.7)


def test_more_than_a_pair_can_share_is_refused():
    with pytest.raises(ValueError, match=r"nats=60.*up to"):
        LinearPair.sharing(60.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_their_promise(name):
    truth = FAMILIES[name](4, 1.25)
    x, y = truth.sample(7, rng_for(0, name))
    assert truth.nats == pytest.approx(1.25) and len(x) == len(y) == 7


# --- the benchmark: where each is to be trusted, and where not

KSG_TRUSTED = [name for name, task in TASKS.items() if task["dim_x"] + task["dim_y"] <= 3]
CCA_TRUSTED = [name for name in TASKS if name.startswith(("1v1-normal", "multinormal"))]


def test_the_benchmark_has_fourteen_tasks():
    assert len(TASKS) == 14 and len(KSG_TRUSTED) == 5 and len(CCA_TRUSTED) == 6


@pytest.mark.parametrize("task", KSG_TRUSTED)
def test_nearest_neighbours_in_few_dimensions(task):
    estimate = KSG()(*samples(task))
    assert abs(estimate.nats - truth_of(task)) < 3.5 * estimate.se + 0.03
    assert estimate.se < 0.05 and not estimate.saturated


@pytest.mark.parametrize("task", ["multinormal-dense-25-25-0.5", "multinormal-sparse-5-5-2-2.0", "student-identity-3-3-2"])
def test_nearest_neighbours_fall_short_in_many_dimensions(task):
    estimate = KSG()(*samples(task))
    assert estimate.nats < 0.9 * truth_of(task)


@pytest.mark.parametrize("task", CCA_TRUSTED)
def test_the_gaussian_formula_on_gaussians(task):
    estimate = CCA()(*samples(task))
    assert abs(estimate.nats - truth_of(task)) < 3.5 * estimate.se
    assert estimate.se < 0.05


@pytest.mark.parametrize("task", [
    "spiral-multinormal-sparse-3-3-2-2.0", "student-identity-1-1-1", "swissroll_x-normal_cdf-1v1-normal-0.75",
])  # fmt: skip
def test_the_gaussian_formula_falls_short_elsewhere(task):
    estimate = CCA()(*samples(task))
    assert estimate.nats + estimate.se < truth_of(task)


@pytest.mark.parametrize("task", ["1v1-normal-0.75", "1v1-bimodal-0.75", "multinormal-sparse-2-2-2-2.0"])
def test_critics_on_the_benchmark(task):
    estimate = Neural(steps=120, batch=128)(*samples(task))
    assert abs(estimate.nats - truth_of(task)) < 0.12 * truth_of(task) + 3 * estimate.se
    assert not estimate.saturated


# --- errors, bias, ceilings


def test_nearest_neighbours_as_loops():
    "The formula of Kraskov et al., counted by hand."
    x, y = CorrelatedGaussian(2, 1.0).sample(60, rng_for(0, "loops"))
    x, y = x.double(), y.double()
    near = [(v[:, None] - v[None]).abs().amax(-1).fill_diagonal_(math.inf) for v in (x, y)]
    radius = torch.maximum(*near).sort(1).values[:, 2]
    counts = [(d < radius[:, None]).sum(1).double() + 1 for d in near]
    digamma = torch.digamma
    three, n = torch.tensor(3.0, dtype=torch.float64), torch.tensor(60.0, dtype=torch.float64)
    by_hand = digamma(three) + digamma(n) - (digamma(counts[0]) + digamma(counts[1])).mean()
    assert KSG()._value(x, y) == pytest.approx(by_hand.item())


def coverage(estimator, pair, n, trials) -> tuple[float, float]:
    "Share of intervals that hold the truth, and stated error over spread."
    found = [estimator(*pair.sample(n, rng_for(seed, "coverage")), seed) for seed in range(trials)]
    held = np.mean([low <= pair.nats <= high for low, high in (e.interval() for e in found)])
    return held, np.mean([e.se for e in found]) / np.std([e.nats for e in found])


@pytest.mark.parametrize("pair", [CorrelatedGaussian(5, 1.0), CorrelatedGaussian(10, 4.0)], ids=["1 nat", "4 nats"])
def test_intervals_of_the_gaussian_formula_cover(pair):
    held, ratio = coverage(CCA(), pair, n=300, trials=200)
    assert held >= 0.90 and 0.85 < ratio < 1.2


def test_the_error_of_the_gaussian_formula_knows_tails():
    "A Student-t pair is no Gaussian pair; the error of the formula's value is right all the same."
    found = [CCA()(*StudentT(2, 5, rho=0.8).sample(1000, rng_for(seed, "tails"))) for seed in range(150)]
    assert np.mean([e.se for e in found]) == pytest.approx(np.std([e.nats for e in found]), rel=0.25)


def test_intervals_of_nearest_neighbours_cover():
    held, ratio = coverage(KSG(), CorrelatedGaussian(1, 0.8), n=1000, trials=60)
    assert held >= 0.85 and 0.75 < ratio < 1.3


def test_independent_pairs_share_nothing():
    pair = CorrelatedGaussian(3, 0.0)
    for estimator in (KSG(), CCA(), Neural(steps=30, batch=64)):
        estimate = estimator(*pair.sample(800, rng_for(0, "independent")))
        assert abs(estimate.nats) < 3 * estimate.se + 0.03


def test_the_gaussian_formula_is_unbiased_where_the_plain_one_is_not():
    pair, values, plain = CorrelatedGaussian(8, 1.0), [], []
    for seed in range(200):
        x, y = (v.double() for v in pair.sample(60, rng_for(seed, "bias")))
        values.append(CCA()(x, y).nats)
        plain.append(gaussian_mi(torch.cat([x, y], 1).T.cov(), 8))
    assert np.mean(plain) > 1.4
    assert abs(np.mean(values) - 1.0) < 4 * np.std(values) / math.sqrt(200)


def test_a_copy_reaches_the_ceiling_of_nearest_neighbours_and_says_so():
    x = torch.randn(400, 2, generator=rng_for(0, "copy"))
    estimate = KSG()(x, x.clone())
    assert estimate.saturated and estimate.nats == pytest.approx(estimate.ceiling)
    assert "at its ceiling" in repr(estimate)


def test_critics_say_when_they_are_saturated():
    x, y = CorrelatedGaussian(2, 8.0).sample(1500, rng_for(0, "high"))
    few = Neural(steps=200, batch=64, candidates=32)(x, y)
    assert few.saturated and few.nats <= math.log(32)
    clipped = Neural(SMILE(1.0), steps=200, batch=64)(x, y)
    assert clipped.saturated and clipped.limit == 1.0


def test_drift_is_small_where_the_bias_is():
    small, large = (CorrelatedGaussian(dims, 1.0).sample(1500, rng_for(0, "drift")) for dims in (1, 8))
    assert abs(KSG().drift(*small)) < 0.05 < KSG().drift(*CorrelatedGaussian(2, 6.0).sample(600, rng_for(0, "drift")))
    assert KSG()(*large).nats < 0.7


# --- critics


@pytest.mark.parametrize("bound", [DV(), MINE(), FLO()], ids=["dv", "mine", "flo"])
def test_bounds_on_arrays(bound):
    x, y = CorrelatedGaussian(2, 1.0).sample(4000, rng_for(0, "bounds"))
    estimate = Neural(bound, steps=150, batch=128)(x, y)
    assert abs(estimate.nats - 1.0) < 0.15 + 3 * estimate.se and estimate.estimator == bound.name


def test_one_bound_trains_another_reads():
    x, y = CorrelatedGaussian(2, 1.0).sample(4000, rng_for(0, "bounds"))
    estimate = Neural(SMILE(), steps=150, batch=128, trainer=InfoNCE())(x, y)
    assert abs(estimate.nats - 1.0) < 0.12 + 3 * estimate.se and estimate.estimator == "smile"


def test_joint_critics_on_arrays():
    x, y = CorrelatedGaussian(1, 0.8).sample(2000, rng_for(0, "joint"))
    estimate = Neural(critic=joint, steps=80, batch=64)(x, y)
    assert abs(estimate.nats - 0.8) < 0.1 + 3 * estimate.se


def test_a_critic_that_learns_by_heart_is_not_believed():
    "Few rows, many steps, nothing shared: the chosen step is an early one."
    x, y = CorrelatedGaussian(6, 0.0).sample(200, rng_for(0, "heart"))
    estimate = Neural(steps=200, batch=64)(x, y)
    assert abs(estimate.nats) < 3 * estimate.se + 0.05


def test_estimates_repeat():
    x, y = CorrelatedGaussian(2, 1.0).sample(300, rng_for(0, "repeat"))
    for estimator in (KSG(), CCA(), Neural(steps=5, batch=32)):
        assert estimator(x, y, 3) == estimator(x, y, 3)
    assert Neural(steps=5, batch=32)(x, y, 3) != Neural(steps=5, batch=32)(x, y, 4)


# --- the check


def test_check_is_a_tidy_frame():
    truths = {"a": CorrelatedGaussian(2, 1.0), "b": Transformed(CorrelatedGaussian(3, 0.0), half_cube)}
    frame = check_estimator(CCA(), truths, n=500, seeds=(0, 1))
    assert list(frame["task"]) == ["a", "a", "b", "b"] and list(frame["dim"]) == [2, 2, 3, 3]
    columns = "task dim truth estimate se error inside saturated ceiling limit n estimator seed"
    assert list(frame.columns) == columns.split()
    assert np.allclose(frame["error"], frame["estimate"] - frame["truth"])
    assert frame.loc[0, "estimate"] != frame.loc[1, "estimate"]


def test_check_finds_a_liar():
    honest = check_estimator(CCA(), {"a": CorrelatedGaussian(2, 1.0)}, n=500)
    liar = check_estimator(lambda x, y, seed: MIEstimate(7.0, 0.01, math.inf, len(x), "liar"), TRUTHS, n=50)
    assert honest["inside"].all() and not liar["inside"].any()


def test_check_wants_an_error():
    with pytest.raises(TypeError, match="float.*gaussian-1.*MIEstimate"):
        check_estimator(lambda x, y, seed: 1.0, {"gaussian-1": CorrelatedGaussian(1, 0.5)}, n=10)


def test_every_estimator_says_which_way_it_errs():
    assert all(len(e.bias) > 20 for e in (*ESTIMATORS.values(), KSG(), CCA()))


# --- refusals


@pytest.mark.parametrize("estimator", [KSG(), CCA(), Neural(steps=1)], ids=["ksg", "cca", "neural"])
@pytest.mark.parametrize("x, y, words", [
    (torch.zeros(200), torch.zeros(200), r"x has shape \(200,\)"),
    (torch.rand(200, 1), torch.rand(199, 1), r"y has shape \(199, 1\)"),
    (torch.rand(3, 1), torch.rand(3, 1), "3 rows; at least"),
    (torch.rand(200, 2).fill_(1.0), torch.rand(200, 1), "x: a column is constant"),
    (torch.rand(200, 1), torch.full((200, 1), math.nan), "y holds 200 value"),
], ids=["vector", "lengths", "short", "constant", "nan"])
def test_bad_arrays_are_refused(estimator, x, y, words):
    with pytest.raises(ValueError, match=words):
        estimator(x, y)


def test_repeated_pairs_and_linear_columns_are_refused():
    x = torch.randn(100, 1, generator=rng_for(0, "x"))
    with pytest.raises(ValueError, match="occur more than 3 times"):
        KSG()(x.round(), x.round())
    with pytest.raises(ValueError, match="share infinitely much"):
        CCA()(x, 2 * x + 1)
