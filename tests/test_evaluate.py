"""Probes against problems whose answer is known, geometry and intervals against closed forms."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch import nn

from mlvgm_mi import evaluate
from mlvgm_mi.data import ImageSet, Splits, load_digits
from mlvgm_mi.evaluate import (
    Interval, ProbeResult, SoftmaxRegression, alignment_uniformity, augmented_features, check_splits, confidence_interval,
    effective_rank, features, few_label_probe, geometry, judge, judge_layers, knn, linear_probe, paired_difference, sgd_probe,
    transfer,
)
from mlvgm_mi.latents import rng_for
from mlvgm_mi.views import AUGMENTATIONS


def draw(*shape, stream="x"):
    return torch.randn(*shape, generator=rng_for(0, stream))


def clouds(n, classes=4, width=6, distance=1.5, stream="clouds"):
    "Gaussian classes around fixed centres."
    rng = rng_for(0, stream)
    y = torch.randint(classes, (n,), generator=rng)
    return distance * draw(classes, width, stream="centres")[y] + torch.randn(n, width, generator=rng), y


@pytest.fixture(scope="module")
def data():
    return {split: clouds(n, stream=split) for split, n in {"train": 600, "val": 300, "test": 400}.items()}


# features


class Noisy(nn.Module):
    "An encoder that is only deterministic in eval mode, with one part that was put there on purpose."

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.layers[2].eval()

    def forward(self, images):
        return self.layers(images)


def modes(module):
    return [part.training for part in module.modules()]


def byte_images(n=10):
    return torch.randint(256, (n, 1, 4, 4), generator=rng_for(0, "bytes"), dtype=torch.uint8)


def test_features_do_not_depend_on_the_batch_and_leave_the_encoder_alone():
    encoder, images = Noisy(), byte_images()
    before, state = modes(encoder), torch.random.get_rng_state()
    statistics = encoder.layers[2].running_mean.clone()
    found = [features(encoder, images, batch) for batch in (1, 3, 10, 99)]
    assert found[0].shape == (10, 5) and found[0].dtype == torch.float32 and not found[0].requires_grad
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    assert modes(encoder) == before and torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(encoder.layers[2].running_mean, statistics)
    encoder(images.float()).sum().backward()  # gradients work again


def test_features_of_bytes_floats_and_image_sets_agree():
    encoder, images = Noisy(), byte_images()
    expected = features(encoder, images)
    torch.testing.assert_close(features(encoder, images / 255), expected)
    torch.testing.assert_close(features(encoder, ImageSet(images, torch.zeros(10).long(), ("a",))), expected)


def test_an_error_in_the_encoder_leaves_its_modes():
    encoder = Noisy()
    before = modes(encoder)
    with pytest.raises(RuntimeError):
        features(encoder, torch.zeros(2, 1, 5, 5, dtype=torch.uint8))
    assert modes(encoder) == before and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_features_of_an_encoder_in_another_precision(dtype):
    images = torch.randint(0, 256, (6, 1, 4, 4), generator=rng_for(0, "precision"), dtype=torch.uint8)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = features(encoder.to(dtype), images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, features(encoder.float(), images), atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (0, 1, 4, 4)])
def test_features_of_wrong_shapes(shape):
    with pytest.raises(ValueError, match="expected .N, C, H, W."):
        features(Noisy(), torch.zeros(shape))


def test_encoders_that_give_no_features():
    with pytest.raises(ValueError, match="flatten"):
        features(nn.Identity(), byte_images())
    broken = Noisy()
    nn.init.constant_(broken.layers[1].bias, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        features(broken, byte_images())


# linear probe


@pytest.mark.parametrize("decay", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("collinear", [False, True])
def test_softmax_regression_is_scikit_learns(decay, collinear):
    x, y = clouds(400)
    if collinear:
        x = torch.cat([x, x @ draw(6, 4) + 1e-2 * draw(400, 4, stream="noise")], 1)
    x = x.double()
    ours = SoftmaxRegression(x, y, tolerance=1e-9).fit(10 * decay).fit(decay)
    theirs = LogisticRegression(C=1 / (decay * len(y)), tol=1e-12, max_iter=100_000)
    theirs.fit(((x - x.mean(0)) / x.std(0, correction=0)).numpy(), y.numpy())
    torch.testing.assert_close(ours.weight.T, torch.from_numpy(theirs.coef_), rtol=2e-3, atol=2e-4)
    bias, theirs = ours.bias - ours.bias.mean(), torch.from_numpy(theirs.intercept_ - theirs.intercept_.mean())
    torch.testing.assert_close(bias, theirs, rtol=2e-3, atol=2e-4)


def test_the_probe_has_converged():
    "One decay from scratch and at the end of the path: the same accuracy, to a sample or two."
    x, y = clouds(2000)
    x = torch.cat([x, x @ draw(6, 10) + 0.01 * draw(2000, 10, stream="noise")], 1)
    path, direct = SoftmaxRegression(x, y), SoftmaxRegression(x, y).fit(1e-5)
    for decay in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        path.fit(decay)
    assert abs(path.accuracy(x, y) - direct.accuracy(x, y)) <= 0.002


def test_probe_finds_the_best_line():
    "Two classes two standard deviations apart: no classifier beats Phi(1)."
    def pair(n, stream):
        y = torch.randint(2, (n,), generator=rng_for(0, f"{stream}/y"))
        x = draw(n, 3, stream=stream)
        x[:, 1] += 2.0 * y - 1
        return x, y

    result = linear_probe(pair(4000, "a"), pair(2000, "b"), pair(40_000, "c"))
    assert result.test == pytest.approx(stats.norm.cdf(1), abs=0.006)


def test_probe_does_not_care_for_units(data):
    scale, shift = torch.logspace(-3, 3, 6), torch.arange(6.0)
    other = {split: (x * scale + shift, y) for split, (x, y) in data.items()}
    a, b = linear_probe(**data), linear_probe(**other)
    assert a.choice == b.choice and a.test == pytest.approx(b.test, abs=0.005)


def test_a_probe_that_stops_early_says_so(data, monkeypatch, recwarn):
    linear_probe(**data)
    assert not recwarn.list
    monkeypatch.setattr(evaluate, "_ITERATIONS", 3)
    with pytest.warns(UserWarning, match="stopped after 3 iterations, before its gradient fell from .* to 0.0003"):
        linear_probe(**data)


@pytest.mark.parametrize("probe", [linear_probe, knn])
def test_test_labels_choose_nothing(probe, data):
    x, y = data["test"]
    a, b = probe(**data), probe(data["train"], data["val"], (x, (y + 1) % 4))
    assert (a.val, a.choice) == (b.val, b.choice) and b.test < 0.25 < a.test


def test_choice_is_the_best_on_validation(data):
    decays = (10.0, 1e-1, 1e-3)
    each = {decay: linear_probe(**data, decays=[decay]) for decay in decays}
    result = linear_probe(**data, decays=decays)
    assert result.val == pytest.approx(max(r.val for r in each.values()), abs=0.004)
    ks = (1, 7, 40)
    each = {k: knn(**data, neighbours=[k]) for k in ks}
    result = knn(**data, neighbours=ks)
    assert result == each[int(result.choice)] and result.val == max(r.val for r in each.values())


@pytest.mark.parametrize("probe", [linear_probe, knn])
def test_features_without_information_give_chance(probe, data):
    blind = {split: (draw(len(y), 6, stream=split), y) for split, (x, y) in data.items()}
    assert probe(**blind).test < 0.36


@pytest.mark.parametrize("probe", [linear_probe, knn, lambda **d: few_label_probe(**d, share=0.5)])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(train=(torch.ones(5, 2, 2), torch.ones(5).long())), "train has features"),
        (dict(val=(torch.ones(5, 6), torch.ones(4).long())), "val has features"),
        (dict(test=(torch.ones(0, 6), torch.ones(0).long())), "test has features"),
        (dict(test=(torch.ones(5, 7), torch.ones(5).long())), "different widths.*'test': 7"),
        (dict(val=(torch.ones(5, 6), torch.full((5,), 9))), r"val has classes \[9\]"),
        (dict(test=(torch.ones(5, 6), torch.full((5,), 9))), r"test has classes \[9\]"),
    ],
)
def test_data_that_do_not_fit_are_named(probe, change, message, data):
    with pytest.raises(ValueError, match=message):
        probe(**(data | change))


# nearest neighbours


def brute_force(train, queries, k):
    "Cosines and votes by hand; ties to the class whose neighbours are nearer in sum."
    right = 0
    for x, y in zip(*queries):
        cosines = [float(x @ t / (x.norm() * t.norm())) for t in train[0]]
        near = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes = {}
        for i in near:
            count, sum_of = votes.get(int(train[1][i]), (0, 0.0))
            votes[int(train[1][i])] = count + 1, sum_of + cosines[i]
        right += max(votes, key=votes.get) == int(y)
    return right / len(queries[1])


@pytest.mark.parametrize("k", [1, 2, 3, 10, 40])
def test_knn_is_the_definition(k):
    train, queries = clouds(40, distance=0.5), clouds(60, distance=0.5, stream="queries")
    found = knn(train, queries, queries, neighbours=[k], block=7)
    assert found.val == found.test == pytest.approx(brute_force(train, queries, k))


def test_knn_does_not_depend_on_lengths_or_blocks(data):
    expected = knn(**data)
    assert knn(**data, block=1) == expected
    scaled = {split: (x * (1 + torch.arange(len(y))[:, None]), y) for split, (x, y) in data.items()}
    assert knn(**scaled).test == pytest.approx(expected.test, abs=0.003)


def test_a_majority_beats_any_nearness():
    train = torch.tensor([[1.0, 0.0], [0.2, 1.0], [0.2, 1.0]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert knn(train, query, query, neighbours=[3]).test == 1


def test_more_neighbours_than_samples(data):
    few = data["train"][0][:30], data["train"][1][:30]
    assert knn(few, data["val"], data["test"]).choice <= 30
    with pytest.raises(ValueError, match="all more than the 30"):
        knn(few, data["val"], data["test"], neighbours=[31, 50])


# few labels


def test_few_labels_are_stratified_distinct_and_reproducible(data, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "linear_probe", lambda train, val, test: seen.append(train) or ProbeResult(0, 0, 0))
    y = torch.arange(600) % 4
    train = data["train"][0], y
    for _ in range(2):
        few_label_probe(train, data["val"], data["test"], share=0.1, draws=3, seed=1)
    assert [len(labels) for _, labels in seen] == 6 * [60]
    assert all(labels.bincount().tolist() == 4 * [15] for _, labels in seen)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(seen[:3], seen[3:]))
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("share", [0.0, 0.005, 1.0, -0.1])
def test_shares_that_cannot_be(share, data):
    with pytest.raises(ValueError, match=f"share={share}"):
        few_label_probe(**data, share=share)


def test_a_rare_class_must_not_be_lost(data):
    "Three of 600 labels are of class 3; a twentieth of them is none."
    y = torch.where(torch.arange(600) < 3, 3, torch.arange(600) % 3)
    with pytest.raises(ValueError, match="share=0.05 .*rare class"):
        few_label_probe((data["train"][0], y), data["val"], data["test"], share=0.05)


# judge


class Pooled(nn.Module):
    "Means over 4x4 patches."

    def forward(self, images):
        return nn.functional.avg_pool2d(images, 4).flatten(1)


def test_judge_gives_tidy_rows():
    digits = load_digits()
    encoder, before = Pooled(), torch.random.get_rng_state()
    frame = judge(encoder, digits, "digits", seed=3, shares={"linear_10pct": 0.1})
    assert list(frame.columns) == ["probe", "dataset", "split", "accuracy"] and set(frame.dataset) == {"digits"}
    assert sorted(zip(frame.probe, frame.split)) == sorted(
        (probe, split) for probe in ("linear", "knn", "linear_10pct") for split in ("val", "test")
    )
    value = frame.set_index(["probe", "split"]).accuracy
    assert value["linear", "test"] > 0.9 and value["knn", "test"] > 0.9
    assert 0.6 < value["linear_10pct", "test"] < value["linear", "test"]
    assert encoder.training and torch.equal(before, torch.random.get_rng_state())
    pd.testing.assert_frame_equal(frame, judge(encoder, digits, "digits", seed=3, shares={"linear_10pct": 0.1}))


def test_judge_asks_for_both_shares_by_default(monkeypatch):
    few = load_digits().train
    splits, asked = Splits(few, few, few), []
    monkeypatch.setattr(evaluate, "few_label_probe", lambda share, **_: asked.append(share) or [ProbeResult(0, 0, 0)])
    frame = judge(Pooled(), splits, "digits")
    assert asked == [0.01, 0.1] and set(frame.probe) == {"linear", "knn", "linear_1pct", "linear_10pct"}


class Costly(nn.Module):
    "An encoder that is not to be run."

    def forward(self, images):
        pytest.fail("features were computed")


def part(*labels):
    return ImageSet(torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64), tuple("abc"))


@pytest.mark.parametrize("splits, shares, message", [
    (Splits(part(0, 1, 0, 1), part(0, 1), part(0, 1)), {"linear_10pct": 0.1}, "share=0.1 of 4 labels is 0 for 2 classes"),
    (Splits(part(0, 1), part(0, 1, 2), part(0)), {}, r"val has classes \[2\] of which train has no example"),
    (Splits(part(0, 1), part(0, 1), part(2, 1, 2)), {}, r"test has classes \[2\] of which train has no example"),
    (Splits(part(), part(0), part(0)), {}, "train has no images"),
    (Splits(part(0, 1), part(), part(0)), {}, "val has no images"),
    (Splits(part(0, 1), part(0), part()), {}, "test has no images"),
])
def test_what_cannot_be_judged_is_known_without_an_encoder(splits, shares, message):
    with pytest.raises(ValueError, match=message):
        check_splits(splits, shares=shares)
    with pytest.raises(ValueError, match=message):
        judge(Costly(), splits, "toy", shares=shares)


def test_what_can_be_judged_passes_the_check_and_the_usual_shares_are_asked_for():
    check_splits(load_digits(), shares={"linear_10pct": 0.1})
    with pytest.raises(ValueError, match="share=0.01 of 2 labels"):
        check_splits(Splits(part(0, 1), part(0), part(0)))


# intervals


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_is_students(n, level):
    values = draw(n).tolist()
    found = confidence_interval(values, level)
    low, high = stats.t.interval(level, n - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high, found.mean) == pytest.approx((low, high, np.mean(values)))
    assert (found.n, found.level) == (n, level) and found.mean in found and high + 1 not in found


@pytest.mark.parametrize("n", [2, 5])
def test_interval_keeps_its_promise(n):
    values = draw(3000, n, stream=f"coverage {n}").double() + 7
    inside = np.mean([7 in confidence_interval(row, 0.9) for row in values.tolist()])
    assert inside == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(
    "values, level, message",
    [
        ([], 0.95, "at least 2"),
        ([0.8], 0.95, "1 value.*at least 2"),
        ([0.8, math.nan], 0.95, "not all finite"),
        ([0.8, 0.9], 1.0, "level=1.0"),
        ([0.8, 0.9], 95, "level=95"),
    ],
)
def test_intervals_that_cannot_be(values, level, message):
    with pytest.raises(ValueError, match=message):
        confidence_interval(values, level)


def test_pairs_go_by_seed_and_not_by_place():
    a, b = {0: 0.81, 1: 0.75, 2: 0.88}, {2: 0.86, 0: 0.79, 1: 0.72}
    expected = confidence_interval([0.02, 0.03, 0.02])
    for one, two in [(a, b), (pd.Series(a), pd.Series(b)), (pd.Series(a), b), ([0.81, 0.75, 0.88], [0.79, 0.72, 0.86])]:
        found = paired_difference(one, two)
        assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    swapped = paired_difference(b, a)
    assert (swapped.low, swapped.high) == pytest.approx((-expected.high, -expected.low))


def test_pairing_removes_what_seeds_share():
    shared = 10 * draw(6, stream="seeds").double()
    a, b = (shared + 0.01 * draw(6, stream=s) + m for s, m in (("a", 1.0), ("b", 0.0)))
    assert 0 not in paired_difference(a.tolist(), b.tolist())
    assert confidence_interval(a.tolist()).low < confidence_interval(b.tolist()).high


@pytest.mark.parametrize("a, b", [({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0}), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_unpaired_seeds_are_refused(a, b):
    with pytest.raises(ValueError, match="b has seeds"):
        paired_difference(a, b)


def test_intervals_print_short():
    assert str(Interval(0.81234, 0.80001, 0.82461, 3, 0.95)) == "0.8123 [0.8, 0.8246]"


# geometry


def on_sphere(n, width):
    return nn.functional.normalize(draw(n, width).double(), dim=1)


@pytest.mark.parametrize("width, expected", [(2, -4 + math.log(np.i0(4))), (3, -4 + math.log(math.sinh(4) / 4))])
def test_uniformity_of_the_sphere(width, expected):
    x = on_sphere(3000, width)
    assert alignment_uniformity(torch.stack([x, x], 1)) == pytest.approx((0, expected), abs=0.03)


def test_alignment_and_uniformity_at_known_points():
    x = on_sphere(5, 4)
    assert alignment_uniformity(torch.stack([x, -x], 1))[0] == pytest.approx(4)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert alignment_uniformity(torch.stack([poles, poles], 1)) == pytest.approx((0, -8))
    assert alignment_uniformity(torch.stack([poles, poles], 1), sharpness=1)[1] == pytest.approx(-4)
    assert alignment_uniformity(torch.ones(6, 3, 4)) == pytest.approx((0, 0))
    quarter = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).expand(2, 3, 2)  # squared distances 2, 2, 4
    assert alignment_uniformity(quarter)[0] == pytest.approx(8 / 3)


def test_geometry_knows_neither_length_nor_rotation():
    x = draw(20, 2, 5).double()
    rotation = torch.linalg.qr(draw(5, 5, stream="rotation").double())[0]
    lengths = 1 + torch.arange(40).view(20, 2, 1)
    assert alignment_uniformity(x * lengths @ rotation) == pytest.approx(alignment_uniformity(x))
    flat = x.flatten(0, 1)
    assert effective_rank(3 * flat @ rotation + 7) == pytest.approx(effective_rank(flat))


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_effective_rank_counts_equal_directions(rank):
    basis = torch.linalg.qr(draw(8, rank).double())[0]
    corners = torch.cat([torch.eye(rank), -torch.eye(rank)]).double()
    assert effective_rank(corners @ basis.T) == pytest.approx(rank)


def test_effective_rank_of_unequal_directions():
    x = torch.cat([torch.diag(torch.tensor([3.0, 1.0])), -torch.diag(torch.tensor([3.0, 1.0]))])
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(x) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(5, 3), (1, 2, 3), (5, 1, 3)])
def test_alignment_of_wrong_shapes(shape):
    with pytest.raises(ValueError, match="expected .B, V, D."):
        alignment_uniformity(torch.ones(shape))


def test_rank_of_nothing():
    with pytest.raises(ValueError, match="collapsed"):
        effective_rank(torch.ones(4, 3))
    with pytest.raises(ValueError, match="expected .N, D."):
        effective_rank(torch.ones(1, 3))


# the paper's probe


def test_one_step_of_the_sgd_probe_is_the_one_written_by_hand(data):
    (x, y), seed = data["train"], 3
    got = sgd_probe(**data, epochs=1, lr=0.5, batch=len(y), seed=seed)
    weight = 0.01 * torch.randn(4, x.shape[1], generator=rng_for(seed, "sgd-probe"))
    residual = (x @ weight.T).softmax(1) - nn.functional.one_hot(y, 4)
    weight, bias = weight - 0.5 * residual.T @ x / len(y), -0.5 * residual.mean(0)
    tx, ty = data["test"]
    assert got.test == pytest.approx(float(((tx @ weight.T + bias).argmax(1) == ty).double().mean()))


def test_the_sgd_probe_reaches_the_convex_solution_and_its_seed_decides_the_rest(data):
    best = linear_probe(**data)
    first, again, other = (sgd_probe(**data, epochs=10, lr=0.1, seed=seed) for seed in (0, 0, 1))
    assert first == again and abs(first.test - best.test) < 0.03 and abs(other.test - best.test) < 0.03
    at_thirty = sgd_probe(**data, epochs=2)
    assert first != at_thirty and at_thirty.choice == 2


def test_the_sgd_probe_checks_its_shapes(data):
    with pytest.raises(ValueError, match="splits have features of different widths"):
        sgd_probe(data["train"], (data["val"][0][:, :3], data["val"][1]), data["test"])


def test_the_sgd_probe_learns_from_the_features_of_every_epoch(data):
    x, y = data["train"]
    asked = []

    def of_epoch(epoch):
        asked.append(epoch)
        return x if epoch == 0 else -x, y

    one = sgd_probe(of_epoch, data["val"], data["test"], epochs=6, lr=0.1)
    assert asked == [0, 1, 2, 3, 4, 5]
    assert one != sgd_probe(**data, epochs=6, lr=0.1) == sgd_probe(lambda _: (x, y), data["val"], data["test"], epochs=6, lr=0.1)
    negative = {split: (-x, y) for split, (x, y) in data.items() if split != "train"}
    assert one.test < 0.3 < 0.6 < sgd_probe(of_epoch, **negative, epochs=6, lr=0.1).test  # five of six epochs taught that
    with pytest.raises(ValueError, match="train has features that are not finite"):
        sgd_probe(lambda _: (x / 0, y), data["val"], data["test"])


def test_top_five_is_counted_and_the_best_epoch_has_the_lowest_validation_loss():
    train, val, test = (clouds(n, classes=8, stream=name) for name, n in {"train": 400, "val": 200, "test": 300}.items())
    wrong = train[0], (train[1] + 4) % 8
    found = sgd_probe(lambda epoch: train if epoch < 2 else wrong, val, test, epochs=6, lr=0.5, batch=50)
    short = sgd_probe(train, val, test, epochs=1, lr=0.5, batch=400, seed=1)
    assert found.best.choice in (1, 2) and found.choice == found.top5.choice == 6
    assert found.best.test > 0.5 > 0.2 > found.test and found.best.val > found.val
    weight = 0.01 * torch.randn(8, 6, generator=rng_for(1, "sgd-probe"))  # one step of `short`, by hand
    residual = (train[0] @ weight.T).softmax(1) - nn.functional.one_hot(train[1], 8)
    scores = test[0] @ (weight - 0.5 * residual.T @ train[0] / 400).T - 0.5 * residual.mean(0)
    higher = (scores > scores.gather(1, test[1][:, None])).sum(1)
    assert short.top5.test == pytest.approx(float((higher < 5).double().mean())) and short.test < short.top5.test < 1
    assert short.best == ProbeResult(short.val, short.test, short.choice)


def test_top_five_of_fewer_classes_is_all(data):
    assert sgd_probe(**data, epochs=1, lr=0.1).top5.test == 1


@pytest.mark.parametrize("epochs", [0, -3])
def test_the_sgd_probe_needs_an_epoch(data, epochs):
    with pytest.raises(ValueError, match=f"epochs={epochs} must be at least 1"):
        sgd_probe(**data, epochs=epochs)


def test_augmented_features_are_those_of_images_augmented_anew_in_every_epoch():
    encoder, images = Noisy(), ImageSet(byte_images(), torch.arange(10) % 2, ("a", "b"))
    crops, before = AUGMENTATIONS["no_color"], modes(encoder)
    of_epoch = augmented_features(encoder, images, crops, seed=3)
    found, labels = of_epoch(2)
    assert found.shape == (10, 5) and torch.equal(labels, images.labels) and modes(encoder) == before
    assert torch.equal(of_epoch(2)[0], found) and not torch.allclose(of_epoch(1)[0], found)
    assert not torch.allclose(augmented_features(encoder, images, crops, seed=4)(2)[0], found)
    by_hand = crops(images.floats(), rng_for(3, "sgd-probe/augment", epoch=2))
    torch.testing.assert_close(found, features(encoder, by_hand))
    for batch in (1, 3, 10):  # without augmentation, in the order of the images
        plain, _ = augmented_features(encoder, images, AUGMENTATIONS["none"], batch=batch)(0)
        torch.testing.assert_close(plain, features(encoder, images))


def test_parts_of_a_set_have_crops_of_their_own():
    same = ImageSet(byte_images(1).expand(6, -1, -1, -1).contiguous(), torch.zeros(6).long(), ("a",))
    found, _ = augmented_features(nn.Flatten(), same, AUGMENTATIONS["no_color"], batch=2)(0)
    assert len(found.unique(dim=0)) == 6


# layers, transfer, geometry


@pytest.fixture(scope="module")
def tiny():
    "Digits, a few of each, and an encoder with a head that keeps two numbers."
    digits = load_digits()
    parts = [part.subset(slice(0, n)) for part, n in ((digits.train, 200), (digits.val, 60), (digits.test, 60))]
    pool = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    return Splits(*parts), pool, nn.Sequential(pool, nn.Linear(16, 2))


def test_layers_are_judged_under_their_names(tiny):
    splits, encoder, head = tiny
    frame = judge_layers({"": encoder, "head": head}, splits, "digits", shares={})
    assert frame.probe.unique().tolist() == ["linear", "knn", "head_linear", "head_knn"]
    plain = judge(encoder, splits, "digits", shares={})
    pd.testing.assert_frame_equal(frame[:4], plain)
    accuracy = frame[frame.split == "test"].set_index("probe").accuracy
    assert accuracy.linear > accuracy.head_linear + 0.1  # two numbers cannot hold what sixteen do


def test_transfer_is_judge_on_every_set_and_names_the_one_that_does_not_fit(tiny):
    splits, encoder, _ = tiny
    other = Splits(*(ImageSet(255 - part.images, part.labels, part.class_names)
                     for part in (splits.train, splits.val, splits.test)))
    frame = transfer(encoder, {"digits": splits, "negatives": other})
    assert frame.dataset.unique().tolist() == ["digits", "negatives"] and len(frame) == 8
    assert frame[frame.dataset == "digits"].accuracy.tolist() == judge(encoder, splits, "digits", shares={}).accuracy.tolist()
    with pytest.raises(ValueError, match=r"^colour: images of shape \(3, 32, 32\) cannot be judged"):
        colour = Splits(*(ImageSet(part.images.expand(-1, 3, -1, -1), part.labels, part.class_names)
                          for part in (splits.train, splits.val, splits.test)))
        transfer(nn.Sequential(nn.Conv2d(1, 2, 8, 8), nn.Flatten()), {"colour": colour})


def test_geometry_of_known_features():
    views = draw(200, 1, 1, 2, 2, stream="views").sigmoid().expand(-1, 2, -1, -1, -1)  # two equal views each
    found = geometry(nn.Flatten(), views)
    rows = views[:, 0].flatten(1)
    assert found["alignment"] == 0 and found["effective_rank"] == pytest.approx(effective_rank(rows.repeat_interleave(2, 0)))
    assert found["uniformity"] == pytest.approx(alignment_uniformity(views.flatten(2))[1])
    with pytest.raises(ValueError, match="expected .B, V, C, H, W."):
        geometry(nn.Flatten(), views[:, 0])


@pytest.mark.parametrize("probe", [linear_probe, knn, sgd_probe])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_features_that_are_not_finite_and_labels_of_another_type_are_refused(probe, split):
    def data(change):
        parts = {name: (torch.rand(12, 3, generator=rng_for(0, name)), torch.arange(12) % 3) for name in ("train", "val", "test")}
        return parts | {split: change(*parts[split])}

    with pytest.raises(ValueError, match=f"{split} has features that are not finite"):
        probe(**data(lambda x, y: (x.masked_fill(torch.eye(12, 3).bool(), math.nan), y)))
    with pytest.raises(ValueError, match=f"{split} has labels of type torch.int32"):
        probe(**data(lambda x, y: (x, y.int())))
