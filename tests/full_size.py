"""Builds a network of published size with random weights and decodes one image, in a process of its own.

`python full_size.py NAME [hungry]` prints a line of JSON: names and shapes of the weights, shape of the image, whether
it is finite, and megabytes by which decoding made the process grow at its peak. A hungry run keeps what a backward
pass would need. Linux only: `ru_maxrss` cannot be used, a child inherits it from its parent and building leaves it high.
"""
import json
import re
import sys
from pathlib import Path

import torch

from mlvgm_mi.generators.bigbigan import BigBiGAN, BigBiGANConfig
from mlvgm_mi.generators.core import for_inference
from mlvgm_mi.generators.nvae import NVAE, config_from_args
from mlvgm_mi.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from mlvgm_mi.latents import rng_for

GOLDEN = Path(__file__).parent / "golden"


def nvae():
    args = json.loads((GOLDEN / "nvae_mnist_full_shapes.json").read_text())["readme_args"]
    return NVAE(config_from_args(args))


NETWORKS = {
    "stylegan2-512": lambda: StyleGAN2(StyleGAN2Config(img_resolution=512)),
    "stylegan2-1024": lambda: StyleGAN2(StyleGAN2Config(img_resolution=1024)),
    "bigbigan-128": lambda: BigBiGAN(BigBiGANConfig()),
    "nvae-mnist": nvae,
}


def megabytes(entry):
    "An entry of the kernel's account of this process: VmRSS, in memory now; VmHWM, the peak."
    return int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def main(name, *mode):
    torch.set_num_threads(1)
    network = NETWORKS[name]()
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    if "hungry" not in mode:
        network = for_inference(network)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
    before = megabytes("VmRSS")
    z = network.eval().sample(1, rng_for(0, "z"))
    image = network.decode(z)
    facts = {"image": list(image.shape), "promised": list(network.image_shape), "finite": bool(image.isfinite().all())}
    print(json.dumps({"shapes": shapes, **facts, "grown": megabytes("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
