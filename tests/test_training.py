"Adversarial training and the quality measures, at points whose value is known."
import math
from types import SimpleNamespace

import pytest
import torch

from mlvgm_mi.checkpoints import read_weights, save_state
from mlvgm_mi.data import ImageSet
from mlvgm_mi.generators.core import LinearGaussian
from mlvgm_mi.generators.stylegan2 import StyleGAN2Config, from_published, weights_file
from mlvgm_mi.generators.training import (
    AdversarialConfig, AdversarialTrainer, Discriminator, Oracle, accuracy, batch_spread, discriminator_loss, frechet_distance,
    generator_loss, predict, publish, r1_penalty, sample_images, steps_left, train, train_step,
)
from mlvgm_mi.latents import rng_for

NETWORK = StyleGAN2Config(z_dim=4, w_dim=4, img_resolution=8, img_channels=1, num_layers=1, channel_base=32, channel_max=4)
CONFIG = AdversarialConfig(kimg=0.064, batch=8, r1_every=2)


def images(n=64, size=8, seed=0):
    pixels = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, generator=rng_for(seed, "pixels"))
    return ImageSet(pixels, torch.arange(n) % 2, ("even", "odd"))


def state(trainer):
    return {name: value.clone() for name, value in trainer.generator.state_dict().items()}


def test_losses_at_known_points():
    big = torch.full((3,), 50.0)
    assert generator_loss(big) < 1e-6 and math.isclose(generator_loss(-big).item(), 50, rel_tol=1e-5)
    assert discriminator_loss(big, -big) < 1e-6


def test_r1_equals_autograd_in_float64():
    network = Discriminator(NETWORK).double()
    pixels = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    expected = sum(torch.autograd.functional.jacobian(lambda x: network(torch.cat([pixels[:i], x, pixels[i + 1:]])).sum(),
                                                      pixels[i:i + 1]).square().sum() for i in range(4)) / 8
    assert math.isclose(r1_penalty(network, pixels).item(), expected.item(), rel_tol=1e-9)


def test_spread_does_not_mix_runs():
    x = torch.cat([torch.zeros(4, 2, 4, 4), torch.randn(4, 2, 4, 4)])
    assert batch_spread(x)[:4].max() < 1e-3 < batch_spread(x)[4:].min()
    assert batch_spread(torch.randn(6, 2, 4, 4)).shape == (6, 1, 4, 4)


def test_steps_repeat_and_seeds_differ():
    first, second = (AdversarialTrainer(NETWORK, CONFIG, images()) for _ in range(2))
    other = AdversarialTrainer(NETWORK, AdversarialConfig(kimg=0.064, batch=8, r1_every=2, seed=1), images())
    for trainer in (first, second, other):
        train_step(trainer)
        train_step(trainer)
    assert all(torch.equal(value, state(second)[name]) for name, value in state(first).items())
    assert not all(torch.equal(value, state(other)[name]) for name, value in state(first).items())


def test_killed_at_any_step_and_resumed(tmp_path):
    whole = train(AdversarialTrainer(NETWORK, CONFIG, images()), tmp_path / "whole", save_every=0.008)
    for cut in (0.008, 0.024, 0.056):
        folder = tmp_path / str(cut)
        train(AdversarialTrainer(NETWORK, CONFIG, images()), folder, save_every=0.008, stop_after=cut)
        resumed = train(AdversarialTrainer(NETWORK, CONFIG, images()), folder, save_every=0.008)
        assert resumed.step == whole.step == 8
        assert all(torch.equal(value, state(whole)[name]) for name, value in state(resumed).items())
        assert [row["generator"] for row in resumed.log] == [row["generator"] for row in whole.log]


def test_the_learning_rate_ends_at_zero():
    trainer = AdversarialTrainer(NETWORK, CONFIG, images())
    trainer.step = 8
    before = state(trainer)
    train_step(trainer)
    assert all(torch.equal(value, before[name]) for name, value in state(trainer).items())


def test_published_weights_come_back(tmp_path):
    trainer = AdversarialTrainer(NETWORK, CONFIG, images())
    train_step(trainer)
    publish(trainer, tmp_path / "g.safetensors", {"licence": "test"})
    tensors, config = read_weights(tmp_path / "g.safetensors")
    generator = from_published(tensors, config["generator"]).eval()
    z = generator.sample(2, rng_for(0, "z"))
    torch.testing.assert_close(generator.decode(z), trainer.average.decode(z))
    assert config["card"] == {"licence": "test"} and config["kimg"] == 0.008


def test_augmentation_is_used():
    seen = []

    def augment(pixels, rng):
        seen.append(len(pixels))
        return pixels.flip(3)

    train_step(AdversarialTrainer(NETWORK, CONFIG, images(), augment))
    assert seen == [8, 8, 8]


def test_frechet_distance_of_shifted_features():
    class Eyes(Oracle):
        num_features = 2

        def features(self, pixels):
            return torch.stack([pixels[:, 0, 0, 0], pixels[:, 0, 0, 1]], 1)

    eyes = Eyes(1, 2)
    a = torch.zeros(200, 1, 32, 32, dtype=torch.uint8)
    a[:, 0, 0, :2] = torch.randint(0, 100, (200, 2), dtype=torch.uint8, generator=rng_for(0, "a"))
    b = a.clone()
    b[:, 0, 0, 0] += 51  # 0.2 in [0, 1]: means differ by 0.2, covariances not at all
    assert math.isclose(frechet_distance(eyes, a, b), 0.04, abs_tol=1e-4)


def test_accuracy_and_samples():
    oracle = Oracle(1, 2).eval()
    data = images(size=32)
    assert accuracy(oracle, ImageSet(data.images, predict(oracle, data), data.class_names)) == 1
    line = LinearGaussian([torch.eye(4) / 100])
    line.image_range = (0, 1)
    line.render = lambda h: h[:, None, None].sigmoid()
    assert sample_images(line, 7, batch=3).shape == (7, 1, 1, 4)


def test_the_shipped_file():
    path = weights_file("fashion_stylegan2")
    config = read_weights(path)[1]
    assert path.stat().st_size < 6_000_000
    assert {"licence", "data"} <= set(config["card"]) and config["kimg"] == config["training"]["kimg"] and len(config["log"]) > 10


@pytest.mark.parametrize("members, batch", [(4, 8), (4, 6), (4, 1)])
def test_spread_of_odd_batches(members, batch):
    assert batch_spread(torch.randn(batch, 1, 4, 4), members).isfinite().all()


class Counter:
    "A trainer that only counts: 1,000 images a step, ten steps in all."
    config = SimpleNamespace(batch=1000, kimg=10.0)

    def __init__(self):
        self.step = 0

    def load_state_dict(self, state):
        self.step = state["step"]


@pytest.mark.parametrize("stop_after, due", [
    (None, [4, 8, 10]),  # the last step is saved although it is no multiple of four
    (7.0, [4, 7]),
])
def test_checkpoints_are_due_at_their_distance_and_at_the_end(tmp_path, stop_after, due):
    flags = list(steps_left(Counter(), tmp_path, save_every=4.0, stop_after=stop_after))
    assert [step for step, flag in enumerate(flags, 1) if flag] == due and len(flags) == due[-1]


def test_steps_left_go_on_from_the_checkpoint(tmp_path):
    save_state(tmp_path / "checkpoint.pt", {"step": 8})
    assert list(steps_left(Counter(), tmp_path, save_every=4.0)) == [False, True]
