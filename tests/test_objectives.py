"""Losses of several views and the methods built on them: points of known value, a second derivation, symmetry, gradients."""
import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mlvgm_mi.encoders import small_resnet
from mlvgm_mi.latents import rng_for
from mlvgm_mi.methods import BYOL, OBJECTIVES, EMI, BarlowTwins, Contrast, Objective, Projected, SimSiam, SwAV, encode_views
from mlvgm_mi.objectives import cacr, check_projections, emi, emi_series, gathered, mv_dhel, mv_infonce, mv_infonce_cross, supcon
from mlvgm_mi.presets import PAPER


def draw(*shape, stream="projections"):
    return torch.randn(*shape, generator=rng_for(0, stream), dtype=torch.float64)


def unit(projections):
    return [[[x / math.sqrt(sum(y * y for y in view)) for x in view] for view in views] for views in projections.tolist()]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def softmax(scores):
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


# second derivations, written out with loops


def reference_mv_infonce(projections, tau, same_view):
    u, loss = unit(projections), 0.0
    n, v = projections.shape[:2]
    for i in range(n):
        above = below = 0.0
        for view in range(v):
            above += sum(math.exp(dot(u[i][view], u[i][other]) / tau) for other in range(v) if other != view)
            for j, m in itertools.product(range(n), range(v)):
                if (j, m) != (i, view) if same_view else m != view:
                    below += math.exp(dot(u[i][view], u[j][m]) / tau)
        loss -= math.log(above / below) / n
    return loss


def reference_mv_dhel(projections, tau):
    u, loss = unit(projections), 0.0
    n, v = projections.shape[:2]
    for i in range(n):
        above = sum(math.exp(dot(u[i][a], u[i][b]) / tau) for a, b in itertools.combinations(range(v), 2))
        below = math.prod(sum(math.exp(dot(u[i][a], u[j][a]) / tau) for j in range(n) if j != i) for a in range(v))
        loss -= math.log(above / below) / n
    return loss


def reference_cacr(projections, attraction=1.0, repulsion=1.0, sharpness=(1.0, 0.9)):
    u, pull, push = unit(projections), 0.0, 0.0
    n, v = projections.shape[:2]
    far = lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b))  # noqa: E731
    for i, x in itertools.product(range(n), range(v)):
        positives = [far(u[i][x], u[i][k]) for k in range(v) if k != x]
        pull += dot(softmax([sharpness[0] * d for d in positives]), positives) / (n * v)
        for y in range(v):
            if y != x:
                negatives = [far(u[i][x], u[j][y]) for j in range(n) if j != i]
                push += dot(softmax([-sharpness[1] * d for d in negatives]), negatives) / (n * v * (v - 1))
    return attraction * pull - repulsion * push


def reference_pairs(projections, tau, partner_below):
    "SimCLR, or DCL without the partner in the denominator."
    u, losses = unit(projections), []
    n, v = projections.shape[:2]
    for a, b in itertools.combinations(range(v), 2):
        both = [u[i][view] for view in (a, b) for i in range(n)]
        for k in range(2 * n):
            partner = (k + n) % (2 * n)
            others = [j for j in range(2 * n) if j != k and (partner_below or j != partner)]
            below = sum(math.exp(dot(both[k], both[j]) / tau) for j in others)
            losses.append(math.log(below) - dot(both[k], both[partner]) / tau)
    return sum(losses) / len(losses)


def reference_supcon(projections, labels, tau, factor):
    u = [view for views in unit(projections) for view in views]
    classes = [label for label in labels for _ in range(projections.shape[1])]
    loss = 0.0
    for a in range(len(u)):
        below = sum(math.exp(dot(u[a], u[b]) / tau) for b in range(len(u)) if b != a)
        positives = [b for b in range(len(u)) if b != a and classes[a] == classes[b]]
        loss -= sum(math.log(math.exp(dot(u[a], u[b]) / tau) / below) for b in positives) / len(positives) / len(u)
    return factor * loss


def reference_emi(projections, ridge):
    "The ratio of determinants, not the canonical correlations."
    pairs, values = list(itertools.combinations(range(projections.shape[1]), 2)), []
    for a, b in pairs:
        moments = np.corrcoef(np.concatenate([projections[:, a], projections[:, b]], 1), rowvar=False)
        moments = moments + ridge * np.eye(len(moments))
        d = len(moments) // 2
        parts = (moments[:d, :d], moments[d:, d:], moments)
        first, second, both = (np.linalg.slogdet(part)[1] for part in parts)
        values.append((first + second - both) / 2)
    return -sum(values) / len(values)


def reference_emi_series(projections, terms, ridge):
    "The squared canonical correlations as eigenvalues of a product that is not symmetric."
    pairs, values = list(itertools.combinations(range(projections.shape[1]), 2)), []
    for a, b in pairs:
        moments = np.corrcoef(np.concatenate([projections[:, a], projections[:, b]], 1), rowvar=False)
        d = len(moments) // 2
        ridged = moments + ridge * np.eye(2 * d)
        left = np.linalg.inv(ridged[:d, :d]) @ moments[:d, d:]
        squares = np.linalg.eigvals(left @ np.linalg.inv(ridged[d:, d:]) @ moments[d:, :d]).real
        values.append(sum((squares**m).sum() / m for m in range(1, terms + 1)) / 2)
    return -sum(values) / len(values)


def reference_barlow_twins(projections, weight):
    "The library's floor of 1e-5 under the variances."
    z, values = projections.numpy(), []
    for a, b in itertools.combinations(range(z.shape[1]), 2):
        first, second = ((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (z[:, a], z[:, b]))
        correlation = first.T @ second / len(z)
        diagonal = np.diag(correlation)
        values.append(((1 - diagonal) ** 2).sum() + weight * ((correlation**2).sum() - (diagonal**2).sum()))
    return sum(values) / len(values)


def reference_vicreg(projections):
    "The library's floor of 1e-4 under the variances; spread is a mean of both views, covariance a sum, as published."
    z, values = projections.numpy(), []
    for a, b in itertools.combinations(range(z.shape[1]), 2):
        moments = [np.cov(z[:, view], rowvar=False) for view in (a, b)]
        spread = [np.maximum(0, 1 - np.sqrt(np.diag(m) + 1e-4)).mean() for m in moments]
        together = [((m**2).sum() - (np.diag(m) ** 2).sum()) / len(m) for m in moments]
        values.append(25 * ((z[:, a] - z[:, b]) ** 2).mean() + 25 * sum(spread) / 2 + sum(together))
    return sum(values) / len(values)


def codes(scores, epsilon=0.05):
    "Three rounds of balancing: prototypes get equal shares of the batch, then every vector one assignment."
    shares = [[math.exp(s / epsilon) for s in row] for row in scores]
    for _ in range(3):
        totals = [sum(column) for column in zip(*shares)]
        shares = [[s / total for s, total in zip(row, totals)] for row in shares]
        shares = [[s / sum(row) for s in row] for row in shares]
    return shares


def reference_swav(projections, prototypes, tau, assigned=None):
    "Codes of `assigned`, by default of the same projections."
    n, v = projections.shape[:2]
    scores, known = ([[[dot(vector, c) for c in prototypes] for vector in views] for views in unit(z)]
                     for z in (projections, projections if assigned is None else assigned))
    loss = 0.0
    for a, b in itertools.permutations(range(v), 2):
        for i, code in enumerate(codes([views[a] for views in known])):
            guess = softmax([s / tau for s in scores[i][b]])
            loss -= sum(q * math.log(p) for q, p in zip(code, guess)) / (n * v * (v - 1))
    return loss


def reference_prediction(predictions, targets):
    "Minus the cosine of each view's prediction with each other view's target."
    p, t = unit(predictions), unit(targets)
    pairs = list(itertools.permutations(range(predictions.shape[1]), 2))
    return -sum(dot(p[i][a], t[i][b]) for i in range(len(p)) for a, b in pairs) / (len(p) * len(pairs))


LABELS = [0, 1, 0, 2, 1, 2, 0, 0, 1, 2, 2, 1]
CASES = {
    "mv_infonce": (partial(mv_infonce, temperature=0.3), partial(reference_mv_infonce, tau=0.3, same_view=True)),
    "mv_infonce_cross": (partial(mv_infonce_cross, temperature=0.3), partial(reference_mv_infonce, tau=0.3, same_view=False)),
    "mv_dhel": (partial(mv_dhel, temperature=0.3), partial(reference_mv_dhel, tau=0.3)),
    "cacr": (cacr, reference_cacr),
    "cacr-sharp": (
        partial(cacr, attraction=0.5, repulsion=2.0, sharpness=(3.0, 2.0)),
        partial(reference_cacr, attraction=0.5, repulsion=2.0, sharpness=(3.0, 2.0)),
    ),
    "supcon": (partial(supcon, temperature=0.3), partial(reference_supcon, labels=range(12), tau=0.3, factor=1.0)),
    "supcon-labels": (
        partial(supcon, labels=torch.tensor(LABELS), temperature=0.3),
        partial(reference_supcon, labels=LABELS, tau=0.3, factor=1.0),
    ),
    "supcon-base": (
        partial(supcon, temperature=0.1, base_temperature=0.07),
        partial(reference_supcon, labels=range(12), tau=0.1, factor=0.1 / 0.07),
    ),
    "emi": (partial(emi, ridge=0.0), partial(reference_emi, ridge=0.0)),
    "emi-ridge": (partial(emi, ridge=0.1), partial(reference_emi, ridge=0.1)),
    "emi_series": (partial(emi_series, terms=3, ridge=0.1), partial(reference_emi_series, terms=3, ridge=0.1)),
}
every_loss = pytest.mark.parametrize("loss, reference", CASES.values(), ids=CASES)


@every_loss
@pytest.mark.parametrize("views", [2, 4])
def test_losses_are_their_formulas(loss, reference, views):
    projections = draw(12, views, 3)
    assert loss(projections).item() == pytest.approx(reference(projections), rel=1e-10)


@every_loss
def test_losses_do_not_know_the_order_of_instances_or_views(loss, reference):
    projections, instances = draw(12, 3, 3), torch.randperm(12, generator=rng_for(0, "order"))
    value = loss(projections)
    torch.testing.assert_close(loss(projections[:, [2, 0, 1]]), value)
    if "labels" not in getattr(loss, "keywords", {}):
        torch.testing.assert_close(loss(projections[instances]), value)
        strangers = torch.stack([projections[:, 0], projections[:, 1].roll(1, 0), projections[:, 2]], 1)
        assert not torch.isclose(loss(strangers), value)


@every_loss
def test_gradients(loss, reference):
    assert torch.autograd.gradcheck(loss, draw(12, 3, 3).requires_grad_())


@every_loss
@pytest.mark.parametrize("shape, message", [((1, 2, 3), "B=1"), ((12, 1, 3), "V=1"), ((12, 3), r"\(12, 3\).*\(B, V, D\)")])
def test_batches_of_one_and_wrong_shapes_are_named(loss, reference, shape, message):
    with pytest.raises(ValueError, match=message):
        loss(draw(*shape))


@pytest.mark.parametrize("loss", [mv_infonce, mv_infonce_cross, mv_dhel, supcon])
def test_temperatures_must_be_positive(loss):
    with pytest.raises(ValueError, match="temperature=0"):
        loss(draw(4, 2, 3), temperature=0)


def test_labels_are_one_for_an_instance():
    with pytest.raises(ValueError, match=r"\(24,\), expected \(12,\)"):
        supcon(draw(12, 2, 3), torch.arange(24))
    with pytest.raises(ValueError, match="torch.int64"):
        check_projections(torch.zeros(4, 2, 3, dtype=torch.int64))


# values known on paper


@pytest.mark.parametrize("b, v", [(2, 2), (9, 2), (5, 4)])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_all_vectors_equal(b, v, tau):
    equal = torch.ones(b, v, 8, dtype=torch.float64)
    known = {
        mv_infonce: math.log((b * v - 1) / (v - 1)),
        mv_infonce_cross: math.log(b),
        mv_dhel: v * math.log(b - 1) + (v - 1) / tau - math.log(v * (v - 1) / 2),
        supcon: math.log(b * v - 1),
    }
    for loss, value in known.items():
        assert loss(equal, temperature=tau).item() == pytest.approx(value, rel=1e-10, abs=1e-12), loss.__name__
    assert cacr(equal).item() == pytest.approx(0, abs=1e-12)


def test_two_instances_at_the_ends_of_a_diameter():
    ends = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)[:, None].repeat(1, 3, 1)
    e, f = math.exp(1 / 0.5), math.exp(-1 / 0.5)
    assert mv_infonce(ends, 0.5).item() == pytest.approx(math.log((2 * e + 3 * f) / (2 * e)))
    assert mv_infonce_cross(ends, 0.5).item() == pytest.approx(math.log((2 * e + 2 * f) / (2 * e)))
    assert mv_dhel(ends, 0.5).item() == pytest.approx(-math.log(3) - 4 / 0.5)
    assert cacr(ends).item() == pytest.approx(-4)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_information_of_correlations_made_exactly(rho):
    "Columns orthonormal in the sample: no sampling error at all."
    basis = torch.linalg.qr(torch.cat([torch.ones(40, 1, dtype=torch.float64), draw(40, 6)], 1))[0][:, 1:]
    pair = torch.stack([basis[:, :3], rho * basis[:, :3] + math.sqrt(1 - rho**2) * basis[:, 3:]], 1)
    truth = -1.5 * math.log(1 - rho**2)
    assert emi(pair, ridge=0.0).item() == pytest.approx(-truth, abs=1e-9)
    assert emi_series(pair, 2, ridge=0.0).item() == pytest.approx(-1.5 * (rho**2 + rho**4 / 2), abs=1e-9)
    assert emi_series(pair, 500, ridge=0.0).item() == pytest.approx(-truth, abs=1e-9)


def test_information_of_equal_views_is_bounded_by_the_ridge_or_the_series():
    equal = draw(40, 1, 3).repeat(1, 2, 1)
    assert emi_series(equal, 4, ridge=0.0).item() == pytest.approx(-1.5 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert -10 * 1.5 < emi(equal, ridge=1e-3).item() < -5  # log(1 / (2 ridge)) / 2 nats for each of three
    with pytest.raises(ValueError, match="terms=0"):
        emi_series(equal, 0)


def test_second_moments_need_a_batch_larger_than_both_views():
    with pytest.raises(ValueError, match="B=6.*D=3.*B > 2 D"):
        emi(draw(6, 2, 3))


@pytest.mark.parametrize("loss", [emi, emi_series])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_coordinate_informs_of_nothing_and_is_pulled_nowhere(loss, dtype):
    one_view, every_view = draw(2, 24, 3, 4).to(dtype)
    one_view[:, 1, 2] = every_view[:, :, 2] = 0.25  # a mean without rounding: the variance is zero
    for projections in (one_view, every_view):
        loss(projections.requires_grad_()).backward()
        assert projections.grad.isfinite().all()
    assert one_view.grad[:, 1, 2].abs().max() == every_view.grad[:, :, 2].abs().max() == 0
    others = every_view[..., [0, 1, 3]].detach().requires_grad_()
    loss(others).backward()
    torch.testing.assert_close(loss(every_view), loss(others))
    torch.testing.assert_close(every_view.grad[..., [0, 1, 3]], others.grad, rtol=1e-4, atol=1e-6)


def test_log_sum_form_survives_single_precision():
    many = torch.ones(256, 8, 4)
    assert mv_dhel(many, 0.1).item() == pytest.approx(8 * math.log(255) + 70 - math.log(28), rel=1e-5)


# methods

OPTIONS = {"emi": dict(projection=3)}
every_method = pytest.mark.parametrize("name", OBJECTIVES)


def make(name, features=16, seed=0):
    return OBJECTIVES[name](features, seed=seed, **OPTIONS.get(name, {}))


def perturb(module):
    rng = rng_for(0, "perturbed")
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype)


def ready(objective):
    "In double precision, with a target, if any, that is not the head it was copied from."
    objective.double().attach(nn.Identity())
    if isinstance(objective, BYOL):
        perturb(objective.target)
    return objective


def loss_of(objective, features, slow=None):
    "Also for an objective with a target, whose encoder sees something else."
    if isinstance(objective, BYOL):
        return objective(features, features.sin() if slow is None else slow)
    return objective(features)


def through(head, vectors):
    "A head on `(B, V, D)` layer by layer; the moments of its norms are those of all `B * V` vectors."
    flat = vectors.flatten(0, 1)
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            flat = flat @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        elif isinstance(layer, nn.BatchNorm1d):
            flat = (flat - flat.mean(0)) / ((flat - flat.mean(0)).square().mean(0) + layer.eps).sqrt()
            flat = flat * layer.weight + layer.bias if layer.affine else flat
        else:
            flat = flat * (flat > 0)
    return flat.detach().unflatten(0, vectors.shape[:2])


def swav_by_hand(swav, projections, assigned=None):
    return reference_swav(projections, swav.prototypes.heads[0].weight.tolist(), 0.2, assigned)


METHODS = {  # options other than the defaults; the loss of projections, and for BYOL of the target encoder's features
    "simclr": (dict(projection=5, temperature=0.3), lambda o, z, slow: reference_pairs(z, 0.3, partner_below=True)),
    "dcl": (dict(projection=5, temperature=0.3), lambda o, z, slow: reference_pairs(z, 0.3, partner_below=False)),
    "mvinfonce": (dict(projection=5, temperature=0.3), lambda o, z, slow: reference_mv_infonce(z, 0.3, same_view=True)),
    "mvdhel": (dict(projection=5, temperature=0.3), lambda o, z, slow: reference_mv_dhel(z, 0.3)),
    "supcon": (dict(projection=5, temperature=0.3), lambda o, z, slow: reference_supcon(z, range(len(z)), 0.3, factor=1.0)),
    "cacr": (dict(projection=5), lambda o, z, slow: reference_cacr(z)),
    "barlowtwins": (dict(projection=5, weight=0.02), lambda o, z, slow: reference_barlow_twins(z, 0.02)),
    "vicreg": (dict(projection=5), lambda o, z, slow: reference_vicreg(z)),
    "emi": (dict(projection=3), lambda o, z, slow: reference_emi(z, ridge=1e-3)),
    "swav": (dict(projection=5, prototypes=7, temperature=0.2), lambda o, z, slow: swav_by_hand(o, z)),
    "simsiam": ({}, lambda o, z, slow: reference_prediction(through(o.predictor, z), z)),
    "byol": ({}, lambda o, z, slow: reference_prediction(through(o.predictor, z), through(o.target["head"], slow))),
}


@every_method
@pytest.mark.parametrize("views", [2, 3])
def test_methods_are_their_formulas_behind_their_heads(name, views):
    options, by_hand = METHODS[name]
    objective, features, slow = ready(OBJECTIVES[name](4, **options)), draw(7, views, 4), draw(7, views, 4, stream="slow")
    expected = by_hand(objective, through(objective.head, features), slow)
    assert loss_of(objective, features, slow).item() == pytest.approx(expected, rel=1e-10)


def test_byol_predicts_what_target_encoder_and_target_head_make_of_the_other_views():
    encoder, byol, views = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double(), BYOL(4).double(), draw(5, 3, 1, 4, 4)
    byol.attach(encoder)
    perturb(byol.target)
    features, slow = (views.flatten(2) @ linear.weight.T + linear.bias for linear in (encoder[1], byol.target["encoder"][1]))
    predictions = through(byol.predictor, through(byol.head, features))
    expected = reference_prediction(predictions, through(byol.target["head"], slow))
    assert byol.step(encoder, views).item() == pytest.approx(expected, rel=1e-10)


def test_byols_two_networks_see_the_same_views():
    byol = ready(BYOL(4))
    with pytest.raises(ValueError, match=r"slow has shape \(1, 2, 4\), expected \(5, 2, 4\)"):
        byol(draw(5, 2, 4), draw(1, 2, 4))


def test_methods_where_every_vector_is_the_same():
    b, v, d, tau = 5, 3, 4, 0.3
    known = {
        "simclr": math.log(2 * b - 1), "dcl": math.log(2 * b - 2), "mvinfonce": math.log((b * v - 1) / (v - 1)),
        "mvdhel": v * math.log(b - 1) + (v - 1) / tau - math.log(v * (v - 1) / 2), "supcon": math.log(b * v - 1),
        "cacr": 0, "barlowtwins": d, "vicreg": 25 * (1 - 0.01), "emi": 0, "swav": math.log(7), "simsiam": -1, "byol": -1,
    }
    for name in OBJECTIVES:
        objective = OBJECTIVES[name](d, **METHODS[name][0] | (dict(projection=d) if name == "swav" else {}))
        objective.head = objective.predictor = nn.Identity()
        if name == "swav":
            nn.init.ones_(objective.prototypes.heads[0].weight)  # and prototypes too
        objective.double().attach(nn.Identity())
        equal = torch.ones(b if name != "emi" else 9, v, d, dtype=torch.float64)
        assert loss_of(objective, equal, equal).item() == pytest.approx(known[name], abs=1e-9), name


@every_method
@pytest.mark.parametrize("views", [2, 4])
def test_methods_do_not_know_the_order_of_views_or_instances(name, views):
    features, order = draw(24, views, 16), torch.randperm(24, generator=rng_for(0, "order"))
    value = loss_of(ready(make(name)), features)
    assert value.ndim == 0 and value.isfinite()
    torch.testing.assert_close(loss_of(ready(make(name)), features.flip(1)), value)
    torch.testing.assert_close(loss_of(ready(make(name)), features[order]), value)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"swav", "simsiam"}))
def test_gradients_through_heads(name):
    objective, slow = ready(OBJECTIVES[name](4, **METHODS[name][0])), draw(7, 3, 4, stream="slow")
    assert torch.autograd.gradcheck(lambda features: loss_of(objective, features, slow), draw(7, 3, 4).requires_grad_())


@pytest.mark.parametrize("name", ["swav", "simsiam"])
def test_gradients_through_heads_see_targets_that_stand_still(name):
    "Central differences of the second derivation, whose targets stay those of the point."
    objective, features = ready(OBJECTIVES[name](4, **METHODS[name][0])), draw(5, 3, 4).requires_grad_()
    objective(features).backward()
    targets = through(objective.head, features)

    def value(moved):
        z = through(objective.head, moved)
        if name == "swav":
            return swav_by_hand(objective, z, targets)
        return reference_prediction(through(objective.predictor, z), targets)

    steps = 1e-6 * torch.eye(features.numel(), dtype=torch.float64).view(-1, *features.shape)
    numeric = torch.tensor([(value(features + step) - value(features - step)) / 2e-6 for step in steps], dtype=torch.float64)
    torch.testing.assert_close(features.grad.flatten(), numeric, rtol=1e-5, atol=1e-8)


@every_method
@pytest.mark.parametrize("shape, message", [((1, 2, 16), "B=1"), ((8, 1, 16), "V=1"), ((8, 16), r"\(B, V, D\)")])
def test_methods_name_bad_batches(name, shape, message):
    with pytest.raises(ValueError, match=message):
        loss_of(ready(make(name)), draw(*shape))


@every_method
def test_first_weights_are_those_of_the_seed_and_nothing_else_moves(name):
    before = torch.random.get_rng_state()
    a, b, other = (make(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    matrices = [key for key, value in a.items() if value.ndim > 1]
    assert matrices and all(torch.equal(a[key], b[key]) and not torch.equal(a[key], other[key]) for key in matrices)


@pytest.mark.parametrize("name", ["simclr", "dcl", "mvinfonce", "mvdhel", "supcon", "swav"])
def test_methods_refuse_a_temperature_of_zero(name):
    with pytest.raises(ValueError, match="temperature=0"):
        OBJECTIVES[name](16, temperature=0)


def test_base_classes_say_what_is_missing():
    for Base, method in ((Objective, "forward"), (partial(Projected, nn.Identity), "compare"), (partial(Contrast, 16), "compare")):
        with pytest.raises(NotImplementedError, match=f"must define {method}"):
            Base()(draw(8, 2, 16).float())


def test_supcon_takes_labels_where_there_are_some():
    features, labels = draw(12, 2, 16), torch.tensor(LABELS)
    objective = make("supcon").double()
    expected = supcon(objective.project(features), labels)
    torch.testing.assert_close(objective(features, labels), expected)
    assert not torch.isclose(objective(features), expected)


def test_supcon_of_two_views_is_simclr():
    features = draw(12, 2, 16)
    torch.testing.assert_close(make("supcon").double()(features), make("simclr").double()(features))


def test_targets_carry_no_gradient():
    features = draw(8, 2, 16).requires_grad_()
    simsiam = SimSiam(16).double()
    simsiam.predictor = nn.Linear(16, 16).double()
    nn.init.zeros_(simsiam.predictor.weight)
    nn.init.ones_(simsiam.predictor.bias)
    simsiam(features).backward()  # a prediction that features have no part in: only the targets could pull
    assert features.grad.abs().max() == 0


def test_byols_target_is_an_average_over_time_and_learns_nothing_itself():
    encoder, byol = small_resnet(width=4), BYOL(32, momentum=0.9)
    byol.attach(encoder)
    pairs = [(encoder.body[0].weight, byol.target["encoder"].body[0].weight),
             (byol.head.layers[0].weight, byol.target["head"].layers[0].weight)]
    expected = [slow.clone() for _, slow in pairs]
    byol.step(encoder, torch.rand(4, 2, 1, 16, 16)).backward()
    assert all(p.grad is None for p in byol.target.parameters())
    for step in range(3):
        with torch.no_grad():
            for fast, _ in pairs:
                fast += 1
        byol.after_step(encoder, step)
        expected = [0.9 * mean + 0.1 * fast.detach() for mean, (fast, _) in zip(expected, pairs)]
    torch.testing.assert_close([slow for _, slow in pairs], expected)
    assert byol.target.training and not any(p.requires_grad for p in byol.target.parameters())
    with pytest.raises(ValueError, match="momentum=1.5"):
        BYOL(32, momentum=1.5)


def test_swavs_prototypes_stay_on_the_sphere_and_have_no_bias():
    swav = SwAV(16, prototypes=7)
    layer = swav.prototypes.heads[0]
    assert layer.bias is None and layer.weight.shape[0] == 7
    with torch.no_grad():
        layer.weight *= 3
    swav.after_step(None, 1)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(7))


def test_heads_have_the_papers_sizes_at_the_papers_scale():
    heads = {"simsiam": [2048] * 3, "byol": [8192, 2048], "vicreg": [8192] * 3, "barlowtwins": [8192] * 3}
    for name, sizes in heads.items():
        small = OBJECTIVES[name](32)
        assert [m.out_features * 64 for m in small.head.modules() if isinstance(m, nn.Linear)] == sizes
    assert [m.out_features * 64 for m in SimSiam(32).predictor.modules() if isinstance(m, nn.Linear)] == [512, 2048]


def test_barlow_twins_of_orthogonal_coordinates():
    "Views that agree, coordinates all the same: every off-diagonal correlation is one."
    same = draw(16, 1, 1).repeat(1, 2, 5)
    twins = BarlowTwins(16, weight=0.01)
    assert twins.compare(same).item() == pytest.approx(0.01 * 20, rel=1e-4)


def test_alone_nothing_is_gathered():
    projections = draw(4, 2, 3)
    assert gathered(projections) is projections


def test_emi_takes_the_series_as_its_loss():
    features = draw(24, 2, 16)
    series = EMI(16, projection=3, loss=partial(emi_series, terms=2)).double()
    torch.testing.assert_close(series(features), emi_series(series.project(features), 2))


# the paper's presets: the published losses at the published rates, and ours at the presets'


def published_simclr(objective, encoder, views):
    "SupCon at temperature 0.1 with its base temperature left at 0.07."
    u = nn.functional.normalize(objective.head(encode_views(encoder, views).flatten(0, 1)), dim=1)
    scores = (u @ u.T / 0.1).fill_diagonal_(-math.inf)
    rows = torch.arange(len(u))
    return -(0.1 / 0.07) * scores.log_softmax(1)[rows, rows ^ 1].mean()


def swapped_cosines(objective, encoder, views, targets):
    "Of each view's prediction with the other view's target, `(B, 2)`."
    predictions = objective.predictor(objective.head(encode_views(encoder, views).flatten(0, 1)))
    pairs = (vectors.unflatten(0, views.shape[:2]) for vectors in (predictions, targets.detach()))
    return nn.functional.cosine_similarity(next(pairs), next(pairs).flip(1), dim=2)


def published_simsiam(objective, encoder, views):
    "Minus the mean of both directions."
    targets = objective.head(encode_views(encoder, views).flatten(0, 1))
    return -swapped_cosines(objective, encoder, views, targets).mean(0).sum() / 2


def published_byol(objective, encoder, views):
    "The squared distance of unit vectors, summed over both directions."
    targets = objective.target["head"](encode_views(objective.target["encoder"], views).flatten(0, 1))
    return (2 - 2 * swapped_cosines(objective, encoder, views, targets)).sum(1).mean()


PUBLISHED = {  # with the rate of the whole batch
    "simclr": (published_simclr, 0.03 * 224 / 256),
    "simsiam": (published_simsiam, 0.05 * 1024 / 256),
    "simsiam-stylegan2": (published_simsiam, 0.05 * 512 / 256),
    "byol": (published_byol, 0.05 * 512 / 256),
}


def weights_after_three_updates(name, loss, build_optimiser):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8)).double()
    nn.init.orthogonal_(encoder[1].weight, generator=rng_for(0, "encoder"))
    nn.init.zeros_(encoder[1].bias)
    objective = PAPER[name].build(8).double()
    objective.attach(encoder)
    both = nn.ModuleDict({"encoder": encoder, "objective": objective})
    optimiser = build_optimiser(list(both.parameters()))
    for step in range(3):
        optimiser.zero_grad()
        loss(objective, encoder, draw(6, 2, 1, 4, 4, stream=f"views/{step}")).backward()
        optimiser.step()
        objective.after_step(encoder, step + 1)
    return dict(both.named_parameters())


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_presets_take_the_steps_of_the_published_losses(name):
    loss, lr = PUBLISHED[name]

    def published(parameters):  # weight decay leaves biases and norms alone, as everywhere in this package
        groups = [{"params": p, "weight_decay": 1e-4 * (p.ndim > 1)} for p in parameters if p.requires_grad]
        return torch.optim.SGD(groups, lr, momentum=0.9)

    theirs = weights_after_three_updates(name, loss, published)
    ours = weights_after_three_updates(name, type(PAPER[name].build(8)).step, PAPER[name].config(10).build_optimiser)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_rescaled_preset_keeps_the_rest_and_is_for_sgd():
    preset = PAPER["simsiam"]
    twice = preset.loss_divided_by(2)
    assert (twice.lr, twice.weight_decay) == (2 * preset.lr, preset.weight_decay / 2)
    assert replace(twice, lr=preset.lr, weight_decay=preset.weight_decay) == preset
    with pytest.raises(ValueError, match="optimiser='adamw'"):
        replace(preset, optimiser="adamw").loss_divided_by(2)
    with pytest.raises(ValueError, match="factor=0"):
        preset.loss_divided_by(0)
