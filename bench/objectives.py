"""What a training step costs with each objective, and what precision, memory format and compilation do to it.

`python bench/objectives.py [--quick] [--busy] [--threads N] [--compile]` prints a table and replaces its rows in
results/bench/speed.csv. A step is forward, backward, update and the objective's own update, on views that lie ready; all
variants run in one process and take turns. Milliseconds, the median over the rounds; ratios are taken within a round, with
the 10th and 90th percentile. `--busy` takes the processor's time in place of the wall's.

* objective-<name>: a step with the objective against one with SimCLR (ratio = SimCLR's time over the objective's)
* step-<other precision>, step-contiguous, step-compiled: a SimCLR step as it is by default (bfloat16 if the CPU computes in
  it, else float32; channels last, not compiled) against the same with one thing changed (ratio = the other's time over the
  default's: above 1, the default is right)
"""

import argparse
import time
from typing import Callable

import pandas as pd
import torch
from rows import keep
from torch import Tensor

from mlvgm_mi.contrastive import OBJECTIVES, small_resnet
from mlvgm_mi.latents import rng_for
from mlvgm_mi.precision import computes_bfloat16, half_if
from mlvgm_mi.presets import preset

HALF = computes_bfloat16("cpu")  # as trainings have it


class Variant:
    "An encoder with an objective, ready to step."

    def __init__(self, name: str, channels_last: bool = True, half: bool = HALF, compiled: bool = False):
        self.encoder = small_resnet(1)
        if channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        self.objective = OBJECTIVES[name](self.encoder.num_features)
        self.objective.attach(self.encoder)
        self.half, self.format = half, torch.channels_last if channels_last else torch.contiguous_format
        parameters = (p for module in (self.encoder, self.objective) for p in module.parameters())
        self.optimiser = preset("small", name).config(100).build_optimiser(parameters, self.objective.constant_lr())
        if compiled:
            self.encoder.compile()

    def step(self, views: Tensor) -> None:
        "One update."
        with half_if(self.half):
            features = self.encoder(views.flatten(0, 1).contiguous(memory_format=self.format)).unflatten(0, views.shape[:2])
        self.optimiser.zero_grad()
        self.loss(features.float(), views).backward()
        self.optimiser.step()
        self.objective.after_step(self.encoder, 1)

    def loss(self, features: Tensor, views: Tensor) -> Tensor:
        "The objective's loss of features."
        return self.objective(features)


class WithTarget(Variant):
    "For objectives that see the images."

    def step(self, views: Tensor) -> None:
        "One update."
        with half_if(self.half):
            loss = self.objective.step(self.encoder, views)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.objective.after_step(self.encoder, 1)


def variants(compiled: bool) -> dict[str, Variant]:
    "All of them by case."
    found = {f"objective-{name}": (WithTarget if name == "byol" else Variant)(name) for name in OBJECTIVES}
    found |= {f"step-{'float32' if HALF else 'bfloat16'}": Variant("simclr", half=not HALF)}
    found |= {"step-contiguous": Variant("simclr", channels_last=False)}
    return found | ({"step-compiled": Variant("simclr", compiled=True)} if compiled else {})


def measure(cases: dict[str, Variant], rows: int, rounds: int, clock: Callable[[], float]) -> pd.DataFrame:
    "Milliseconds of a step by case, one row a round; the first round does not count."
    times = []
    for index in range(rounds + 1):
        views = torch.rand(rows, 2, 1, 32, 32, generator=rng_for(0, "views", step=index))
        times.append({})
        for case, variant in cases.items():
            start = clock()
            variant.step(views)
            times[-1][case] = 1000 * (clock() - start)
    return pd.DataFrame(times[1:])


def table(times: pd.DataFrame) -> pd.DataFrame:
    "Rows of speed.csv."
    default, rows = times["objective-simclr"], []
    for case in times:
        ours, peer = (times[case], default) if case.startswith("objective-") else (default, times[case])
        ratio = peer / ours
        low, middle, high = ratio.quantile([0.1, 0.5, 0.9])
        rows.append(dict(case=case, ours=ours.median(), peer=peer.median(), unit="ms/step", ratio=middle, low=low, high=high))
    return pd.DataFrame(rows).round(3)


def main() -> None:
    "Measures, prints, and writes unless the machine is busy or the run is quick."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("--quick", "--busy", "--compile"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds, rows = (2, 128) if options.quick else (20, 256)
    times = measure(variants(options.compile), rows, rounds, time.process_time if options.busy else time.perf_counter)
    found = table(times)
    print(found.to_string(index=False))
    if not (options.quick or options.busy):
        keep(found)


if __name__ == "__main__":
    main()
