"Networks of published size: names and shapes as published, one image, and memory that a careless version would exceed."
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import full_size
import pytest

from mlvgm_mi.generators.nvae import ENCODER_PARTS
from mlvgm_mi.snapshots import _stylegan2_config, stylegan2_shapes

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is accounted by Linux only")
pytestmark = [pytest.mark.slow, linux]

# Megabytes by which a process may grow while it decodes one image. Kept for a backward pass, the features of all
# layers would not fit.
BOUNDS = {"stylegan2-512": 600, "stylegan2-1024": 900, "bigbigan-128": 300, "nvae-mnist": 60}


@cache
def facts(name, *mode):
    run = subprocess.run([sys.executable, full_size.__file__, name, *mode], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def golden(name):
    return json.loads((full_size.GOLDEN / f"{name}_full_shapes.json").read_text())["state_dict"]


def stylegan2_names(size):
    sizes = {"z_dim": 512, "c_dim": 0, "w_dim": 512, "img_resolution": size, "img_channels": 3}
    return {name: list(shape) for name, shape in stylegan2_shapes(_stylegan2_config(sizes)).items()}


def nvae_decoder():
    "The published tensors without the encoder's, and without second names of the same tensor."
    aside = (*ENCODER_PARTS, "combiner_enc")
    return {
        name: shape for name, shape in golden("nvae_mnist").items()
        if name.partition(".")[0] not in aside and not name.endswith(".weight_normalized")
    }


EXPECTED = {
    "stylegan2-512": lambda: stylegan2_names(512),
    "stylegan2-1024": lambda: stylegan2_names(1024),
    "bigbigan-128": lambda: golden("bigbigan"),
    "nvae-mnist": nvae_decoder,
}


@pytest.mark.parametrize("name", full_size.NETWORKS)
def test_names_shapes_and_an_image(name):
    found = facts(name)
    assert found["shapes"] == EXPECTED[name]()
    assert found["image"] == [1, *found["promised"]] and found["finite"]


@pytest.mark.parametrize("name", full_size.NETWORKS)
def test_peak_memory(name):
    assert facts(name)["grown"] <= BOUNDS[name]


def test_the_bound_would_notice_features_that_are_kept():
    assert facts("stylegan2-512", "hungry")["grown"] > BOUNDS["stylegan2-512"]
