"""How fast the families decode, against the plain formulation of the same network with the same weights.

`python bench/decode.py [--quick] [--compile] [--threads N]` prints three tables (speed, where the time goes, half
precision and compilation) and replaces its rows in results/bench/speed.csv. Both sides run in one process and take
turns; a ratio is the peer's time over ours, the median over the rounds, with the 10th and 90th percentile.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Callable, Iterator

import pandas as pd
import torch
from reference import Generator as PlainStyleGAN2
from reference import PlainBigBiGAN
from rows import ROOT, keep
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mlvgm_mi.checkpoints import read_weights
from mlvgm_mi.generators.bigbigan import BigBiGAN, BigBiGANConfig, load_bigbigan, standing_statistics
from mlvgm_mi.generators.core import Generator, for_inference, load_generator
from mlvgm_mi.generators.nvae import config_from_args, load_nvae
from mlvgm_mi.generators.stylegan2 import StyleGAN2, StyleGAN2Config, from_published, weights_file
from mlvgm_mi.latents import Latents, rng_for
from mlvgm_mi.pickles import build_published, read_published

GOLDEN = ROOT / "tests" / "golden"


@dataclass(frozen=True)
class Case:
    "Two ways to the same images."

    case: str  # as in speed.csv
    setting: str
    generator: Generator
    ours: Callable[[Latents], Tensor]
    peer: Callable[[Latents], Tensor]
    batch: int


# ---- the networks --------------------------------------------------------------------------------------------


def golden(name: str) -> dict[str, Tensor]:
    "The state dict of a golden file."
    return {key[3:]: value for key, value in load_file(GOLDEN / f"{name}.safetensors").items() if key.startswith("sd.")}


def plain_stylegan2(ours: StyleGAN2) -> Callable[[Latents], Tensor]:
    "The reference with the weights of `ours`."
    config, state = ours.config, ours.state_dict()
    synthesis = {key: getattr(config, key) for key in ("channel_base", "channel_max", "conv_clamp", "architecture", "use_noise")}
    sizes = [getattr(config, key) for key in ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")]
    network = PlainStyleGAN2(*sizes, {"num_layers": config.num_layers}, synthesis).eval().requires_grad_(False)
    network.load_state_dict(state)
    return lambda z: (network(z[0]) / 2 + 0.5).clamp(0, 1)


def stylegan2_cases(quick: bool) -> Iterator[Case]:
    "Both golden sizes, and what ships; if there is time, 512 channels."
    for name, batch in (("stylegan2_32", 64), ("stylegan2_64", 32)):
        given = json.loads((GOLDEN / f"{name}.json").read_text())["config"]
        known = {**given, **given["synthesis_kwargs"], **given["mapping_kwargs"]}
        config = {field.name: known[field.name] for field in fields(StyleGAN2Config) if field.name in known}
        network = from_published(golden(name), config).eval().requires_grad_(False)
        peer, ours = plain_stylegan2(network), for_inference(network)
        yield Case("decode-stylegan2", f"golden {network.image_shape[-1]}px", ours, ours.decode, peer, batch)
    shipped = load_generator("fashion-stylegan2")
    yield Case("decode-stylegan2", "shipped", for_inference(shipped), shipped.decode, plain_stylegan2(shipped), 64)
    if quick:
        return
    wide = StyleGAN2(StyleGAN2Config(img_resolution=128, channel_base=16384)).eval().requires_grad_(False)
    peer, ours = plain_stylegan2(wide), for_inference(wide)
    yield Case("decode-stylegan2", "128px, up to 512 channels", ours, ours.decode, peer, 4)


def plain_bigbigan(state: dict[str, Tensor], chunk: int) -> Callable[[Latents], Tensor]:
    "The reference with the weights of a published state dict."
    network = PlainBigBiGAN(state, chunk)
    return lambda z: network(torch.cat(z, 1)) / 2 + 0.5


def bigbigan_cases(quick: bool) -> Iterator[Case]:
    "The golden width; if there is time, the published one."
    state = golden("bigbigan_ch8_weights")
    ours = for_inference(load_bigbigan(state, BigBiGANConfig(width=8, n_classes=10)))
    yield Case("decode-bigbigan", "golden 128px, width 8", ours, ours.decode, plain_bigbigan(state, 20), 16)
    if quick:
        return
    wide = BigBiGAN(BigBiGANConfig(n_classes=1)).eval()
    standing_statistics(wide, wide.sample(4, rng_for(0, "statistics")))
    state = {name: tensor.detach().clone() for name, tensor in wide.state_dict().items()}
    ours = for_inference(wide)
    yield Case("decode-bigbigan", "128px, width 96", ours, ours.decode, plain_bigbigan(state, 20), 4)


def nvae_cases() -> Iterator[Case]:
    "Both golden networks: layers as they are published against layers merged for inference."
    for name in ("nvae_mnist", "nvae_cifar"):
        args = json.loads((GOLDEN / f"{name}.json").read_text())["args"]
        plain = load_nvae(golden(f"{name}_weights"), config_from_args(args)).requires_grad_(False)
        ours = for_inference(copy.deepcopy(plain))
        yield Case("decode-nvae", f"golden {name.removeprefix('nvae_')} 32px", ours, ours.decode, plain.decode, 32)


def shipped_cases() -> Iterator[Case]:
    "The small BigBiGAN and NVAE, where their weights are there."
    if (path := weights_file("fashion_bigbigan")).exists():
        state, ours = read_weights(path)[0], load_generator(path)
        peer = plain_bigbigan({name: tensor.float() for name, tensor in state.items()}, ours.config.chunk)
        yield Case("decode-bigbigan", "shipped 32px", ours, ours.decode, peer, 64)
    if weights_file("fashion_nvae").exists():
        plain, ours = read_published_nvae(), load_generator(weights_file("fashion_nvae"))
        yield Case("decode-nvae", "shipped 32px", ours, ours.decode, plain.decode, 32)


def read_published_nvae() -> Generator:
    "The shipped NVAE, its layers as they were trained."
    return build_published(read_published(weights_file("fashion_nvae"))).eval().requires_grad_(False)


SWEPT = ("golden 128px, width 8", "128px, width 96", "golden 64px")


def sweep_cases(decoding: list[Case]) -> Iterator[Case]:
    "An anchor and one positive per group, against two decodes for every pair; ours on both sides."
    for case in decoding:
        if case.setting in SWEPT:
            sweep, apart = partial(one_sweep, case.generator), partial(pairs_apart, case.generator)
            yield Case("impact-sweep", case.setting, case.generator, sweep, apart, max(2, case.batch // 4))


def positives_of(generator: Generator, z: Latents) -> list[Latents]:
    "Per group, `z` with that group drawn again."
    fresh = generator.sample(len(z[0]), rng_for(1, "fresh"))
    return [tuple(f if k in g.blocks else a for k, (a, f) in enumerate(zip(z, fresh))) for g in generator.layout.groups]


def one_sweep(generator: Generator, z: Latents) -> Tensor:
    "All positives, prefixes shared."
    return generator.decode_views(z, positives_of(generator, z))[:, 1:].flatten(0, 1)


def pairs_apart(generator: Generator, z: Latents) -> Tensor:
    "All positives, each pair decoded by itself."
    pairs = [(generator.decode(z), generator.decode(positive)) for positive in positives_of(generator, z)]
    return torch.stack([positive for _, positive in pairs], 1).flatten(0, 1)


# ---- measuring -----------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any]) -> float:
    "Wall time of one call."
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds(ours: Callable[[], Any], peer: Callable[[], Any], budget: float, least: int) -> tuple[list[float], list[float]]:
    "Times of both, taking turns at going first, for about `budget` seconds."
    ours(), peer()
    times: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + budget
    while len(times[0]) < least or time.perf_counter() < until:
        order = [(0, ours), (1, peer)]
        for side, run in order if len(times[0]) % 2 else order[::-1]:
            times[side].append(seconds(run))
    return times


def quantile(values: list[float], share: float) -> float:
    "A quantile of a short list."
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def compared(case: Case, budget: float, least: int) -> dict[str, Any]:
    "A row of speed.csv."
    z = case.generator.sample(case.batch, rng_for(0, "bench"))
    ours, peer = case.ours(z), case.peer(z)
    error = (ours - peer).abs().max().item()
    if error > 1e-4:
        raise RuntimeError(f"{case.case}, {case.setting}: the two formulations differ by {error:.2g}")
    times = rounds(lambda: case.ours(z), lambda: case.peer(z), budget, least)
    ratios = [b / a for a, b in zip(*times)]
    rates = [len(ours) / statistics.median(values) for values in times]
    spread = {"ratio": statistics.median(ratios), "low": quantile(ratios, 0.1), "high": quantile(ratios, 0.9)}
    return {"case": case.case, "setting": f"{case.setting}, batch {case.batch}", "ours": rates[0], "peer": rates[1],
            "unit": "images/s", **spread, "max_error": error, "rounds": len(ratios)}


def peak() -> float:
    "Matrix-product peak of this machine, fp32, in operations per second: the best of several sizes."
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = torch.randn(2, size, size)
        a @ b
        best = max(best, 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(5)))  # noqa: B023
    return best


def operations(run: Callable[[], Any]) -> int:
    "Multiplications and additions of convolutions, matrix products and attention."
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


GROUPS = {  # in this order: the first that matches
    "attention": ("scaled_dot_product",),
    "convolution": ("convolution", "conv2d"),
    "matrix product": ("mm", "linear", "bmm"),
    "layout and copies": ("copy_", "clone", "cat", "contiguous", "_to_copy", "empty", "resize", "stack", "index"),
    "resampling": ("upsample", "max_pool", "mean"),
}


def group_of(operator: str) -> str:
    "Which row of the profile an operator belongs to."
    name = operator.removeprefix("aten::")
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), "elementwise and other")


def where_time_goes(case: Case, top: float) -> dict[str, Any]:
    "Shares of the time by group of operators, and how close to the peak `top` the arithmetic comes."
    z = case.generator.sample(case.batch, rng_for(0, "bench"))
    case.ours(z)
    shares: defaultdict[str, float] = defaultdict(float)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        case.ours(z)
    for event in record.key_averages():
        shares[group_of(event.key)] += event.self_cpu_time_total
    total, best = sum(shares.values()), min(seconds(lambda: case.ours(z)) for _ in range(3))
    done, plain = (operations(lambda run=run: run(z)) for run in (case.ours, case.peer))
    return {"case": case.case, "setting": case.setting, "of_peak": done / best / top, "operations_saved": plain / done,
            **{group: shares[group] / total for group in [*GROUPS, "elementwise and other"]}}


def alternatives(case: Case, compiled: bool, budget: float, least: int) -> list[dict[str, Any]]:
    "Half precision and compilation against our plain decode; nothing of this is chosen by the package."
    z = case.generator.sample(case.batch, rng_for(0, "bench"))
    half = copy.deepcopy(case.generator).bfloat16()
    kept = {id(part): part.bfloat16() for part in z}
    tries = {"bfloat16": lambda: half.decode(tuple(kept[id(part)] for part in z))}
    if compiled:
        faster = torch.compile(case.generator.decode)
        tries["compile"] = lambda: faster(z)
    rows = []
    for name, run in tries.items():
        error = (run().float() - case.ours(z)).abs().max().item()
        ratios = [b / a for a, b in zip(*rounds(run, lambda: case.ours(z), budget, least))]
        rows.append({"case": case.case, "setting": case.setting, "try": name, "ratio": statistics.median(ratios),
                     "low": quantile(ratios, 0.1), "high": quantile(ratios, 0.9), "max_error": error})
    return rows


# ---- the tables ----------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    "Of the command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small networks and few rounds; writes nothing")
    parser.add_argument("--compile", action="store_true", help="try torch.compile too (minutes)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; default: all cores")
    return parser.parse_args()


def main() -> None:
    "Everything in turn."
    given = arguments()
    torch.set_num_threads(given.threads)
    budget, least = (0.0, 2) if given.quick else (8.0, 7)
    pd.set_option("display.width", 200, "display.max_columns", 20, "display.precision", 3)
    decoding = [*bigbigan_cases(given.quick), *stylegan2_cases(given.quick), *nvae_cases(), *shipped_cases()]
    cases = tqdm([*decoding, *sweep_cases(decoding)], disable=None)
    frame = pd.DataFrame([compared(case, budget, least) for case in cases])
    if not given.quick:
        keep(frame)
    print(frame.to_string(index=False))
    top = peak()
    print(f"\nmatrix-product peak: {top / 1e9:.0f} GFLOP/s on {given.threads} threads")
    print(pd.DataFrame([where_time_goes(case, top) for case in decoding]).to_string(index=False))
    print("\nagainst our own fp32 decode:")
    tries = [row for case in decoding for row in alternatives(case, given.compile, budget, least)]
    print(pd.DataFrame(tries).to_string(index=False))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
