"BigBiGAN against numbers of the reference network (tests/golden), and mutations that must not pass."
import copy
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from mlvgm_mi.checkpoints import WeightsError
from mlvgm_mi.generators import bigbigan
from mlvgm_mi.generators.bigbigan import (
    BigBiGAN, BigBiGANConfig, SelfAttention, SNConv2d, SpectralNorm, UpBlock, UpConv2d, decode_raw, demo_bigbigan,
    for_inference, load_bigbigan, spectral_step, standing_statistics,
)
from mlvgm_mi.generators.core import check_generator
from mlvgm_mi.latents import rng_for

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 5e-5
CONFIG = BigBiGANConfig(width=8, n_classes=10)
NOTES = json.loads((GOLDEN / "bigbigan_ch8.json").read_text())
SMALL = BigBiGANConfig(width=8, multipliers=(4, 2, 1), attention=(8,), n_classes=3)


@pytest.fixture(scope="module")
def gold():
    return load_file(GOLDEN / "bigbigan_ch8_io.safetensors")


@pytest.fixture(scope="module")
def weights():
    return {key[3:]: value for key, value in load_file(GOLDEN / "bigbigan_ch8_weights.safetensors").items()}


@pytest.fixture
def plain(weights):
    return load_bigbigan(weights, CONFIG)


@pytest.fixture(params=["plain", "merged"])
def generator(request, plain):
    return plain if request.param == "plain" else for_inference(plain)


def chunks(z):
    return z.split(20, dim=1)


def distance(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def test_images(generator, gold):
    with torch.no_grad():
        assert distance(decode_raw(generator, chunks(gold["in.z"])), gold["out.image"]) <= TOLERANCE
        assert distance(generator.decode(chunks(gold["in.z"])), ((gold["out.image"] + 1) / 2).clamp(0, 1)) <= TOLERANCE


def test_chunk_swaps_by_full_and_by_prefix_shared_decoding(generator, gold):
    z, other = chunks(gold["in.z"][:1]), chunks(gold["in.z"][1:2])
    swaps = [z[:k] + other[k : k + 1] + z[k + 1 :] for k in (3, 0)]
    assert torch.equal(torch.cat(swaps[0], 1), gold["in.z_chunk3swap"])
    with torch.no_grad():
        views = 2 * generator.decode_views(z, swaps) - 1
        assert distance(views[:, 1], gold["out.image_chunk3swap"]) <= TOLERANCE
        assert distance(views[:, 2, :1], gold["out.image_chunk0swap_ch0"]) <= TOLERANCE
        assert distance(decode_raw(generator, swaps[0]), gold["out.image_chunk3swap"]) <= TOLERANCE


def test_activations(generator, gold):
    with torch.no_grad():
        z = chunks(gold["in.z"])
        state = generator.stage(0, generator.start(4), z[0])
        assert distance(state.flatten(1), gold["act.linear"]) <= TOLERANCE
        for k in range(1, 6):
            state = generator.stage(k, state, z[k])
            found = torch.stack([state.mean((2, 3)), state.std((2, 3))], -1)
            assert distance(found, gold[f"act.block{k - 1}_stats"]) <= TOLERANCE
            if k == 1:
                assert distance(state, gold["act.block0"]) <= TOLERANCE


def test_gradient_to_the_latents(generator, gold):
    z = gold["in.z"][:1].clone().requires_grad_()
    image = decode_raw(generator, chunks(z))
    (grad,) = torch.autograd.grad((image[:, :1] * gold["grad.cotangent_ch0"]).sum(), z)
    assert distance(grad, gold["grad.z0"]) <= TOLERANCE * gold["grad.z0"].abs().max()


def test_every_sigma(plain, gold):
    layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, SpectralNorm)}
    assert len(layers) == 41
    assert {f"sigma.{name}" for name in layers} == {key for key in gold if key.startswith("sigma.")}
    for name, layer in layers.items():
        sigma, _ = spectral_step(layer.weight, layer.u0)
        assert distance(sigma.reshape(-1), gold[f"sigma.{name}"].reshape(-1)) <= TOLERANCE, name


def test_contract(generator):
    check_generator(generator)


# Typical mistakes. Each must move the image, and by as much as the same mistake moved the reference's image.


def output_eps(generator, monkeypatch):
    generator.output_layer[0].eps = 1e-4


def conditional_eps(generator, monkeypatch):
    for layer in generator.modules():
        if isinstance(layer, bigbigan.ConditionalBatchNorm):
            layer.eps = 1e-5


def sigma_is(value):
    def mutate(generator, monkeypatch):
        monkeypatch.setattr(SpectralNorm, "normalized", lambda self: self.weight / value(self))
    return mutate


def no_attention(generator, monkeypatch):
    monkeypatch.setattr(SelfAttention, "forward", lambda self, x: x)


def label_behind_the_chunk(generator, monkeypatch):
    forward = UpBlock.forward
    monkeypatch.setattr(UpBlock, "forward", lambda self, x, y: forward(self, x, y.roll(20, dims=1)))


def bilinear(generator, monkeypatch):
    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    def block(self, x, y):
        h = SNConv2d.forward(self.conv1, up(self.bn1(x, y).relu()))
        return self.conv2(self.bn2(h, y).relu()) + self.conv_sc(up(x))
    monkeypatch.setattr(UpBlock, "forward", block)


MUTATIONS = {
    "output bn eps 1e-4 instead of 1e-5": output_eps,
    "ccbn eps 1e-5 instead of 1e-4": conditional_eps,
    "divide by stored sv0 instead of recomputed sigma": sigma_is(lambda layer: layer.sv0),
    "exact largest singular value": sigma_is(lambda layer: torch.linalg.matrix_norm(layer.weight.flatten(1), 2)),
    "no spectral norm": sigma_is(lambda layer: 1.0),
    "no attention": no_attention,
    "z chunk before class embedding": label_behind_the_chunk,
    "bilinear instead of nearest upsampling": bilinear,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_seen(plain, gold, monkeypatch, name):
    MUTATIONS[name](plain, monkeypatch)
    with torch.no_grad():
        moved = distance(decode_raw(plain, chunks(gold["in.z"])), gold["out.image"])
    assert moved > 20 * TOLERANCE
    assert moved == pytest.approx(NOTES["mutation_max_abs_image_change"][name], rel=0.02)


def test_another_class_is_another_image(weights, gold):
    other = load_bigbigan(weights, BigBiGANConfig(width=8, n_classes=10, class_id=1))
    with torch.no_grad():
        assert distance(decode_raw(other, chunks(gold["in.z"])), gold["out.image"]) > 20 * TOLERANCE


def test_rotated_chunks_are_seen(plain, gold):
    z = chunks(gold["in.z"])
    with torch.no_grad():
        assert distance(decode_raw(plain, z[1:] + z[:1]), gold["out.image"]) > 20 * TOLERANCE


# Loading


def test_names_and_shapes_are_the_published_ones(plain):
    assert {name: list(value.shape) for name, value in plain.state_dict().items()} == NOTES["state_dict"]
    assert {name for name, _ in plain.named_parameters()} == set(NOTES["parameters"])
    assert {name for name, _ in plain.named_buffers()} == set(NOTES["buffers"])


def test_sv0_is_optional_and_never_read(weights, plain, gold):
    without = load_bigbigan({name: value for name, value in weights.items() if not name.endswith(".sv0")}, CONFIG)
    with torch.no_grad():
        assert torch.equal(decode_raw(without, chunks(gold["in.z"])), decode_raw(plain, chunks(gold["in.z"])))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("blocks.2.0.bn1.gain.u0"), "'blocks.2.0.bn1.gain.u0' is missing"),
    (lambda s: s.update({"blocks.5.0.conv1.weight": torch.zeros(1)}), "'blocks.5.0.conv1.weight' is not in the module"),
    (lambda s: s.update({"shared.weight": torch.zeros(5, 128)}), "'shared.weight' has shape (5, 128)"),
    (lambda s: s.update({"linear.sv0": torch.zeros(2)}), "'linear.sv0' has shape (2,)"),
])
def test_what_does_not_fit_is_named(weights, change, message):
    state = dict(weights)
    change(state)
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_bigbigan(state, CONFIG, "file.pth")


@pytest.mark.parametrize("fields, message", [
    ({"attention": (7,)}, "attention"), ({"multipliers": (4,)}, "multipliers"), ({"class_id": 1000}, "class_id=1000"),
])
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BigBiGANConfig(**fields)


def test_configuration_survives_json():
    assert BigBiGANConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL


@pytest.mark.slow
def test_full_size():
    expected = json.loads((GOLDEN / "bigbigan_full_shapes.json").read_text())
    generator = BigBiGAN(BigBiGANConfig()).eval()
    assert {name: list(value.shape) for name, value in generator.state_dict().items()} == expected["state_dict"]
    assert sum(p.numel() for p in generator.parameters()) == expected["n_parameters"]
    z = generator.sample(1, rng_for(0, "anchor"))
    with torch.no_grad():
        image = generator.decode(z)
        assert image.shape == (1, 3, 128, 128) and image.std() > 0
        torch.testing.assert_close(for_inference(generator).decode(z), image, atol=TOLERANCE, rtol=0)


# Training


def test_the_seed_decides_the_weights():
    same, other = (BigBiGAN(SMALL, seed=seed).state_dict() for seed in (0, 1))
    again = BigBiGAN(SMALL).state_dict()
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["linear.weight"], other["linear.weight"])


def test_building_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    for_inference(BigBiGAN(SMALL))
    assert torch.equal(before, torch.get_rng_state())


def test_training_renews_u0_and_reaches_every_parameter():
    generator = BigBiGAN(SMALL)
    before = copy.deepcopy(generator.state_dict())
    for parameter in (p for name, p in generator.named_parameters() if name.endswith("gamma")):
        parameter.data.fill_(1.0)
    for _ in range(2):  # a second pass would trip over a buffer changed in place
        generator.decode(generator.sample(4, rng_for(0, "anchor"))).square().sum().backward()
    silent = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    for name, value in generator.state_dict().items():
        if name.endswith(("u0", "stored_mean", "stored_var")):
            assert not torch.equal(before[name], value), name


def test_the_gradient_of_a_normalised_weight_is_that_of_weight_over_sigma():
    layer = UpConv2d((3, 2, 3, 3)).double()
    torch.nn.init.normal_(layer.weight, generator=rng_for(0, "layer"))
    weight = layer.weight.detach().requires_grad_()
    matrix = weight.flatten(1)
    v = F.normalize(layer.u0 @ matrix.detach(), dim=1)
    u = F.normalize(v @ matrix.detach().T, dim=1)
    ((weight / (v @ matrix.T @ u.T)) ** 3).sum().backward()
    (layer.eval().normalized() ** 3).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_merging_after_training():
    generator = BigBiGAN(SMALL)
    for _ in range(3):
        generator.decode(generator.sample(8, rng_for(0, "anchor")))
    z = generator.eval().sample(4, rng_for(1, "anchor"))
    with torch.no_grad():
        expected = generator.decode(z)
        torch.testing.assert_close(for_inference(generator).decode(z), expected, atol=TOLERANCE, rtol=0)
    assert not any(p.requires_grad for p in generator.parameters())


def test_standing_statistics_are_those_of_the_batch():
    generator = BigBiGAN(SMALL).eval()
    u0 = generator.linear.u0.clone()
    z = generator.sample(64, rng_for(0, "statistics"))
    with torch.no_grad():
        standing_statistics(generator, z)
        norm = generator.blocks[0][0].bn1
        features = generator.linear(z[0]).unflatten(1, (-1, 4, 4))
    torch.testing.assert_close(norm.stored_mean, features.mean((0, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.stored_var, features.var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert norm.momentum == 0.1 and not norm.training and torch.equal(u0, generator.linear.u0)


def test_demo():
    check_generator(demo_bigbigan())
