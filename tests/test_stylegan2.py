"StyleGAN2 against numbers of the reference network (tests/golden), and mutations that must not pass."
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlvgm_mi.checkpoints import WeightsError
from mlvgm_mi.generators import stylegan2
from mlvgm_mi.generators.core import check_generator, load_generator
from mlvgm_mi.generators.stylegan2 import StyleGAN2, StyleGAN2Config, from_published, paper_groups, without_noise
from mlvgm_mi.latents import rng_for

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 5e-5


def config_of(name):
    given = json.loads((GOLDEN / f"{name}.json").read_text())["config"]
    fields = {key: given[key] for key in ("z_dim", "w_dim", "img_resolution", "img_channels")}
    return fields | {"num_layers": given["mapping_kwargs"]["num_layers"]} | given["synthesis_kwargs"]


@pytest.fixture(params=["stylegan2_32", "stylegan2_64"])
def golden(request):
    tensors = load_file(GOLDEN / f"{request.param}.safetensors")
    weights = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}
    return from_published(weights, config_of(request.param)).eval(), tensors


def close(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= TOLERANCE


def codes(generator, z):
    (ws,) = generator.embed([(z,) * generator.config.num_ws])
    return torch.stack(ws, 1)


def test_codes_and_images(golden):
    generator, gold = golden
    ws = codes(generator, gold["in.z"])
    close(ws, gold["out.ws"])
    close(generator.synthesize(ws), gold["out.image_psi1"])


def test_truncation_and_cutoff(golden):
    generator, gold = golden
    generator.truncation = 0.7
    ws = codes(generator, gold["in.z"])
    close(ws, gold["out.ws_psi0.7"])
    close(generator.synthesize(ws), gold["out.image_psi0.7"])
    generator.cutoff = 3
    close(codes(generator, gold["in.z"]), gold["out.ws_psi0.7_cutoff3"])


def test_truncation_is_an_argument_too(golden):
    generator, gold = golden
    cut = StyleGAN2(generator.config, truncation=0.7, cutoff=3)
    cut.load_state_dict(generator.state_dict())
    close(codes(cut, gold["in.z"]), gold["out.ws_psi0.7_cutoff3"])


def test_style_mix(golden):
    generator, gold = golden
    close(generator.synthesize(gold["out.ws_mix"]), gold["out.image_mix"])


def test_style_mix_as_latents(golden):
    generator, gold = golden
    slots, split = generator.config.num_ws, generator.config.num_ws // 2
    a, b = gold["in.z"][0:1], gold["in.z"][1:2]
    mixed = generator.decode_views((a,) * slots, [(a,) * split + (b,) * (slots - split)])
    close(mixed[:, 1], (gold["out.image_mix"] / 2 + 0.5).clamp(0, 1))
    close(mixed[:, 0], (gold["out.image_psi1"][:1] / 2 + 0.5).clamp(0, 1))


def test_without_noise(golden):
    generator, gold = golden
    close(without_noise(generator).synthesize(gold["out.ws"][:1]), gold["out.image_nonoise"])
    assert (generator.synthesize(gold["out.ws"][:1]) - gold["out.image_nonoise"]).abs().max() > 1


def test_clamp():
    gold = load_file(GOLDEN / "stylegan2_64.safetensors")
    weights = {key[3:]: value for key, value in gold.items() if key.startswith("sd.")}
    cut = from_published(weights, config_of("stylegan2_64") | {"conv_clamp": 1.5})
    close(cut.synthesize(gold["out.ws"][:2]), gold["out.image_clamp1.5"])
    free = from_published(weights, config_of("stylegan2_64") | {"conv_clamp": None})
    assert (free.synthesize(gold["out.ws"][:2]) - gold["out.image_clamp1.5"]).abs().max() > 0.1


def test_gradients(golden):
    generator, gold = golden
    z = gold["in.z"][:1].clone().requires_grad_()
    ws = codes(generator, z)
    ws.retain_grad()
    (generator.synthesize(ws) * gold["grad.cotangent"]).sum().backward()
    for found, expected in ((z.grad, gold["grad.z0"]), (ws.grad, gold["grad.ws0"])):
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_golden_generators_keep_the_contract(golden):
    generator, _ = golden
    check_generator(generator, tolerance=1e-4)


def test_a_wrong_slot_is_seen(golden):
    generator, gold = golden
    shifted = gold["out.ws_mix"].roll(1, dims=1)
    assert (generator.synthesize(shifted) - gold["out.image_mix"]).abs().max() > 100 * TOLERANCE


def test_bilinear_upsampling_is_seen(golden, monkeypatch):
    generator, gold = golden
    bilinear = lambda image, kernel: torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear")
    monkeypatch.setattr(stylegan2, "upsample_image", bilinear)
    assert (generator.synthesize(gold["out.ws"]) - gold["out.image_psi1"]).abs().max() > 100 * TOLERANCE


def test_the_mapping_runs_once_per_distinct_tensor(golden):
    generator, gold = golden
    rows = []
    generator.mapping.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    anchor = generator.sample(4, rng_for(0, "anchor"))
    fresh = generator.sample(4, rng_for(0, "fresh"))
    generator.decode_views(anchor, [anchor[:2] + fresh[2:], anchor[:5] + fresh[5:]])
    assert rows == [8]


def test_wrong_weights_name_the_key(golden):
    generator, _ = golden
    weights = generator.state_dict()
    with pytest.raises(WeightsError, match="mapping.fc0.weight"):
        from_published({k: v for k, v in weights.items() if k != "mapping.fc0.weight"}, vars(generator.config))
    with pytest.raises(WeightsError, match="synthesis.b8.conv1.bias"):
        from_published(weights | {"synthesis.b8.conv1.bias": torch.zeros(3)}, vars(generator.config))


@pytest.mark.parametrize("size", [0, 2, 48, 33])
def test_wrong_resolution(size):
    with pytest.raises(ValueError, match=f"img_resolution={size}"):
        StyleGAN2Config(img_resolution=size)


def test_paper_groups():
    assert list(paper_groups(16).values()) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert list(paper_groups(10).values()) == [(0, 3), (3, 5), (5, 8), (8, 10)]
    with pytest.raises(ValueError, match="num_ws=2"):
        paper_groups(2)


def test_the_shipped_generator():
    generator = load_generator("fashion-stylegan2")
    assert generator.image_shape == (1, 32, 32)
    check_generator(generator)
    assert generator.layout.group_names == ("w0-1", "w2-3", "w4-5", "w6-7")
