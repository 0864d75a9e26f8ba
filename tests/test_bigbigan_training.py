"The game of three players: losses at known points, who moves when, resumed runs, and the file that ships."
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mlvgm_mi.checkpoints import WeightsError, read_weights
from mlvgm_mi.data import ImageSet
from mlvgm_mi.generators.bigbigan import BatchNorm, BigBiGANConfig, SpectralNorm, initialise, load_bigbigan, spectral_step
from mlvgm_mi.generators.bigbigan_training import (
    BigBiGANTrainer, BigBiGANTrainingConfig, DownConv2d, Encoder, JointDiscriminator, encoder_file, fashion_bigbigan_encoder,
    joint_discriminator_loss, joint_generator_loss, latent_size, load_bigbigan_encoder, make_pairs, settle, settle_encoder,
)
from mlvgm_mi.generators.core import check_generator, load_generator
from mlvgm_mi.generators.stylegan2 import weights_file
from mlvgm_mi.generators.training import train
from mlvgm_mi.latents import rng_for

NETWORK = BigBiGANConfig(width=4, multipliers=(2, 1, 1), attention=(), chunk=3, n_classes=1, shared_dim=2, image_channels=1)
CONFIG = BigBiGANTrainingConfig(kimg=0.064, batch=8, width=4, encoder_width=4, hidden=8)
PLAYERS = "generator", "encoder", "discriminator"


def images(n=64, seed=0):
    pixels = torch.randint(0, 256, (n, 1, 16, 16), dtype=torch.uint8, generator=rng_for(seed, "pixels"))
    return ImageSet(pixels, torch.arange(n) % 2, ("even", "odd"))


def trainer(**changes):
    return BigBiGANTrainer(NETWORK, replace(CONFIG, **changes), images())


def weights(run, name):
    return [value.detach().clone() for value in run.parts[name].parameters()]


def moved(run, name, before):
    return any(not torch.equal(a, b) for a, b in zip(run.parts[name].parameters(), before))


def scores(*rows):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("real, fake, expected", [
    ((0, 0, 0), (0, 0, 0), 6), ((1, 1, 1), (-1, -1, -1), 0), ((-1, 0, 5), (1, 0, -5), 6), ((3, 3, 3), (3, 3, 3), 12),
])
def test_the_hinge_at_known_points(real, fake, expected):
    assert joint_discriminator_loss(scores(real), scores(fake)) == expected


def test_the_players_lose_what_the_discriminator_wins():
    real, fake = scores((0.5, -0.5, 0.25), (0.0, 0.5, 0.0)), scores((0.1, -0.1, 0.9), (-0.3, 0.2, 0.0))
    inside = joint_discriminator_loss(real, fake) + joint_generator_loss(real, fake)
    assert math.isclose(inside.item(), 6)  # within the hinge the game is of constant sum
    joint_generator_loss(real, fake).backward()
    assert real.grad.tolist() == [[0.5] * 3] * 2 and fake.grad.tolist() == [[-0.5] * 3] * 2


@pytest.mark.parametrize("inputs, outputs, side", [(1, 3, 2), (4, 2, 8), (3, 5, 6)])
def test_pooling_inside_the_convolution(inputs, outputs, side):
    conv = DownConv2d((outputs, inputs, 3, 3)).eval()
    initialise(conv, rng_for(0, "conv"))
    conv.double().bias.data.normal_(generator=rng_for(1, "bias"))
    x = torch.randn(2, inputs, side, side, dtype=torch.float64, generator=rng_for(0, "x"))
    expected = F.avg_pool2d(F.conv2d(x, conv.normalized(), conv.bias, padding=1), 2)
    torch.testing.assert_close(conv(x), expected, atol=1e-12, rtol=1e-12)


def test_a_score_of_a_pair_depends_on_no_other_run_of_four():
    judge = JointDiscriminator(NETWORK, 4, 8).eval()
    x, z = torch.randn(8, 1, 16, 16, generator=rng_for(0, "x")), torch.randn(8, latent_size(NETWORK), generator=rng_for(0, "z"))
    torch.testing.assert_close(judge(x, z)[:4], judge(x[:4], z[:4]), atol=1e-5, rtol=1e-5)
    assert judge(x, z).shape == (8, 3)


def test_codes_are_draws():
    encoder, x = Encoder(NETWORK, 4).eval(), torch.randn(5, 1, 16, 16, generator=rng_for(0, "x"))
    mean, std = encoder.moments(x)
    noise = torch.randn(mean.shape, generator=rng_for(0, "noise"))
    assert mean.shape == (5, 9) and (std > 0).all()
    assert torch.equal(encoder(x, torch.zeros_like(noise)), mean)
    torch.testing.assert_close((encoder(x, noise) - mean) / std, noise, atol=1e-4, rtol=1e-4)


def test_each_score_teaches_whom_it_should():
    reached = {}
    for k, name in enumerate(("image", "latent", "joint")):
        run = trainer(bfloat16=False)
        real, code, z, fake = make_pairs(run)
        judge = run.parts["discriminator"]
        joint_generator_loss(judge(real, code)[:, k : k + 1], judge(fake, z)[:, k : k + 1]).backward()
        grads = {player: [p.grad for p in run.parts[player].parameters() if p.grad is not None] for player in PLAYERS[:2]}
        reached[name] = {player for player, values in grads.items() if any(g.abs().max() > 0 for g in values)}
    assert reached == {"image": {"generator"}, "latent": {"encoder"}, "joint": {"generator", "encoder"}}


@pytest.mark.parametrize("still", PLAYERS)
def test_a_player_without_a_learning_rate_does_not_move(still):
    run = trainer(**{f"{still}_lr": 0.0})
    before = {name: weights(run, name) for name in PLAYERS}
    run.advance()
    assert [name for name in PLAYERS if not moved(run, name, before[name])] == [still]


def test_steps_repeat_and_seeds_differ():
    first, second, other = trainer(), trainer(), trainer(seed=1)
    losses = [[run.advance() for _ in range(2)] for run in (first, second, other)]
    assert losses[0] == losses[1] != losses[2]
    assert not any(moved(second, name, weights(first, name)) for name in PLAYERS)


def test_stopped_and_resumed(tmp_path):
    whole = train(trainer(), tmp_path / "whole", save_every=0.024)
    for cut in (0.024, 0.048):
        folder = tmp_path / str(cut)
        train(trainer(), folder, save_every=0.024, stop_after=cut)
        resumed = train(trainer(), folder, save_every=0.024)
        assert resumed.step == whole.step == 8 and resumed.log == whole.log
        for name in (*PLAYERS, "average_generator", "average_encoder"):
            state = resumed.parts[name].state_dict()
            assert all(torch.equal(value, state[key]) for key, value in whole.parts[name].state_dict().items()), (cut, name)
    assert whole.parts["generator_optimiser"].param_groups[0]["lr"] < CONFIG.generator_lr / 2


def test_a_settled_average():
    run = trainer()
    for _ in range(3):
        run.advance()
    average, before = run.parts["average_generator"], weights(run, "average_generator")
    assert settle(average, run.parts["generator"], steps=200) is average and not moved(run, "average_generator", before)
    for layer in average.modules():
        if isinstance(layer, SpectralNorm):
            exact = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            assert math.isclose(spectral_step(layer.weight, layer.u0)[0].item(), exact.item(), rel_tol=1e-3)
    assert not average.training and all(not norm.training for norm in average.modules() if isinstance(norm, BatchNorm))
    means, out = [], average.output_layer[0]
    out.register_forward_hook(lambda layer, inputs, output: means.append(layer.normalise(inputs[0]).mean((0, 2, 3))))
    average.decode(average.sample(2000, rng_for(0, "bigbigan/statistics")))
    assert means[0].abs().max() < 1e-3


def test_published_weights_come_back(tmp_path):
    run = trainer()
    run.advance()
    run.publish(tmp_path / "g.safetensors", {"licence": "test"})
    tensors, config = read_weights(tmp_path / "g.safetensors")
    generator = load_bigbigan(tensors, BigBiGANConfig(**config["generator"]))
    z = generator.sample(2, rng_for(0, "z"))
    assert torch.equal(generator.decode(z), settle(run.parts["average_generator"], run.parts["generator"]).decode(z))
    encoder = load_bigbigan_encoder(encoder_file(tmp_path / "g.safetensors"))
    pixels = run.images.floats(slice(0, 4))
    expected = settle_encoder(run.parts["average_encoder"], run.images).moments(2 * pixels - 1)[0]
    torch.testing.assert_close(torch.cat(encoder.latents(pixels), 1), expected)
    assert BigBiGANTrainingConfig(**config["training"]) == CONFIG
    assert config["card"] == {"licence": "test"} and config["kimg"] == 0.008
    assert len(check_generator(generator)) == 9


def test_publishing_leaves_the_training_alone(tmp_path):
    run = trainer()
    run.advance()
    before = {name: value.clone() for name, value in run.parts["average_encoder"].state_dict().items()}
    run.publish(tmp_path / "g.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in run.parts["average_encoder"].state_dict().items())


def test_an_encoder_is_told_from_a_generator(tmp_path):
    run = trainer()
    run.publish(tmp_path / "g.safetensors")
    with pytest.raises(WeightsError, match="does not fit Encoder"):
        load_bigbigan_encoder(tmp_path / "g.safetensors")


@pytest.fixture(scope="module")
def shipped():
    return load_generator("fashion-bigbigan")


def test_the_shipped_file():
    path = weights_file("fashion_bigbigan")
    config = read_weights(path)[1]
    assert path.stat().st_size < 6_000_000 and encoder_file(path).stat().st_size < 6_000_000
    assert {"licence", "data"} <= set(config["card"]) and config["kimg"] == config["training"]["kimg"] and len(config["log"]) > 10
    assert read_weights(encoder_file(path))[1]["log"] == config["log"]


def test_the_shipped_generator(shipped):
    assert len(shipped.layout.blocks) >= 4 and shipped.image_shape == (1, 32, 32)
    assert not any(isinstance(layer, SpectralNorm) for layer in shipped.modules())
    assert len(check_generator(shipped)) == 9
    tensors, config = read_weights(weights_file("fashion_bigbigan"))
    plain = load_bigbigan(tensors, BigBiGANConfig(**config["generator"]))
    z = shipped.sample(16, rng_for(0, "z"))
    torch.testing.assert_close(plain.decode(z), shipped.decode(z), atol=1e-5, rtol=0)


def test_spectral_norms_of_the_shipped_weights_have_converged():
    tensors = read_weights(weights_file("fashion_bigbigan"))[0]
    names = [name.removesuffix(".u0") for name in tensors if name.endswith(".u0")]
    assert len(names) == 23
    for name in names:
        weight = tensors[f"{name}.weight"]
        exact = torch.linalg.matrix_norm(weight.flatten(1), 2).item()
        assert math.isclose(spectral_step(weight, tensors[f"{name}.u0"])[0].item(), exact, rel_tol=0.02), name


def test_codes_of_generated_pictures_lead_back(shipped):
    encoder = fashion_bigbigan_encoder()
    with torch.no_grad():
        images = shipped.decode(shipped.sample(128, rng_for(1, "there")))
        back = shipped.decode(encoder.latents(images))
    assert (images - back).square().mean() < 0.6 * (images - back.roll(1, 0)).square().mean()
