"NVAE's encoder and its bound against the reference network (tests/golden), and mutations that must not pass."
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlvgm_mi.checkpoints import WeightsError, load_into, read_weights, save_weights
from mlvgm_mi.generators.nvae import NVAE, NVAEConfig, config_from_args, load_nvae
from mlvgm_mi.generators.nvae_encoder import DownSkip, NVAEEncoder, encode, load_encoder, posterior
from mlvgm_mi.latents import rng_for

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 5e-5
SMALL = NVAEConfig(image_size=16, num_latent_per_group=2)


@cache
def files(name):
    tensors = load_file(GOLDEN / f"{name}_weights.safetensors")
    state = {key[3:]: value for key, value in tensors.items()}
    return json.loads((GOLDEN / f"{name}.json").read_text()), state, load_file(GOLDEN / f"{name}_io.safetensors")


def halves(name):
    notes, state, _ = files(name)
    config = replace(config_from_args(notes["args"]), num_nf=0)
    plain = {key: value for key, value in state.items() if not key.startswith("nf_cells")}
    return load_encoder(plain, config, name), load_nvae(state, config, name)


def golden_posterior(name, encoder, decoder):
    notes, _, gold = files(name)
    return posterior(encoder, decoder, gold["enc.x"], [gold[f"enc.eps.{k}"] for k in range(notes["n_groups"])])


def distance(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_posterior_divergence_and_logits():
    _, _, gold = files("nvae_mnist")
    found = golden_posterior("nvae_mnist", *halves("nvae_mnist"))
    for k, q in enumerate(found.normals):
        assert distance(q.mu, gold[f"enc.q_mu.{k}"]) <= TOLERANCE
        assert distance(q.sigma, gold[f"enc.q_sigma.{k}"]) <= TOLERANCE
    torch.testing.assert_close(found.kl, gold["enc.kl_all"], rtol=1e-5, atol=0)
    assert distance(found.output.logits, gold["enc.logits"]) <= TOLERANCE
    for normals, key in ((found.normals, "enc.log_q"), (found.priors, "enc.log_p")):
        total = sum(n.log_prob(z).flatten(1).sum(1) for n, z in zip(normals, found.values))
        torch.testing.assert_close(total, gold[key], rtol=1e-5, atol=0)


def test_the_first_group_of_a_model_with_flows():
    _, _, gold = files("nvae_cifar")
    found = golden_posterior("nvae_cifar", *halves("nvae_cifar"))
    assert distance(found.normals[0].mu, gold["enc.q_mu.0"]) <= TOLERANCE
    assert distance(found.normals[0].sigma, gold["enc.q_sigma.0"]) <= TOLERANCE


def absolute_posterior(encoder, decoder, monkeypatch):
    decoder.config = replace(decoder.config, res_dist=False)


def combiners_in_the_encoders_order(encoder, decoder, monkeypatch):
    forward = NVAEEncoder.forward

    def swapped(self, images):
        top, remembered = forward(self, images)
        combiners = [combiner for combiner, _ in remembered]
        return top, [(combiners[i], remembered[k][1]) for k, i in enumerate((0, 2, 1))]
    monkeypatch.setattr(NVAEEncoder, "forward", swapped)


def rows_and_columns_exchanged(encoder, decoder, monkeypatch):
    forward = DownSkip.forward
    monkeypatch.setattr(DownSkip, "forward", lambda self, x: forward(self, x.mT).mT)


def images_not_centred(encoder, decoder, monkeypatch):
    forward = NVAEEncoder.forward
    monkeypatch.setattr(NVAEEncoder, "forward", lambda self, images: forward(self, images / 2 + 0.5))


@pytest.mark.parametrize("mutate", [
    absolute_posterior, combiners_in_the_encoders_order, rows_and_columns_exchanged, images_not_centred,
])
def test_mutations_are_seen(mutate, monkeypatch):
    encoder, decoder = halves("nvae_mnist")
    mutate(encoder, decoder, monkeypatch)
    found = golden_posterior("nvae_mnist", encoder, decoder)
    assert distance(found.output.logits, files("nvae_mnist")[2]["enc.logits"]) > 20 * TOLERANCE


def test_both_halves_together_have_all_official_names():
    noted = json.loads((GOLDEN / "nvae_mnist_full_shapes.json").read_text())
    config = config_from_args(noted["readme_args"])
    encoder, decoder = NVAEEncoder(config), NVAE(config)
    found = {key: list(value.shape) for half in (encoder, decoder) for key, value in half.state_dict().items()}
    assert found == {key: shape for key, shape in noted["state_dict"].items() if not key.endswith("weight_normalized")}
    assert sum(p.numel() for half in (encoder, decoder) for p in half.parameters()) == noted["n_params"]


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("enc0.1.bias"), "'enc0.1.bias' is missing"),
    (lambda s: s.update({"enc_tower.8.conv.weight": torch.zeros(1)}), "'enc_tower.8.conv.weight' is not in the module"),
    (lambda s: s.update({"stem.bias": torch.zeros(9)}), "'stem.bias' has shape (9,)"),
])
def test_what_does_not_fit_is_named(change, message):
    notes, state, _ = files("nvae_mnist")
    state = dict(state)
    change(state)
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_encoder(state, config_from_args(notes["args"]), "file.pt")


def test_flows_are_refused():
    with pytest.raises(ValueError, match="num_nf=1"):
        NVAEEncoder(replace(SMALL, num_nf=1))


def test_encoding_is_inverse_to_decoding_at_the_means():
    encoder, decoder = halves("nvae_mnist")
    images = files("nvae_mnist")[2]["enc.x"]
    means = posterior(encoder, decoder, images, [torch.zeros(())] * 4)
    blocks = encode(encoder, decoder, images)
    assert [tuple(block.shape[1:]) for block in blocks] == [block.shape for block in decoder.layout.blocks]
    torch.testing.assert_close(decoder.decode(blocks), means.output.mean(), atol=1e-4, rtol=0)
    decoder.temperature = 0.5
    torch.testing.assert_close(decoder.decode(encode(encoder, decoder, images)), means.output.mean(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [
    SMALL,
    NVAEConfig(image_size=16, num_latent_scales=1, num_groups_per_scale=1),
    NVAEConfig(image_size=16, image_channels=3, output="logistic-mixture", num_mixture_dec=2, num_channels_enc=4),
    NVAEConfig(image_size=16, image_channels=3, output="normal", res_dist=False, use_se=False),
], ids=["small", "one group", "mixture", "normal"])
def test_the_bound_trains_every_parameter(config):
    encoder, decoder = NVAEEncoder(config), NVAE(config)
    images = torch.rand(4, config.image_channels, 16, 16, generator=rng_for(0, "images"))
    with torch.enable_grad():
        found = posterior(encoder, decoder, images, decoder.sample(4, rng_for(0, "noises")))
        bound = found.elbo(images)
        (-bound.mean()).backward()
    assert bound.shape == (4,) and found.kl.shape == (4, len(decoder.layout.blocks)) and found.kl.min() > 0
    torch.testing.assert_close(bound, found.output.log_prob(images) - found.kl.sum(1))
    silent = [name for half in (encoder, decoder) for name, p in half.named_parameters()
              if p.grad is None or not p.grad.abs().sum() > 0]
    unread = ["prior_ftr0"] if decoder.stem_decoder else []
    assert silent == unread


def test_one_file_holds_both_halves(tmp_path):
    encoder, decoder = NVAEEncoder(SMALL).eval(), NVAE(SMALL).eval()
    path = save_weights(tmp_path / "nvae.safetensors", encoder.state_dict() | decoder.state_dict(), {"kind": "nvae"})
    state, _ = read_weights(path)
    images, noises = torch.rand(2, 1, 16, 16, generator=rng_for(0, "images")), decoder.sample(2, rng_for(0, "noises"))
    again = posterior(load_encoder(state, SMALL), load_nvae(state, SMALL), images, noises)
    assert torch.equal(again.elbo(images), posterior(encoder, decoder, images, noises).elbo(images))
    assert load_into(NVAE(SMALL), decoder.state_dict(), "itself")
