"Training by the evidence lower bound: the loss at known points, resuming to the bit, and the file that ships."
import copy
import math
from dataclasses import replace

import pytest
import torch

from mlvgm_mi.checkpoints import WeightsError, read_weights, save_weights
from mlvgm_mi.data import ImageSet
from mlvgm_mi.distributions import BernoulliOutput, SoftNormal
from mlvgm_mi.generators.core import check_generator
from mlvgm_mi.generators.nvae import NVAE, NVAEConfig, canvas_side
from mlvgm_mi.generators.nvae_encoder import NVAEEncoder, Posterior, posterior
from mlvgm_mi.generators.nvae_training import (
    ElboConfig, ElboTrainer, elbo_loss, elbo_step, fashion_nvae, fashion_nvae_encoder, kl_balance, kl_weight, learning_rate,
    load_pair, publish_pair, random_posterior, refresh_statistics, train_elbo, warming_up,
)
from mlvgm_mi.generators.stylegan2 import weights_file
from mlvgm_mi.latents import rng_for

NETWORK = NVAEConfig(image_size=8, num_latent_per_group=2, num_channels_enc=4, num_channels_dec=4)
PATCHED = NVAEConfig(image_size=16, patch=2, expansion=3, num_latent_per_group=2, num_channels_enc=4, num_channels_dec=4)
CONFIG = ElboConfig(kimg=0.064, batch=8, first_steps=2, warm_up=0.04, later=((0.05, 0.1),))


def images(n=64, size=8, seed=0):
    pixels = torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, generator=rng_for(seed, "pixels"))
    return ImageSet(pixels, torch.arange(n) % 2, ("even", "odd"))


def stripes(n=64, size=8):
    "Each image is one of two patterns."
    kind = torch.arange(n) % 2
    lit = (torch.arange(size)[None, :, None] + kind[:, None, None]) % 2
    return ImageSet((255 * lit.expand(n, size, size)[:, None]).byte().contiguous(), kind, ("even", "odd"))


def weights(trainer):
    return {name: value.clone() for name, value in trainer.pair.state_dict().items()}


def test_loss_in_closed_form():
    zero, one = torch.zeros(3, 2, 1, 1), torch.ones(3, 2, 1, 1)
    found = Posterior(BernoulliOutput(torch.zeros(3, 1, 4, 4)), (zero,), (SoftNormal(zero + 2, one),), (SoftNormal(zero, one),))
    pixels = torch.rand(3, 1, 4, 4, generator=rng_for(0, "pixels"))
    assert math.isclose(elbo_loss(found, pixels, 0.0), 16 * math.log(2), rel_tol=1e-6)
    assert math.isclose(elbo_loss(found, pixels, 0.5) - elbo_loss(found, pixels, 0.0), 0.5 * 2 * 2**2 / 2, rel_tol=1e-5)
    assert math.isclose(elbo_loss(found, pixels, 1.0), -found.elbo(pixels).mean(), rel_tol=1e-6)


def test_weights_of_groups():
    kl = torch.tensor([0.0, 2.0, 6.0, 40.0])
    assert math.isclose(kl_balance(kl).mean(), 1, rel_tol=1e-6)
    assert torch.equal(kl_balance(kl).argsort(), kl.argsort())
    torch.testing.assert_close(kl_balance(torch.full((5,), 3.0)), torch.ones(5))
    assert kl_balance(torch.zeros(2)).isfinite().all()
    assert not kl_balance(kl.requires_grad_()).requires_grad


def test_schedules():
    config = ElboConfig(kimg=100.0, batch=100, warm_up=25.0, peak=0.8, later=((30.0, 0.2),), first_steps=100)
    rising = [kl_weight(step, config) for step in range(250)]
    assert rising == sorted(rising) and 0 < rising[0] < 0.01 and math.isclose(rising[-1], 0.8 * 249 / 250)
    assert warming_up(249, config) and not warming_up(250, config)
    assert kl_weight(250, config) == kl_weight(299, config) == 0.8 and kl_weight(300, config) == kl_weight(1000, config) == 0.2
    rates = [learning_rate(step, config) for step in range(1001)]
    assert rates[0] < 0.02 * config.lr and max(rates) < config.lr and rates[1000] == 0
    assert rates[100:] == sorted(rates[100:], reverse=True)


@pytest.mark.parametrize("network", [NETWORK, PATCHED], ids=["whole", "patched"])
def test_the_divergence_reaches_every_parameter(network):
    decoder, encoder = NVAE(network), NVAEEncoder(network)
    pixels = images(4, network.image_size).floats()
    found = posterior(encoder, decoder, pixels, decoder.sample(4, rng_for(0, "z")))
    assert found.output.mean().shape == pixels.shape
    elbo_loss(found, pixels, 1.0).backward()
    silent = [name for part in (decoder, encoder) for name, p in part.named_parameters() if p.grad is None]
    assert not silent


def test_patches_tile_the_image():
    decoder = NVAE(PATCHED).eval()
    assert PATCHED.sides == (2, 2, 4, 4) and canvas_side(PATCHED) == 8
    check_generator(decoder)
    with pytest.raises(ValueError, match="multiple of 8"):
        NVAEConfig(image_size=20, patch=2)


def test_patches_of_the_image_are_positions_of_the_canvas():
    encoder = NVAEEncoder(PATCHED).eval()
    seen = []
    encoder.stem.register_forward_hook(lambda layer, given, result: seen.append(given[0]))
    pixels = images(1, 16).floats()
    encoder(pixels)
    torch.testing.assert_close(seen[0][0, :, 3, 5], 2 * pixels[0, 0, 6:8, 10:12].flatten() - 1)


def test_steps_repeat_and_seeds_differ():
    first, second = (ElboTrainer(NETWORK, CONFIG, images()) for _ in range(2))
    other = ElboTrainer(NETWORK, replace(CONFIG, seed=1), images())
    for trainer in (first, second, other):
        elbo_step(trainer)
        elbo_step(trainer)
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    assert not all(torch.equal(value, weights(other)[name]) for name, value in weights(first).items())


def test_stopped_and_resumed(tmp_path):
    whole = train_elbo(ElboTrainer(NETWORK, CONFIG, images()), tmp_path / "whole", save_every=0.032)
    train_elbo(ElboTrainer(NETWORK, CONFIG, images()), tmp_path / "parts", save_every=0.032, stop_after=0.048)
    resumed = train_elbo(ElboTrainer(NETWORK, CONFIG, images()), tmp_path / "parts", save_every=0.032)
    assert resumed.step == whole.step == 8
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())
    assert resumed.log[-1] == whole.log[-1]


def test_two_patterns_are_learned():
    config = ElboConfig(kimg=0.64, batch=16, first_steps=1, lr=0.02, warm_up=0.4, peak=0.1, later=())
    trainer = ElboTrainer(NETWORK, config, stripes())
    first, *_, last = [elbo_step(trainer) for _ in range(40)]
    assert last["distortion"] < 0.6 * first["distortion"]  # one picture for both patterns would stay near the first
    assert sum(last["kl"]) > 0.5 * math.log(2)


def test_a_stage_goes_on_from_an_average():
    first = ElboTrainer(NETWORK, CONFIG, images())
    elbo_step(first)
    second = ElboTrainer(NETWORK, CONFIG, images(), start=first.average)
    assert second.step == 0 and second.pair is not first.average
    for name, value in weights(second).items():
        assert torch.equal(value, first.average.state_dict()[name])
    elbo_step(second)
    assert not torch.equal(second.pair["decoder"].prior_ftr0, first.average["decoder"].prior_ftr0)


def test_the_average_follows():
    trainer = ElboTrainer(NETWORK, CONFIG, images())
    before = copy.deepcopy(trainer.average)
    elbo_step(trainer)
    for old, mean, new in zip(before.parameters(), trainer.average.parameters(), trainer.pair.parameters()):
        between = (mean - old).abs() <= (new - old).abs() + 1e-6
        assert between.all()
    assert not torch.equal(before["decoder"].prior_ftr0, trainer.average["decoder"].prior_ftr0)


def test_statistics_are_those_of_the_data():
    trainer = ElboTrainer(NETWORK, CONFIG, images())
    pair = refresh_statistics(trainer.pair, trainer.images, batches=2, batch=32)
    norm = pair["encoder"].pre_process[0]._ops[0].bn_act
    seen = []
    norm.register_forward_hook(lambda layer, given, result: seen.append(given[0].mean((0, 2, 3))))
    pair.train()
    random_posterior(pair, trainer.images.floats(), rng_for(0, "z"))
    fresh = refresh_statistics(pair, trainer.images, batches=2, batch=32)
    assert not fresh.training and norm.momentum == 0.1
    torch.testing.assert_close(norm.running_mean, torch.stack(seen[1:]).mean(0), rtol=1e-4, atol=1e-5)


def test_published_weights_come_back(tmp_path):
    trainer = ElboTrainer(replace(PATCHED, contrast=1.5), CONFIG, images(size=16))
    elbo_step(trainer)
    publish_pair([trainer], tmp_path / "pair.safetensors", {"licence": "test"})
    decoder, encoder = load_pair(tmp_path / "pair.safetensors")
    pair = refresh_statistics(trainer.average, trainer.images)
    z = decoder.sample(2, rng_for(0, "z"))
    torch.testing.assert_close(decoder.decode(z), pair["decoder"].decode(z), atol=5e-3, rtol=0)
    config = read_weights(tmp_path / "pair.safetensors")[1]
    assert config["card"] == {"licence": "test"} and config["kimg"] == [0.008] and decoder.config.contrast == 1.5
    assert posterior(encoder, decoder, trainer.images.floats(slice(0, 2)), z).kl.shape == (2, 4)


def test_files_that_do_not_fit_are_refused(tmp_path):
    trainer = ElboTrainer(NETWORK, CONFIG, images())
    publish_pair([trainer], tmp_path / "pair.safetensors")
    tensors, config = read_weights(tmp_path / "pair.safetensors")
    del tensors["prior_ftr0"]
    save_weights(tmp_path / "broken.safetensors", tensors, config)
    with pytest.raises(WeightsError, match="prior_ftr0"):
        load_pair(tmp_path / "broken.safetensors")


def test_the_shipped_pair():
    path = weights_file("fashion_nvae")
    config = read_weights(path)[1]
    assert path.stat().st_size < 6_000_000
    assert {"licence", "data"} <= set(config["card"]) and all(len(log) > 10 for log in config["log"])
    assert [log[-1]["kimg"] for log in config["log"]] == pytest.approx(config["kimg"])
    decoder, encoder = fashion_nvae().eval(), fashion_nvae_encoder().eval()
    assert len(decoder.layout.blocks) >= 4 and len(set(decoder.config.sides)) >= 2
    check_generator(decoder)
    with torch.inference_mode():
        pixels = decoder.decode(decoder.sample(64, rng_for(0, "pictures")))
        again = posterior(encoder, decoder, pixels, decoder.sample(64, rng_for(0, "again")))
    assert again.kl.mean(0).min() > 0.5
    assert (again.output.mean() - pixels).abs().mean() < 0.5 * (pixels - pixels.mean(0)).abs().mean()
