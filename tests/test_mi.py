"Bounds, errors and critics against closed forms."
import math

import pytest
import torch

from mlvgm_mi.latents import normal, rng_for
from mlvgm_mi.mi import (
    DV,
    ESTIMATORS,
    FLO,
    MINE,
    MLP,
    NWJ,
    SMILE,
    Bound,
    ConvEncoder,
    CorrelatedGaussian,
    InfoNCE,
    JointCritic,
    MIEstimate,
    SeparableCritic,
    estimate_mi,
    fit_critic,
    gaussian_mi,
    initialise,
    optimise,
    trunk_for,
)

BOUNDS = list(ESTIMATORS.values())
named = pytest.mark.parametrize("bound", BOUNDS, ids=list(ESTIMATORS))
apart = pytest.mark.parametrize("bound", BOUNDS[:4], ids=list(ESTIMATORS)[:4])  # MINE reads like DV, FLO like NWJ


def perfect(bound: Bound, pair: CorrelatedGaussian, blocks: int, candidates: int, seed: int = 0) -> torch.Tensor:
    "Scores of the critic that the bound would learn, `(blocks, N, N)`, in float64."
    x, y = pair.sample(blocks * candidates, rng_for(seed, "pairs"))
    x, y = (v.double().unflatten(0, (blocks, candidates)) for v in (x, y))
    return bound.optimum(torch.stack([pair.log_ratio(a, b) for a, b in zip(x, y)]))


def random_scores(*shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=rng_for(0, "scores"), dtype=torch.float64)


# --- formulas, written a second time as loops


def chance(scores):
    return [scores[i, j].item() for i in range(len(scores)) for j in range(len(scores)) if i != j]


def mean(values):
    return sum(values) / len(values)


def slow_infonce(s):
    rows = [s[i, i] - math.log(sum(math.exp(v) for v in s[i])) for i in range(len(s))]
    return float(mean(rows)) + math.log(len(s))


def slow_nwj(s):
    return float(mean(s.diagonal())) - mean([math.exp(v) for v in chance(s)]) / math.e


def slow_dv(s):
    return float(mean(s.diagonal())) - math.log(mean([math.exp(v) for v in chance(s)]))


def slow_smile(s, tau=5.0):
    return float(mean(s.diagonal())) - math.log(mean([math.exp(max(-tau, min(tau, v))) for v in chance(s)]))


def slow_flo(s):
    return float(mean(s.diagonal())) + 1 - mean([math.exp(v) for v in chance(s)])


SLOW = {"infonce": slow_infonce, "nwj": slow_nwj, "dv": slow_dv, "smile": slow_smile, "mine": slow_dv, "flo": slow_flo}


@named
def test_value_is_the_formula(bound):
    scores = 2 * random_scores(7, 7)
    assert abs(scores).max() > 5, "the clip of SMILE must bite"
    assert bound.estimate(scores).nats == pytest.approx(SLOW[bound.name](scores), abs=1e-9)


@named
def test_leave_one_out_is_leaving_one_out(bound):
    scores = random_scores(2, 6, 6)
    for k in range(6):
        rest = torch.tensor([i for i in range(6) if i != k])
        torch.testing.assert_close(bound.leave_one_out(scores)[:, k], bound.values(scores[:, rest][:, :, rest]))


def test_leave_one_out_survives_a_row_that_is_sure_of_the_wrong_partner():
    scores = random_scores(6, 6)
    scores[2, 4] = 800.0
    rest = torch.tensor([0, 1, 2, 3, 5])
    torch.testing.assert_close(InfoNCE().leave_one_out(scores)[4], InfoNCE().values(scores[rest][:, rest]))


@named
def test_blocks_are_averaged_and_errors_too(bound):
    scores = random_scores(4, 9, 9)
    alone, together = [bound.estimate(block) for block in scores], bound.estimate(scores)
    assert together.nats == pytest.approx(mean([e.nats for e in alone]))
    assert together.se == pytest.approx(math.sqrt(sum(e.se**2 for e in alone)) / 4)
    assert together.n == 36 and together.ceiling == bound.ceiling(9)


@named
def test_an_offset_of_all_scores(bound):
    scores = random_scores(9, 9) / 4
    moved = bound.estimate(scores + 0.5).nats - bound.estimate(scores).nats
    assert (abs(moved) < 1e-9) == (not isinstance(bound, NWJ)), "all but NWJ ignore a constant"


def test_losses_at_points_where_they_are_known():
    equal = torch.zeros(32, 32)
    assert InfoNCE().loss(equal).item() == pytest.approx(math.log(32))
    assert InfoNCE().estimate(equal).nats == pytest.approx(0, abs=1e-12)
    assert DV().loss(equal).item() == pytest.approx(0, abs=1e-6)
    assert NWJ().loss(equal + 1).item() == pytest.approx(0, abs=1e-6)
    assert SMILE().loss(equal).item() == pytest.approx(2 * math.log(2))
    assert InfoNCE().loss(torch.stack([equal, equal])).item() == pytest.approx(math.log(32))


def test_infinite_tau_turns_smile_into_dv():
    scores = 5 * random_scores(8, 8)
    assert SMILE(math.inf).estimate(scores).nats == DV().estimate(scores).nats != SMILE().estimate(scores).nats


# --- perfect critics


@pytest.mark.parametrize("nats", [0.25, 1.0, 2.0, 3.0])
@named
def test_perfect_critic_finds_the_closed_form(bound, nats):
    estimate = bound.estimate(perfect(bound, CorrelatedGaussian(4, nats), blocks=4, candidates=512))
    assert not estimate.saturated
    assert estimate.nats == pytest.approx(nats, abs=3.5 * estimate.se + 0.03 * nats)


def test_closed_forms_agree():
    pair = CorrelatedGaussian(3, 1.7)
    cross = pair.rho * torch.eye(3)
    joint = torch.cat([torch.cat([torch.eye(3), cross], 1), torch.cat([cross, torch.eye(3)], 1)])
    assert gaussian_mi(joint, 3) == pytest.approx(1.7)


@pytest.mark.parametrize("candidates", [3, 16, 256])
def test_infonce_never_exceeds_log_n(candidates):
    pair = CorrelatedGaussian(8, 20.0)
    estimate = InfoNCE().estimate(perfect(InfoNCE(), pair, blocks=4, candidates=candidates))
    assert estimate.nats <= math.log(candidates) + 1e-12 and estimate.ceiling == math.log(candidates)
    assert estimate.saturated and "SATURATED" in repr(estimate)
    sure = InfoNCE().estimate(1e4 * torch.eye(candidates))
    assert sure.nats <= sure.ceiling + 1e-12 and sure.saturated


def test_nothing_is_clipped_at_zero():
    assert InfoNCE().estimate(-5 * torch.eye(8)).nats < -1


@pytest.mark.parametrize("candidates", [32, 256])
@apart
def test_standard_errors_cover(bound, candidates):
    "Intervals of 300 repetitions hold the mean of the repetitions about 95 times in 100, and se is the spread."
    pair, repeats = CorrelatedGaussian(3, 1.0), 300
    scores = perfect(bound, pair, repeats, candidates)
    found = [bound.estimate(block) for block in scores]
    values = torch.tensor([e.nats for e in found])
    held = mean([low <= values.mean() <= high for low, high in (e.interval() for e in found)])
    assert 0.90 <= held <= 0.985
    assert mean([e.se for e in found]) == pytest.approx(values.std().item(), rel=0.15)


def test_the_spread_of_the_rows_understates_the_error():
    "Rows share candidates: the naive error of their mean is too small, the jackknife is not."
    scores = perfect(InfoNCE(), CorrelatedGaussian(20, 4.0), 2000, 16)
    spread = InfoNCE().values(scores).std().item()
    rows = scores.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    jackknife = mean([InfoNCE().estimate(block).se for block in scores[:400]])
    assert (rows.std(-1) / 4).mean().item() < 0.95 * spread
    assert jackknife == pytest.approx(spread, rel=0.08)


@apart
def test_errors_of_differences_cover(bound):
    "Two conditions on common anchors: intervals of the difference hold its mean and are narrower than unpaired ones."
    near, far = CorrelatedGaussian(3, 1.2), CorrelatedGaussian(3, 0.9)
    x, e = normal((300, 64, 3), rng_for(0, "x")), normal((300, 64, 3), rng_for(0, "e"))
    pairs = [(pair, pair.rho * x + math.sqrt(1 - pair.rho**2) * e) for pair in (near, far)]
    scores = [bound.optimum(torch.stack([p.log_ratio(a, b) for a, b in zip(x, y)])) for p, y in pairs]
    found = [bound.difference(a, b) for a, b in zip(*scores)]
    values = torch.tensor([nats for nats, _ in found])
    assert 0.90 <= mean([abs(nats - values.mean()) <= 1.96 * se for nats, se in found]) <= 0.985
    assert mean([se for _, se in found]) == pytest.approx(values.std().item(), rel=0.15)
    assert mean([se for _, se in found]) < 0.7 * mean([bound.estimate(block).se for block in scores[0]])


def test_interval_covers_the_closed_form_where_the_estimator_is_unbiased():
    pair = CorrelatedGaussian(3, 0.8)
    found = [NWJ().estimate(block) for block in perfect(NWJ(), pair, 300, 128)]
    assert mean([low <= 0.8 <= high for low, high in (e.interval() for e in found)]) >= 0.90


def test_the_cost_of_the_ceiling_is_about_the_bias():
    for nats in (3.0, 4.0, 5.0):
        pair = CorrelatedGaussian(400, nats)  # many weak coordinates: the log ratio varies little between pairs
        estimate = InfoNCE().estimate(perfect(InfoNCE(), pair, blocks=8, candidates=256))
        assert 0 < estimate.ceiling_cost < nats - estimate.nats + 4 * estimate.se + 0.05


@pytest.mark.parametrize("bound", [NWJ(), DV(), MINE(), FLO()], ids=["nwj", "dv", "mine", "flo"])
def test_without_a_ceiling_there_is_a_limit_and_it_is_told(bound):
    "Below the limit intervals cover; beyond it the value says so."
    for nats, candidates in ((4.0, 128), (5.0, 256)):
        scores = perfect(bound, CorrelatedGaussian(6, nats), 60, candidates)
        found = [bound.estimate(block) for block in scores]
        assert nats < bound.limit(candidates) and not any(e.saturated for e in found)
        assert mean([low <= nats <= high for low, high in (e.interval() for e in found)]) >= 0.85
    beyond = bound.estimate(perfect(bound, CorrelatedGaussian(6, 7.0), 8, 64))
    assert beyond.ceiling == math.inf and beyond.saturated
    assert f"beyond the {math.log(64 * 63 / 20):.2f} that so many pairs support" in repr(beyond)


def test_smile_runs_high_where_scores_pass_tau_and_tells():
    pair = CorrelatedGaussian(6, 6.0)
    scores = perfect(SMILE(), pair, blocks=4, candidates=512)
    clipped, open_ended = SMILE(3.0).estimate(scores), SMILE(8.0).estimate(scores)
    assert clipped.saturated and clipped.nats > 7 and clipped.limit == 3
    assert not open_ended.saturated and open_ended.nats == pytest.approx(6, rel=0.10)
    assert SMILE(50.0).limit(512) == DV().limit(512)


def test_both_directions_of_infonce_end_at_the_ceiling():
    scores = perfect(InfoNCE(), CorrelatedGaussian(8, 12.0), blocks=8, candidates=32)
    rows, columns = InfoNCE().estimate(scores), InfoNCE().estimate(scores.mT)
    assert rows.nats != columns.nats
    assert all(3.0 < e.nats <= math.log(32) and e.saturated for e in (rows, columns))


# --- losses with a memory, critics with a head


def test_mine_divides_by_the_moving_average():
    scores = random_scores(5, 5).requires_grad_()
    loss, average = MINE(0.6).training_loss(), None
    for shift in (0.0, 2.0, -1.0):
        weights = (scores.detach() + shift).exp() * (1 - torch.eye(5))
        batch = weights.sum() / 20
        average = batch if average is None else 0.6 * average + 0.4 * batch
        value = loss(scores + shift)
        assert value.item() == pytest.approx(DV().loss(scores + shift).item())
        expected = weights / 20 / average - torch.eye(5) / 5
        torch.testing.assert_close(torch.autograd.grad(value, scores)[0], expected.to(scores))


def test_each_training_of_mine_begins_anew():
    scores = random_scores(5, 5).requires_grad_()
    gradient = lambda loss: torch.autograd.grad(loss(scores), scores)[0]
    first = MINE().training_loss()
    first(scores + 9)
    assert not torch.equal(gradient(first), gradient(MINE().training_loss()))
    torch.testing.assert_close(gradient(MINE().training_loss()), gradient(MINE(0.0).training_loss()))


def test_mine_survives_scores_that_would_overflow():
    scores = (torch.full((4, 4), 500.0)).requires_grad_()
    loss = MINE().training_loss()
    loss(scores - 500)
    assert torch.autograd.grad(loss(scores), scores)[0].isfinite().all()


def test_flo_is_the_formula_of_its_paper():
    critic, head = SeparableCritic(MLP(2, 3, (8,)), MLP(3, 3, (8,))), MLP(5, 1, (8,))
    x, y = torch.randn(6, 2, generator=rng_for(0, "x")), torch.randn(6, 3, generator=rng_for(0, "y"))
    f, u = critic(x, y), head(torch.cat([x, y], 1))[:, 0]
    terms = [u[i] + (-u[i]).exp() * mean([(f[i, j] - f[i, i]).exp() for j in range(6) if j != i]) for i in range(6)]
    equipped = FLO().equip(critic, 5)
    equipped.head = head
    torch.testing.assert_close(FLO().values(equipped(x, y)), 1 - mean(terms))


def test_flo_with_the_head_of_infonce_is_tight():
    "With u worked out from the other half of the candidates, FLO's scores are log ratios again."
    scores = perfect(InfoNCE(), CorrelatedGaussian(3, 1.5), 2, 256)
    torch.testing.assert_close(FLO().values(FLO().calibrate(scores)), NWJ().values(NWJ().calibrate(scores)))


# --- calibration


def test_infonce_needs_no_calibration():
    scores = random_scores(2, 9, 9)
    assert InfoNCE().calibrate(scores) is scores
    shifted = scores + 4 * torch.randn(2, 9, 1, generator=rng_for(0, "shift"), dtype=torch.float64)
    torch.testing.assert_close(InfoNCE().values(shifted), InfoNCE().values(scores))


@pytest.mark.parametrize("name", ["nwj", "dv", "smile", "mine", "flo"])
def test_calibration_undoes_a_term_per_anchor(name):
    bound, pair = ESTIMATORS[name], CorrelatedGaussian(3, 1.0)
    scores = perfect(InfoNCE(), pair, 2, 512)
    shifted = scores + 4 * torch.randn(2, 512, 1, generator=rng_for(0, "shift"), dtype=torch.float64)
    calibrated = bound.calibrate(shifted)
    assert calibrated.shape == (4, 256, 256)
    torch.testing.assert_close(calibrated, bound.calibrate(scores))
    assert bound.estimate(calibrated).nats == pytest.approx(1.0, abs=0.15)


# --- critics


def test_joint_critic_scores_every_pair():
    net = MLP(5, 1, (8,))
    x, y = torch.randn(7, 2, generator=rng_for(0, "x")), torch.randn(4, 3, generator=rng_for(0, "y"))
    scores = JointCritic(net, pairs=9)(x, y)
    by_hand = torch.stack([torch.cat([net(torch.cat([a, b])[None])[0] for b in y]) for a in x])
    torch.testing.assert_close(scores, by_hand)


def test_joint_critic_on_images():
    net = ConvEncoder((2, 8, 8), 1, width=4)
    x, y = torch.rand(3, 1, 8, 8, generator=rng_for(0, "x")), torch.rand(3, 1, 8, 8, generator=rng_for(0, "y"))
    torch.testing.assert_close(JointCritic(net)(x, y)[1, 2], net(torch.cat([x[1:2], y[2:]], 1))[0, 0])


@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 32, 32), (3, 32, 32), (3, 64, 64), (1, 8, 8)])
def test_trunks_take_the_shapes_they_fit(shape):
    assert trunk_for(shape, features=6)(torch.zeros(2, *shape)).shape == (2, 6)


def test_no_trunk_fits():
    with pytest.raises(ValueError, match=r"image_shape=\(1, 2, 2\).*TRUNKS"):
        trunk_for((1, 2, 2))


@pytest.mark.parametrize("nats", [0.5, 1.0, 2.0, 3.0])
def test_trained_critic_is_within_ten_percent(nats):
    pair = CorrelatedGaussian(4, nats)
    critic = initialise(SeparableCritic(MLP(4, 32, (64, 64)), MLP(4, 32, (64, 64))), rng_for(0, "critic"))
    fit_critic(critic, InfoNCE(), lambda step: pair.sample(256, rng_for(0, "train", step=step)), steps=500, lr=5e-3)
    estimate = estimate_mi(critic, InfoNCE(), lambda b: pair.sample(1024, rng_for(0, "evaluate", step=b)), blocks=8)
    assert estimate.nats == pytest.approx(nats, rel=0.10)


@pytest.mark.parametrize("name", ["nwj", "dv", "smile", "mine", "flo"])
def test_other_bounds_train_too(name):
    bound, pair = ESTIMATORS[name], CorrelatedGaussian(2, 1.0)
    critic = initialise(bound.equip(JointCritic(MLP(4, 1, (32, 32))), 4), rng_for(0, "critic"))
    fit_critic(critic, bound, lambda step: pair.sample(64, rng_for(0, "train", step=step)), steps=400, lr=5e-3)
    estimate = estimate_mi(critic, bound, lambda b: pair.sample(256, rng_for(0, "evaluate", step=b)), blocks=8)
    assert estimate.nats == pytest.approx(1.0, abs=0.15)


def test_fits_repeat():
    def losses(seed):
        pair = CorrelatedGaussian(2, 1.0)
        critic = initialise(SeparableCritic(MLP(2, 4), MLP(2, 4)), rng_for(seed, "critic"))
        return fit_critic(critic, InfoNCE(), lambda step: pair.sample(16, rng_for(seed, "train", step=step)), steps=5)

    assert losses(0) == losses(0) != losses(1)


# --- refusals


@named
@pytest.mark.parametrize("scores, words", [
    (torch.zeros(1, 1), "1 candidate"),
    (torch.zeros(4, 5), r"shape \(4, 5\)"),
    (torch.zeros(4), r"shape \(4,\)"),
    (torch.full((4, 4), math.nan), "not finite"),
    (torch.eye(4).log(), "12 value"),
])
def test_bad_scores_are_refused(bound, scores, words):
    with pytest.raises(ValueError, match=words):
        bound.estimate(scores)


@named
def test_a_batch_of_one_cannot_train(bound):
    with pytest.raises(ValueError, match="candidate.*2 or more"):
        bound.loss(torch.zeros(1, 1))


def test_bad_parameters():
    with pytest.raises(ValueError, match="tau=0"):
        SMILE(0)
    with pytest.raises(ValueError, match="decay=1"):
        MINE(1)


def test_a_loss_that_explodes_is_reported():
    weight = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(FloatingPointError, match=r"loss_at\(1\).*lr=0.001"):
        optimise([weight], lambda step: weight / (1 - step), steps=3)


def test_estimates_say_what_they_are():
    estimate = MIEstimate(1.5, 0.1, math.log(64), 64, "infonce", 0.5)
    assert repr(estimate) == "1.500 +- 0.100 nats (infonce, n=64, ceiling 4.16, sigma_x=0.5)"
    assert estimate.interval() == pytest.approx((1.304, 1.696 - math.log(1 - math.exp(1.5) / 64))) and not estimate.saturated


def test_an_interval_knows_what_the_ceiling_took():
    "One that true density ratios of e^I give holds I at its upper end; at the ceiling nothing bounds the truth above."
    nats, n = 3.0, 64
    value = math.log(n) - math.log1p((n - 1) / math.exp(nats))
    assert MIEstimate(value, 0.0, math.log(n), n, "infonce").interval() == pytest.approx((value, nats), abs=0.02)
    assert MIEstimate(math.log(n), 0.1, math.log(n), n, "infonce").interval()[1] == math.inf
    assert MIEstimate(3.0, 0.1, math.inf, n, "nwj").interval() == pytest.approx((2.804, 3.196))
