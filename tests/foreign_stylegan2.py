"""Writes pickles as the StyleGAN2-ADA release lays them out, from networks that are not of this package, and what they paint.

As a program, `python foreign_stylegan2.py FOLDER`: per variant a pickle, and a safetensors file with latents and images
that the networks of `bench/reference.py` themselves made. Run it in a process of its own: it changes how modules pickle.
"""
import pickle
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import reference  # noqa: E402

VARIANTS = {  # (protocol, arguments)
    "skip-16": (4, dict(z_dim=24, c_dim=0, w_dim=20, img_resolution=16, img_channels=3,
                        mapping_kwargs=dict(num_layers=2), synthesis_kwargs=dict(channel_base=160, channel_max=12))),
    "skip-128": (3, dict(z_dim=10, c_dim=0, w_dim=14, img_resolution=128, img_channels=1,
                         mapping_kwargs=dict(num_layers=5, lr_multiplier=0.1),
                         synthesis_kwargs=dict(channel_base=384, channel_max=18, conv_clamp=2, num_fp16_res=4))),
    "orig": (5, dict(z_dim=12, c_dim=0, w_dim=12, img_resolution=32, img_channels=3, mapping_kwargs=dict(num_layers=3),
                     synthesis_kwargs=dict(channel_base=256, channel_max=24, architecture="orig"))),
    "resnet": (2, dict(z_dim=12, c_dim=0, w_dim=12, img_resolution=32, img_channels=3, mapping_kwargs=dict(num_layers=3),
                       synthesis_kwargs=dict(channel_base=256, channel_max=24, architecture="resnet", conv_clamp=3))),
    "labels": (4, dict(z_dim=9, c_dim=6, w_dim=12, img_resolution=16, img_channels=2,
                       mapping_kwargs=dict(num_layers=3, embed_features=7, layer_features=15),
                       synthesis_kwargs=dict(channel_base=128, channel_max=16))),
    "no-noise": (4, dict(z_dim=8, c_dim=0, w_dim=8, img_resolution=8, img_channels=3, mapping_kwargs=dict(num_layers=1),
                         synthesis_kwargs=dict(channel_base=64, channel_max=8, use_noise=False))),
}


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the source text in a file would run now")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
SOURCE = "raise SystemExit('source text of a file was executed')"


def persistent(module, protocol):
    state = dict(module.__dict__)
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": type(module).__name__, "state": state}
    return _reconstruct_persistent_obj, (meta,)


def write(folder, name, protocol, arguments):
    numbers = torch.Generator().manual_seed(7)
    network = reference.Generator(**arguments).eval().requires_grad_(False)
    rate = arguments["mapping_kwargs"].get("lr_multiplier", 0.01)
    for key, tensor in network.state_dict().items():
        if not key.endswith("resample_filter"):
            tensor.copy_(torch.randn(tensor.shape, generator=numbers))
            tensor.add_(1 if key.endswith("affine.bias") else 0).div_(rate if key.startswith("mapping.fc") else 1)
    network._init_args, network._init_kwargs = (), arguments
    z, other = torch.randn(2, 3, arguments["z_dim"], generator=numbers)
    labels = torch.eye(arguments["c_dim"])[:1].repeat(3, 1) if arguments["c_dim"] else None
    ws, changed = network.mapping(z, labels), network.mapping(other, labels)
    images = {f"from{k}": network.synthesis(torch.cat([ws[:, :k], changed[:, k:]], 1)) for k in range(network.num_ws)}
    save_file({"z": z, "other": other, "image": network.synthesis(ws), **images}, folder / f"{name}.safetensors")
    snapshot = {"training_set_kwargs": {}, "G": network, "D": None, "G_ema": network, "augment_pipe": None}
    (folder / f"{name}.pkl").write_bytes(pickle.dumps(snapshot, protocol))


if __name__ == "__main__":
    home = ModuleType("torch_utils.persistence")
    home._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules |= {"torch_utils": ModuleType("torch_utils"), "torch_utils.persistence": home}
    torch.nn.Module.__reduce_ex__ = persistent
    for name, (protocol, arguments) in VARIANTS.items():
        write(Path(sys.argv[1]), name, protocol, arguments)
