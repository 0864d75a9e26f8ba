"The protocol: the contract passes for what is registered, and tells broken generators what they did."
import itertools
import math

import pytest
import torch

from mlvgm_mi.generators import core
from mlvgm_mi.generators.core import (
    GENERATORS, ContractError, Generator, LinearGaussian, check_generator, decode_views, device_of, gaussian_mi, linear_direct_mi,
    linear_pair_mi, load_generator, register,
)
from mlvgm_mi.latents import Block, Group, Layout, rng_for, sample_prior
from mlvgm_mi.walkers import fresh_walkers


class Toy(Generator):
    "Two blocks of three numbers, squashed into [0, 1]."

    def __init__(self):
        super().__init__()
        self.layout = Layout.of([Block("a", (3,)), Block("b", (3,))])
        self.image_shape = (1, 1, 3)
        self.register_buffer("gain", torch.tensor([0.5, 1.0, 2.0]))

    def start(self, batch):
        return self.gain.new_zeros(batch, 3)

    def stage(self, k, state, code):
        return torch.sin(state + (k + 1) * self.gain * code)

    def render(self, state):
        return torch.sigmoid(state)[:, None, None]


def broken(**methods):
    return type("Broken", (Toy,), methods)()


def wrong_layout():
    toy = Toy()
    toy.layout = Layout.of([Block("a", (3,)), Block("b", (4,))])
    toy.sample = lambda n, rng, clip=None: sample_prior(Layout.of([Block("a", (3,)), Block("b", (3,))]), n, rng, clip)
    return toy


def drawn(change):
    "Samples of the prior, changed."
    return lambda self, n, rng, clip=None: tuple(change(z) for z in sample_prior(self.layout, n, rng, clip))


FAULTS = {
    "shapes and range: decode gave": lambda: broken(render=lambda self, s: torch.sigmoid(s)),
    "image_range promises": lambda: broken(render=lambda self, s: s[:, None, None]),
    "not finite": lambda: broken(render=lambda self, s: s[:, None, None] / 0),
    "the layout describes the sample": wrong_layout,
    "two samples from equal rngs differ": lambda: broken(sample=lambda self, n, rng, clip=None: tuple(torch.rand(2, n, 3))),
    "the rng argument is ignored": lambda: broken(
        sample=lambda self, n, rng, clip=None: sample_prior(self.layout, n, rng_for(7, "fixed"), clip)),
    "decode twice": lambda: broken(render=lambda self, s: torch.sigmoid(s + torch.rand_like(s))[:, None, None]),
    "block 'a' has mean 0": lambda: broken(sample=drawn(lambda z: z + 0.5)),
    "block 'a' has mean square 1.": lambda: broken(sample=drawn(lambda z: 1.3 * z)),
    "block 'a' has mean fourth power": lambda: broken(sample=drawn(lambda z: (2 * torch.special.ndtr(z) - 1) * math.sqrt(3))),
    "block 'b' has mean square 0.": lambda: broken(sample=lambda self, n, rng, clip=None: (
        lambda a, b: (a, b / 2))(*sample_prior(self.layout, n, rng, clip))),
    "fold = decode": lambda: broken(decode=lambda self, z: Toy.decode(self, z).flip(-1)),
    "batch independence": lambda: broken(render=lambda self, s: torch.sigmoid(s - s.mean(0))[:, None, None]),
    "prefix-shared = full decode": lambda: broken(
        decode_views=lambda self, a, ps: decode_views(self, a, [a for _ in ps])),
    "gradients reach every block": lambda: broken(
        stage=lambda self, k, s, c: Toy.stage(self, k, s, c.detach() if k else c)),
    "device and dtype follow the input": lambda: broken(render=lambda self, s: torch.sigmoid(s.float())[:, None, None]),
}


def test_a_sound_generator_passes():
    assert len(check_generator(Toy())) == 9


@pytest.mark.parametrize("message", FAULTS)
def test_broken_generators_are_told_what_is_wrong(message):
    with pytest.raises(ContractError, match=message):
        check_generator(FAULTS[message]())


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_registered_generator_keeps_the_contract(name):
    check_generator(load_generator(name))


def test_unknown_generator_lists_the_names():
    with pytest.raises(KeyError, match="linear-gaussian"):
        load_generator("stylegan9")


def test_registering_a_taken_name(monkeypatch):
    monkeypatch.setattr(core, "GENERATORS", dict(GENERATORS))
    register("toy", Toy)
    register("toy", Toy)
    assert isinstance(load_generator("toy"), Toy)
    with pytest.raises(ValueError, match="'toy' is taken"):
        register("toy", LinearGaussian)


@pytest.mark.parametrize("moved", [set(c) for n in range(4) for c in itertools.combinations(range(3), n)])
def test_prefix_sharing_for_every_set_of_moved_blocks(moved):
    line = LinearGaussian.random([1.0, 0.5, 0.2])
    z, fresh = line.sample(5, rng_for(0, "z")), line.sample(5, rng_for(0, "f"))
    positive = tuple(f if k in moved else a for k, (a, f) in enumerate(zip(z, fresh)))
    views = decode_views(line, z, [z, positive, positive])
    for image, latents in zip(views.unbind(1), [z, z, positive, positive]):
        torch.testing.assert_close(image, line.decode(latents))


def test_large_batches_are_decoded_in_runs_that_keep_sharing(monkeypatch):
    line = LinearGaussian.random([1.0, 0.5, 0.2])
    z, fresh = line.sample(50, rng_for(0, "z")), line.sample(50, rng_for(0, "f"))
    positives = [z[:1] + fresh[1:], z[:2] + fresh[2:], z]
    whole = decode_views(line, z, positives)
    rows = []
    monkeypatch.setattr(core, "IMAGES_AT_ONCE", 24)
    monkeypatch.setattr(line, "stage", lambda k, h, code: rows.append(len(code)) or LinearGaussian.stage(line, k, h, code))
    torch.testing.assert_close(decode_views(line, z, positives), whole)
    assert max(rows) <= 24 and sum(rows) == 50 * (3 + 2 + 1)


def test_wrong_latents_are_named():
    line = LinearGaussian.random([1.0, 0.5])
    z = line.sample(2, rng_for(0, "z"))
    with pytest.raises(ValueError, match="1 blocks, the layout 2"):
        line.decode(z[:1])
    with pytest.raises(ValueError, match="block 'z1' has shape"):
        line.decode((z[0], z[1][:, :2]))


def test_layout_errors():
    blocks = [Block(f"b{i}", (1,)) for i in range(4)]
    for groups, words in [({"a": (0, 3), "b": (2, 4)}, "overlaps"), ({"a": (0, 1), "b": (2, 4)}, "gap"),
                          ({"a": (0, 3)}, "end at block 3 of 4"), ({"a": (0, 0), "b": (0, 4)}, "empty")]:
        with pytest.raises(ValueError, match=words):
            Layout.of(blocks, groups)
    with pytest.raises(ValueError, match="repeat a name"):
        Layout(tuple(blocks), (Group("a", 0, 2), Group("a", 2, 4)))
    with pytest.raises(KeyError, match="choose one of b0"):
        Layout.of(blocks).group("nobody")


def test_gaussian_mi_of_a_correlated_pair():
    for rho in (0.0, 0.5, 0.9, -0.99):
        covariance = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
        assert math.isclose(gaussian_mi(covariance, 1), -0.5 * math.log(1 - rho**2), abs_tol=1e-12)


def test_linear_closed_forms_against_samples():
    line = LinearGaussian.random([1.0, 0.4], pixels=3, width=2)
    z, e = line.sample(400_000, rng_for(0, "z")), line.sample(400_000, rng_for(0, "e"))
    a, b, noise = 0.8, 0.6, 0.3
    x, y = line.decode(z), line.decode((a * z[0] + b * e[0], z[1]))
    rng = rng_for(0, "noise")
    x, y = (v.flatten(1) + noise * torch.randn(v.flatten(1).shape, generator=rng) for v in (x, y))
    sampled = gaussian_mi(torch.cov(torch.cat([x, y], 1).T), 3)
    assert abs(sampled - linear_pair_mi(line, {"z0": (a, b)}, noise)) < 0.01
    sampled = gaussian_mi(torch.cov(torch.cat([x, z[1]], 1).T), 3)
    assert abs(sampled - linear_direct_mi(line, "z1", noise)) < 0.01


def test_a_generator_may_have_buffers_alone_or_nothing():
    bare = Toy()
    del bare.gain
    assert device_of(bare) == torch.device("cpu") and device_of(Toy().to("meta")) == torch.device("meta")
    assert len(fresh_walkers(Toy(), ["a", "b"]).steps) == 2
