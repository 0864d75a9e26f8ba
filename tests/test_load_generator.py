"`load_generator` finds out what it was given: names, our weights, and published files that others wrote."
import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import foreign_stylegan2
import pickle_corpus as corpus
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mlvgm_mi import cli
from mlvgm_mi.checkpoints import WeightsError, save_weights
from mlvgm_mi.generators import core
from mlvgm_mi.generators.bigbigan import BigBiGAN
from mlvgm_mi.generators.core import check_generator, load_generator
from mlvgm_mi.generators.nvae import NVAE, NVAEConfig
from mlvgm_mi.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from mlvgm_mi.latents import rng_for
from mlvgm_mi.pickles import BUILDERS, read_published

GOLDEN = corpus.GOLDEN


def part(name, prefix):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def shown(raw):
    return (raw / 2 + 0.5).clamp(0, 1)


# ---- pickles of networks that this package has never seen


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    subprocess.run([sys.executable, foreign_stylegan2.__file__, folder], check=True)
    return folder


@pytest.mark.parametrize("variant", foreign_stylegan2.VARIANTS)
def test_foreign_pickles_paint_what_their_network_painted(foreign, variant):
    generator, expected = load_generator(foreign / f"{variant}.pkl"), load_file(foreign / f"{variant}.safetensors")
    arguments = foreign_stylegan2.VARIANTS[variant][1]
    size = arguments["img_resolution"]
    assert generator.image_shape == (arguments["img_channels"], size, size)
    slots, z, other = len(generator.layout.blocks), expected["z"], expected["other"]
    assert f"from{slots - 1}" in expected and f"from{slots}" not in expected
    positives = [(z,) * k + (other,) * (slots - k) for k in range(slots)]
    views = generator.decode_views((z,) * slots, positives)
    for view, name in zip(views.unbind(1), ["image", *(f"from{k}" for k in range(slots))]):
        torch.testing.assert_close(view, shown(expected[name]), atol=5e-5, rtol=0)
    for k, name in enumerate([*(f"from{k}" for k in range(1, slots)), "image"]):
        assert (expected[name] - expected[f"from{k}"]).abs().max() > 1e-2, f"slot {k} could be dropped unseen"


@pytest.mark.parametrize("variant", foreign_stylegan2.VARIANTS)
def test_foreign_pickles_keep_the_contract(foreign, variant):
    check_generator(load_generator(str(foreign / f"{variant}.pkl")))


def test_another_label_is_another_image(foreign):
    generator = load_generator(foreign / "labels.pkl")
    z = generator.sample(2, rng_for(0, "z"))
    before = generator.decode(z)
    generator.mapping.class_id = 5
    assert (generator.decode(z) - before).abs().max() > 0.01


# ---- every kind of file


def ours(folder):
    config = StyleGAN2Config(z_dim=4, w_dim=4, img_resolution=8, img_channels=1, num_layers=1, channel_base=32, channel_max=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = StyleGAN2(config)
    return save_weights(folder / "ours", network.state_dict(), {"family": "stylegan2", "generator": asdict(config)})


def tensorflow(folder):
    static = json.loads((GOLDEN / "stylegan2_tf_32.json").read_text())["static_kwargs"]
    (folder / "tf").write_bytes(corpus.tf_pickle(corpus.numpy_values(part("stylegan2_tf_32", "tf.")), static))
    return folder / "tf"


def bigbigan(folder):
    torch.save(part("bigbigan_ch8_weights", "sd."), folder / "BigBiGAN_x1.pth")
    return folder / "BigBiGAN_x1.pth"


def nvae(folder):
    config = asdict(NVAEConfig())
    args = Namespace(dataset="mnist", arch_instance="res_mbconv", **config)
    state = NVAE(NVAEConfig()).state_dict()
    torch.save({"state_dict": state, "args": args, "arch_instance": {}, "epoch": 3}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


FILES = {
    "ours": (ours, StyleGAN2),
    "pytorch-pickle": (lambda folder: GOLDEN / "stylegan2_32_nosrc_p4.pkl", StyleGAN2),
    "tensorflow-pickle": (tensorflow, StyleGAN2),
    "bigbigan": (bigbigan, BigBiGAN),
    "nvae": (nvae, NVAE),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_is_found_out(tmp_path, kind):
    write, family = FILES[kind]
    path = write(tmp_path)
    for given in (path, str(path)):
        generator = load_generator(given)
        assert isinstance(generator, family) and not generator.training
        assert not any(parameter.requires_grad for parameter in generator.parameters())
    images = generator.decode(generator.sample(2, rng_for(0, "z")))
    assert images.shape == (2, *generator.image_shape) and images.isfinite().all()


def test_merging_changes_no_golden_image(tmp_path):
    generator, io = load_generator(bigbigan(tmp_path)), load_file(GOLDEN / "bigbigan_ch8_io.safetensors")
    assert "blocks.0.0.conv1.u0" not in generator.state_dict()  # spectral norms are folded into the weights
    z = io["in.z"]
    torch.testing.assert_close(generator.decode(z.split(20, 1)), io["out.image"] / 2 + 0.5, atol=5e-5, rtol=0)


def test_walkers_are_read_but_generate_nothing(tmp_path, monkeypatch):
    (tmp_path / "walker.pth").write_bytes(corpus.bases()["walker"])
    assert read_published(tmp_path / "walker.pth").family == "walker"
    monkeypatch.setitem(BUILDERS, "walker", lambda tensors, config, source: torch.nn.Identity())
    with pytest.raises(WeightsError, match="walker.pth: holds a walker, which generates nothing"):
        load_generator(tmp_path / "walker.pth")


# ---- what is neither name nor generator


@pytest.mark.parametrize("name, place", [("stylegan9", "no file"), ("no/such/file.pkl", "no file"), (Path("."), "a folder")])
def test_what_is_not_there_lists_the_names(name, place):
    with pytest.raises(KeyError, match=f"is no known generator and {place}; choose one of .*linear-gaussian"):
        load_generator(name)


STRANGE = {
    "a dict of 2: epoch: 3, weights": lambda path: torch.save({"epoch": 3, "weights": {"a": torch.zeros(2)}}, path),
    "state dict of an unknown network .*conv1.weight": lambda path: torch.save({"conv1.weight": torch.zeros(2)}, path),
    r"no builder for 'an unknown network' \(1 tensors: a": lambda path: save_weights(path, {"a": torch.zeros(2)}, {}),
    "is a web page": lambda path: path.write_text("<!DOCTYPE html>"),
    "damaged or hostile": lambda path: path.write_text("weights"),
}


@pytest.mark.parametrize("found", STRANGE)
def test_strange_files_say_what_was_found(tmp_path, found):
    STRANGE[found](tmp_path / "strange")
    with pytest.raises(WeightsError, match=f"strange: .*{found}"):
        load_generator(tmp_path / "strange")


# ---- a function of one's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A folder with modules of the user's, in a package and outside it."
    (tmp_path / "decoders_of_mine").mkdir()
    code = "from mlvgm_mi.generators.core import demo_linear_gaussian as build\nunfinished = dict\n"
    (tmp_path / "decoders_of_mine" / "linear.py").write_text(code)
    (tmp_path / "needy_of_mine.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_function_of_ones_own_is_called(own):
    generator = load_generator("decoders_of_mine.linear:build")
    assert isinstance(generator, core.LinearGaussian) and not generator.training


@pytest.mark.parametrize("name, message", [
    ("decoders_of_yours:build", "there is no module decoders_of_yours; run where it lies"),
    ("decoders_of_mine.quadratic:build", "there is no module decoders_of_mine.quadratic"),
    ("decoders_of_mine.linear:built", "built is not in decoders_of_mine.linear"),
    ("decoders_of_mine.linear:unfinished", "returned a dict, expected a Generator"),
])
def test_a_function_that_is_none_is_told(own, name, message):
    with pytest.raises(ValueError, match=message):
        load_generator(name)


def test_what_a_module_of_ones_own_misses_is_not_hidden(own):
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        load_generator("needy_of_mine:build")


def test_a_file_wins_over_a_function(own, monkeypatch):
    monkeypatch.chdir(own)
    Path("decoders_of_mine.linear:build").write_text("weights")
    with pytest.raises(WeightsError, match="damaged or hostile"):
        load_generator("decoders_of_mine.linear:build")


def test_the_registry_builds_generators_and_nothing_else(monkeypatch):
    monkeypatch.setitem(core.GENERATORS, "mistaken", dict)
    with pytest.raises(ValueError, match="returned a dict, expected a Generator"):
        load_generator("mistaken")


def test_a_name_wins_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("linear-gaussian").write_text("not a network")
    assert isinstance(load_generator("linear-gaussian"), core.LinearGaussian)


def test_the_command_line_takes_a_file(tmp_path, monkeypatch):
    measured = []

    def fit(generator, *settings):
        measured.append(generator)
        raise ValueError("seen enough")

    monkeypatch.setattr(cli, "fit_impact", fit)
    path = GOLDEN / "stylegan2_32_nosrc_p3_emulated_old.pkl"
    result = CliRunner().invoke(cli.app, ["impact", str(path), "--out", str(tmp_path)])
    assert "seen enough" in str(result.exception) and measured[0].image_shape == (3, 32, 32)
