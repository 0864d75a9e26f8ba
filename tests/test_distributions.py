"Output distributions and soft normals against the reference (tests/golden), closed forms and exhaustive sums."
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlvgm_mi.distributions import OUTPUTS, BernoulliOutput, LogisticMixture, NormalOutput, SoftNormal
from mlvgm_mi.latents import rng_for

TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def gold():
    return load_file(Path(__file__).parent / "golden" / "nvae_cifar_io.safetensors")


def distance(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def parameters(name, sizes=(4, 4), dtype=torch.float32, scale=1.0):
    channels = OUTPUTS[name].channels(3, 2)
    return scale * torch.randn(2, channels, *sizes, generator=rng_for(0, name), dtype=dtype)


def test_mean_of_the_mixture(gold):
    assert distance(LogisticMixture(gold["out.logits"]).mean(), gold["out.mean"]) <= TOLERANCE


@pytest.mark.parametrize("temperature, key", [(1.0, "dist.sample"), (0.7, "dist.sample_t0.7")])
def test_sample_of_the_mixture(gold, temperature, key):
    mixture, uniforms = LogisticMixture(gold["out.logits"][:1]), (gold["dist.u_gumbel"], gold["dist.u_logistic"])
    draw = mixture.from_uniforms(*uniforms, temperature)
    assert distance(draw, gold[key]) <= TOLERANCE


def test_temperature_of_the_mixture_is_seen(gold):
    mixture, uniforms = LogisticMixture(gold["out.logits"][:1]), (gold["dist.u_gumbel"], gold["dist.u_logistic"])
    draw = mixture.from_uniforms(*uniforms, 1 / 0.7)
    assert distance(draw, gold["dist.sample_t0.7"]) > 20 * TOLERANCE


def test_sample_of_the_normal(gold):
    output = NormalOutput(gold["dist.normal_param"])
    assert distance(output.from_eps(gold["dist.normal_eps"]), gold["dist.normal_sample"]) <= TOLERANCE
    assert distance(output.mean(), output.from_eps(torch.zeros_like(gold["dist.normal_eps"]))) == 0


@pytest.mark.parametrize("name", OUTPUTS)
def test_samples_are_images_and_follow_the_rng(name):
    output = OUTPUTS[name](parameters(name))
    draws = [output.sample(rng_for(0, "pixels", step=step)) for step in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    for image in (*draws, output.mean()):
        assert image.shape == (2, 3, 4, 4) and image.min() >= 0 and image.max() <= 1
    assert output.log_prob(draws[0]).shape == (2,)


def test_masses_of_bernoulli_pixels_sum_to_one():
    output = BernoulliOutput(torch.randn(1, 1, 1, 3, generator=rng_for(0, "logits")).double())
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3)[:, None, None]
    assert math.isclose(sum(output.log_prob(image[None]).exp().item() for image in images), 1, abs_tol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])  # broad, sharp, and so sharp that sigmoids saturate
def test_masses_of_the_mixture_sum_to_one(scale):
    output = LogisticMixture(parameters("logistic-mixture", (1, 1), torch.float64, scale)[:1], bits=3)
    levels = torch.linspace(0, 1, 8, dtype=torch.float64)
    images = torch.cartesian_prod(levels, levels, levels)[:, :, None, None]
    masses = torch.stack([output.log_prob(image[None]) for image in images])
    assert masses.isfinite().all()
    assert math.isclose(masses.exp().sum(), 1, abs_tol=1e-9)


def test_masses_of_the_mixture_by_definition():
    output = LogisticMixture(parameters("logistic-mixture", (1, 1), torch.float64)[:1], bits=8)
    x = torch.tensor([0, 100, 255]) / 255
    expected = 0.0
    for m in range(2):
        mean, scale = output.means[0, :, m, 0, 0], output.log_scales[0, :, m, 0, 0].exp()
        c = output.coefficients[0, :, m, 0, 0]
        r, g, b = (2 * x - 1).tolist()
        centers = (mean[0], mean[1] + c[0] * r, mean[2] + c[1] * r + c[2] * g)
        cdf = [lambda v, k=k: torch.sigmoid((v - centers[k]) / scale[k]) for k in range(3)]
        mass = cdf[0](r + 1 / 255) * (cdf[1](g + 1 / 255) - cdf[1](g - 1 / 255)) * (1 - cdf[2](b - 1 / 255))
        expected += output.logits.softmax(1)[0, m, 0, 0] * mass
    found = output.log_prob(x.double()[None, :, None, None]).exp()
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)


def test_samples_of_the_mixture_have_its_masses():
    one = parameters("logistic-mixture", (1, 1))[:1]
    many = LogisticMixture(one.expand(20_000, -1, -1, -1), bits=1)
    draws = many.sample(rng_for(0, "pixels")).round().long()[:, :, 0, 0]
    found = torch.bincount(draws @ torch.tensor([4, 2, 1]), minlength=8) / len(draws)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)[:, :, None, None]
    # colours are chained by unrounded values in a draw and by rounded ones in a mass: red alone is comparable
    expected = torch.stack([LogisticMixture(one, bits=1).log_prob(c[None]) for c in corners]).exp().flatten()
    assert abs(found[4:].sum() - expected[4:].sum()) < 0.02


def test_log_prob_of_the_normal_is_a_density():
    output = NormalOutput(parameters("normal", (1, 1), torch.float64, 0.3)[:1])
    x = torch.linspace(-4, 5, 20_001).double()
    reds = torch.stack([x, *[output.mean()[0, k, 0, 0].expand(len(x)) for k in (1, 2)]], 1)[:, :, None, None]
    wide = NormalOutput(torch.cat([output.normal.mu] * 2, 1))
    wide.normal = SoftNormal(*(part.expand(len(x), -1, -1, -1) for part in (output.normal.mu, output.normal.sigma)))
    rest = -sum(output.normal.sigma[0, k, 0, 0].log() + 0.5 * math.log(2 * math.pi) for k in (1, 2))
    density = (wide.log_prob(reds) - rest).exp()
    assert math.isclose(torch.trapezoid(density, 2 * x), 1, abs_tol=1e-6)


def test_soft_normal_bounds():
    normal = SoftNormal.of(torch.tensor([1e9, 1e9, -1e9, -1e9])[None, [0, 2, 1, 3], None, None])
    assert normal.mu.flatten().tolist() == [5, -5]
    assert normal.sigma.flatten().tolist() == pytest.approx([math.exp(5) + 0.01, math.exp(-5) + 0.01])
    assert SoftNormal.of(torch.zeros(1, 2, 1, 1), 0.5).sigma.item() == pytest.approx(0.505)


def test_soft_normal_divergence():
    p, q = (SoftNormal.of(torch.randn(1, 8, 2, 2, generator=rng_for(0, name)).double()) for name in "pq")
    z = q.at(torch.randn(200_000, 4, 2, 2, generator=rng_for(0, "z"), dtype=torch.float64))
    sampled = (q.log_prob(z) - p.log_prob(z)).mean(0)
    torch.testing.assert_close(q.kl(p)[0], sampled, atol=0.05, rtol=0.02)
    assert q.kl(q).abs().max() < 1e-12 and q.kl(p).min() > 0
