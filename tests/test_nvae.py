"NVAE's decoder against numbers of the reference network (tests/golden), and mutations that must not pass."
import argparse
import copy
import json
import math
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from mlvgm_mi.checkpoints import WeightsError
from mlvgm_mi.distributions import SoftNormal
from mlvgm_mi.generators.bigbigan import for_inference, standing_statistics
from mlvgm_mi.generators.core import check_generator
from mlvgm_mi.generators.nvae import (
    ENCODER_PARTS, NVAE, Combiner, Gate, NormConv2d, NVAEConfig, UpSkip, climb, config_from_args, decode_given,
    demo_nvae, load_nvae, scale_groups, to_noises, to_values,
)
from mlvgm_mi.latents import rng_for

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 5e-5
NAMES = ("nvae_mnist", "nvae_cifar")


@cache
def notes(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def gold(name):
    return load_file(GOLDEN / f"{name}_io.safetensors")


@cache
def weights(name):
    return {key[3:]: value for key, value in load_file(GOLDEN / f"{name}_weights.safetensors").items()}


def plain(name, **options):
    return load_nvae(weights(name), config_from_args(notes(name)["args"]), name, **options)


@pytest.fixture(params=[(name, form) for name in NAMES for form in ("plain", "merged")], ids="-".join)
def case(request):
    "Generator, golden tensors, noises of three samples, number of the group that is swapped."
    name, form = request.param
    generator = plain(name) if form == "plain" else for_inference(plain(name))
    count = notes(name)["n_groups"]
    return generator, gold(name), tuple(gold(name)[f"in.eps.{k}"] for k in range(count)), notes(name)["swap_group"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def distance(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def logits(generator, state):
    return generator.image_conditional(generator.post_process(state))


def logits_of(generator, noises):
    state = generator.start(len(noises[0]))
    for k, code in enumerate(noises):
        state = generator.stage(k, state, code)
    return logits(generator, state)


def first_with(noises, k, rows):
    "Sample 0 alone, with `rows` in group `k`."
    return tuple(rows if i == k else noise[:1] for i, noise in enumerate(noises))


def test_logits_and_images(case):
    generator, golden, noises, _ = case
    assert distance(logits_of(generator, noises), golden["out.logits"]) <= TOLERANCE
    assert distance(generator.decode(noises), golden["out.mean"]) <= TOLERANCE


def test_priors_and_values(case):
    generator, golden, noises, _ = case
    values = to_values(generator, noises)

    def check(k, state):
        prior = generator.prior(k, state)
        assert distance(prior.mu, golden[f"out.prior_mu.{k}"]) <= TOLERANCE
        assert distance(prior.sigma, golden[f"out.prior_sigma.{k}"]) <= TOLERANCE
        assert distance(values[k], golden[f"out.z.{k}"]) <= TOLERANCE
        return values[k]

    climb(generator, 3, check)
    assert math.isclose(golden["out.prior_sigma.0"].min(), 1.01, rel_tol=1e-6)


def test_swap_of_noise(case):
    generator, golden, noises, group = case
    swapped = first_with(noises, group, noises[group][1:2])
    assert distance(logits_of(generator, swapped), golden["out.logits_epsswap"]) <= TOLERANCE
    assert distance(to_values(generator, swapped)[-1], golden["out.z_last_epsswap"]) <= TOLERANCE
    anchor = tuple(noise[:1] for noise in noises)
    shared = generator.decode_views(anchor, [first_with(anchor, group, noises[group][1:2])])
    assert distance(shared[:, 1], generator.decode(swapped)) <= TOLERANCE


def test_swap_of_values(case):
    generator, golden, noises, group = case
    values = [golden[f"out.z.{k}"] for k in range(len(noises))]
    swapped = first_with(values, group, values[group][1:2])
    state = climb(generator, 1, lambda k, state: swapped[k])
    assert distance(logits(generator, state), golden["out.logits_zswap"]) <= TOLERANCE
    assert distance(decode_given(generator, swapped), golden["out.mean_zswap"]) <= TOLERANCE
    noise_swap = first_with(noises, group, noises[group][1:2])
    assert distance(decode_given(generator, swapped), generator.decode(noise_swap)) > 20 * TOLERANCE


def test_values_and_noises_are_inverse(case):
    generator, golden, noises, _ = case
    for found, noise in zip(to_noises(generator, to_values(generator, noises)), noises):
        torch.testing.assert_close(found, noise, atol=1e-4, rtol=1e-4)


def test_temperature(case):
    generator, golden, noises, _ = case
    generator.temperature = 0.7
    values = to_values(generator, noises)
    assert distance(values[0], golden["out.z0_t0.7"]) <= TOLERANCE
    assert distance(values[-1][:1], golden["out.z_last_t0.7"]) <= TOLERANCE
    assert distance(logits_of(generator, noises)[:1], golden["out.logits_t0.7"]) <= TOLERANCE


def test_contract(case):
    with torch.enable_grad():
        check_generator(case[0])


def test_merging_keeps_gradients():
    latents = plain("nvae_mnist").sample(2, rng_for(0, "anchor"))
    with torch.enable_grad():
        found = []
        for generator in (plain("nvae_mnist"), for_inference(plain("nvae_mnist"))):
            z = [block.clone().requires_grad_() for block in latents]
            found.append(torch.autograd.grad(generator.decode(z).square().sum(), z))
    for a, b in zip(*found):
        assert distance(a, b) <= TOLERANCE * a.abs().max()


# Typical mistakes. Each must move the logits, and by as much as the same mistake moved the reference's.


def unit_sigma(generator, monkeypatch):
    prior = NVAE.prior
    narrow = lambda p: SoftNormal(p.mu, p.sigma / 1.01)  # noqa: E731
    monkeypatch.setattr(NVAE, "prior", lambda self, k, s: prior(self, k, s) if k else narrow(prior(self, k, s)))


def no_soft_clamp(generator, monkeypatch):
    def of(cls, parameters, temperature=1.0):
        mu, log_sigma = parameters.chunk(2, 1)
        return cls(mu, (log_sigma.exp() + 0.01) * temperature)
    monkeypatch.setattr(SoftNormal, "of", classmethod(of))


def corners_not_aligned(generator, monkeypatch):
    for layer in generator.modules():
        if isinstance(layer, UpSkip):
            layer[0].align_corners = False


def batch_norm_eps(generator, monkeypatch):
    for layer in generator.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3


def no_weight_norm(generator, monkeypatch):
    monkeypatch.setattr(NormConv2d, "normalized", lambda self: self.weight)


def no_gate(generator, monkeypatch):
    monkeypatch.setattr(Gate, "forward", lambda self, x: x.new_ones(()))


MUTATIONS = {
    "z0 sigma 1.0 instead of 1.01": unit_sigma,
    "no soft clamp": no_soft_clamp,
    "skip upsample align_corners=False": corners_not_aligned,
    "BN eps 1e-3 (torch BN default is 1e-5)": batch_norm_eps,
    "no weight norm": no_weight_norm,
    "no SE": no_gate,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_mutations_are_seen(name, mutation, monkeypatch):
    generator = plain(name)
    MUTATIONS[mutation](generator, monkeypatch)
    noises = [gold(name)[f"in.eps.{k}"] for k in range(notes(name)["n_groups"])]
    moved = distance(logits_of(generator, noises), gold(name)["out.logits"])
    assert moved > 20 * TOLERANCE
    assert moved == pytest.approx(notes(name)["mutation_max_abs_logit_change"][mutation], rel=0.02)


def test_reversed_groups_are_seen():
    generator = plain("nvae_mnist")
    noises = [gold("nvae_mnist")[f"in.eps.{k}"] for k in (1, 0, 3, 2)]
    assert distance(logits_of(generator, noises), gold("nvae_mnist")["out.logits"]) > 20 * TOLERANCE


# Configuration and loading


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_official_ones(name):
    noted = notes(name)
    decoder = {key for key in noted["state_dict"] if key.partition(".")[0] not in ENCODER_PARTS}
    decoder -= set(noted["alias_keys"])
    found = {key: list(value.shape) for key, value in plain(name).state_dict().items()}
    assert found == {key: noted["state_dict"][key] for key in decoder}
    assert {key.partition(".")[0] for key in found} == set(noted["used_by_sampling_top"])


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_is_the_official_one(name):
    kinds = {Combiner: "combiner_dec", UpSkip: "up_dec", nn.Identity: "normal_dec"}
    found = [kinds[type(getattr(cell, "skip", cell))] for cell in plain(name).dec_tower]
    assert found == notes(name)["dec_tower"]
    assert list(reversed(plain(name).config.groups_per_scale)) == notes(name)["groups_per_scale"]
    assert [list(block.shape) for block in plain(name).layout.blocks] == notes(name)["z_shapes"]


def test_full_size():
    noted = notes("nvae_mnist_full_shapes")
    config = config_from_args(noted["readme_args"])
    generator = NVAE(config, scale_groups(config), crop=2).eval()
    names = {key: list(value.shape) for key, value in generator.state_dict().items()}
    decoder = {key for key in noted["state_dict"] if key.partition(".")[0] not in ENCODER_PARTS}
    aliases = {key for key in decoder if key.endswith("weight_normalized")}
    assert names == {key: noted["state_dict"][key] for key in decoder - aliases}
    assert generator.layout.group_names == ("4x4", "8x8") and generator.layout.group("8x8").blocks == range(5, 15)
    standing_statistics(generator, generator.sample(8, rng_for(0, "statistics")))
    z = generator.sample(2, rng_for(0, "anchor"))
    images = generator.decode(z)
    assert images.shape == (2, 1, 28, 28) and images.std() > 0.01
    torch.testing.assert_close(for_inference(generator).decode(z), images, atol=1e-4, rtol=0)


def test_a_whole_checkpoint_file(tmp_path):
    args = argparse.Namespace(**notes("nvae_mnist")["args"])
    torch.save({"epoch": 1, "state_dict": weights("nvae_mnist"), "args": args}, tmp_path / "checkpoint.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(tmp_path / "checkpoint.pt", map_location="cpu", weights_only=True)
    generator = load_nvae(checkpoint["state_dict"], config_from_args(vars(checkpoint["args"])), crop=2)
    noises = [gold("nvae_mnist")[f"in.eps.{k}"] for k in range(4)]
    assert distance(generator.decode(noises), gold("nvae_mnist")["out.mean"][:, :, 2:30, 2:30]) <= TOLERANCE


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("prior_ftr0"), "'prior_ftr0' is missing"),
    (lambda s: s.update({"dec_tower.8.conv.weight": torch.zeros(1)}), "'dec_tower.8.conv.weight' is not in the module"),
    (lambda s: s.update({"odd.weight_normalized": torch.zeros(1)}), "'odd.weight_normalized' is not in the module"),
    (lambda s: s.update({"stems.weight": torch.zeros(1)}), "'stems.weight' is not in the module"),
    (lambda s: s.update({"dec_sampler.0.1.bias": torch.zeros(9)}), "'dec_sampler.0.1.bias' has shape (9,)"),
])
def test_what_does_not_fit_is_named(change, message):
    state = dict(weights("nvae_mnist"))
    change(state)
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_nvae(state, config_from_args(notes("nvae_mnist")["args"]), "file.pt")


def test_the_oldest_arguments():
    args = {key: value for key, value in notes("nvae_mnist")["args"].items()
            if key not in ("ada_groups", "min_groups_per_scale", "num_mixture_dec")}
    assert config_from_args(args) == config_from_args(notes("nvae_mnist")["args"])


@pytest.mark.parametrize("change, message", [
    ({"dataset": "faces"}, "dataset='faces'"),
    ({"arch_instance": "res_bnelu"}, "arch_instance='res_bnelu'"),
    ({"num_postprocess_blocks": 3}, "num_postprocess_blocks=3"),
    ({"num_latent_scales": 9}, "image_size=32"),
])
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_args(notes("nvae_mnist")["args"] | change)


@pytest.mark.parametrize("dataset, mixtures, expected", [
    ("omniglot", 10, (32, 1, "bernoulli")),
    ("cifar10", 10, (32, 3, "logistic-mixture")),
    ("ffhq", 1, (256, 3, "normal")),
    ("celeba_64", 10, (64, 3, "logistic-mixture")),
])
def test_data_sets_stand_for_images(dataset, mixtures, expected):
    config = config_from_args(notes("nvae_mnist")["args"] | {"dataset": dataset, "num_mixture_dec": mixtures})
    assert (config.image_size, config.image_channels, config.output) == expected


def test_an_unknown_output_is_refused():
    with pytest.raises(ValueError, match="output='poisson'.*bernoulli, logistic-mixture, normal"):
        NVAE(NVAEConfig(output="poisson"))
    with pytest.raises(ValueError, match="colours=1"):
        NVAE(NVAEConfig(output="logistic-mixture"))


def test_configuration_survives_json():
    config = NVAEConfig(image_size=64, ada_groups=True)
    assert NVAEConfig(**json.loads(json.dumps(asdict(config)))) == config


VARIANTS = {
    "one group": NVAEConfig(num_latent_scales=1, num_groups_per_scale=1),
    "one scale": NVAEConfig(num_latent_scales=1, num_groups_per_scale=3),
    "three scales": NVAEConfig(num_latent_scales=3, num_groups_per_scale=4, ada_groups=True, min_groups_per_scale=2),
    "no gates": NVAEConfig(use_se=False),
    "two blocks": NVAEConfig(num_preprocess_blocks=2, num_postprocess_blocks=2, num_cell_per_cond_dec=2),
    "normal output": NVAEConfig(image_channels=3, output="normal"),
    "mixture output": NVAEConfig(image_channels=3, output="logistic-mixture", num_mixture_dec=2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contract_and_merge(variant):
    generator = NVAE(VARIANTS[variant]).eval()
    standing_statistics(generator, generator.sample(8, rng_for(0, "statistics")))
    z = generator.sample(2, rng_for(0, "anchor"))
    images = generator.decode(z)
    with torch.enable_grad():
        check_generator(generator)
    torch.testing.assert_close(for_inference(generator).decode(z), images, atol=TOLERANCE, rtol=0)
    assert images.flatten(1).std(1).min() > 0.01


def test_one_group_is_read_by_the_stem():
    generator = NVAE(VARIANTS["one group"])
    names = {name.partition(".")[0] for name in generator.state_dict()}
    assert names == {"prior_ftr0", "stem_decoder", "post_process", "image_conditional"}
    z = generator.sample(1, rng_for(0, "anchor"))
    assert torch.equal(to_values(generator, z)[0], (torch.tensor(1.0) + 0.01) * z[0])
    expected = F.conv2d(1.01 * z[0], generator.stem_decoder.normalized(), generator.stem_decoder.bias)
    torch.testing.assert_close(generator.stage(0, generator.start(1), z[0]), expected)


def test_the_seed_decides_the_weights():
    a, b, other = (NVAE(NVAEConfig(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["image_conditional.1.weight"], other["image_conditional.1.weight"])


def test_building_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    for_inference(NVAE(NVAEConfig()))
    assert torch.equal(before, torch.get_rng_state())


def test_training_reaches_every_parameter():
    generator = NVAE(NVAEConfig())
    before = copy.deepcopy(generator.state_dict())
    with torch.enable_grad():
        generator.decode(generator.sample(4, rng_for(0, "anchor"))).square().sum().backward()
    assert not [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not torch.equal(before["post_process.0._ops.0.conv.1.bn.running_mean"],
                           generator.state_dict()["post_process.0._ops.0.conv.1.bn.running_mean"])


def test_demo():
    with torch.enable_grad():
        check_generator(demo_nvae())


def test_contrast_raises_the_odds():
    plain, sharp = (NVAE(NVAEConfig(contrast=contrast)).eval() for contrast in (1.0, 2.0))
    z = plain.sample(2, rng_for(0, "z"))
    mean, image = plain.decode(z), sharp.decode(z)
    torch.testing.assert_close(image / (1 - image), (mean / (1 - mean)) ** 2, rtol=1e-3, atol=1e-5)
