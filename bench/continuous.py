"""What continuous sampling adds to a training step, beyond the work of the encoder and of the generator.

`python bench/continuous.py [--quick] [--busy] [--rounds N] [--threads N]` prints a table and replaces its rows in
results/bench/speed.csv. All variants run in one process and take turns step by step, so that what slows the machine down
for a while slows all of them; every round has other batches and new networks. Milliseconds per step, the median over the
rounds; ratios are taken within a round, with the 10th and 90th percentile.

* encoder: augmentation, forward, backward and update on views that lie ready, in a plain loop: what every source costs
* decode: the generator on latents that lie ready, prefixes shared
* stream: a training step of `contrastive.fit` on the continuous source, as users run it
* replayed-4: the same with `Replayed`
* prefetched: the same with `Prefetched`, in a turn of its own, since its thread works while others would be measured
* official: the published style: anchor and positive decoded whole, one after the other, the generator moved to the CPU and
  back in every step. On a CPU nothing moves, so all weights are copied twice instead, a lower bound of the traffic

continuous-overhead is stream over (encoder + decode), 1 is perfect. The others are the peer's time over ours.
"""

import argparse
import threading
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from rows import keep
from torch import Tensor

from mlvgm_mi.contrastive import OBJECTIVES, Contrastive, TrainConfig, fit, small_resnet
from mlvgm_mi.generators.core import load_generator
from mlvgm_mi.latents import Latents
from mlvgm_mi.perturb import Recipe
from mlvgm_mi.precision import half_if
from mlvgm_mi.streams import Prefetched, Replayed
from mlvgm_mi.views import AUGMENTATIONS, ContinuousViews

RECIPE = Recipe({"w0-1": 0.2, "w2-3": 0.8, "w4-5": 0.95, "w6-7": 0.95})
WARM = 4  # steps that do not count
CASES = {  # case -> (ours, peer), sums of variants
    "continuous-overhead": (("stream",), ("encoder", "decode")),
    "continuous-official": (("stream",), ("official",)),
    "continuous-prefetched": (("prefetched",), ("stream",)),
    "continuous-replayed-4": (("replayed-4",), ("stream",)),
}


@dataclass
class Held:
    "A source that hands out a batch when it is told to, and `fit` on it in a thread: one call, one step of the training."

    source: ContinuousViews | Prefetched
    threads: int
    told: threading.Semaphore = field(default_factory=partial(threading.Semaphore, 0))
    asked: threading.Semaphore = field(default_factory=partial(threading.Semaphore, 0))
    over: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, step: int, epoch: int = 0) -> Tensor:
        "The batch, from the source, when it is time."
        self.asked.release()
        self.told.acquire()
        return self.source.batch(step, epoch)

    def start(self, module: Contrastive) -> None:
        "Begins to train, up to the first question for a batch."
        def train() -> None:
            torch.set_num_threads(self.threads)  # a thread starts with the default
            try:
                fit(module, self)
            finally:
                self.over = True
                self.asked.release()

        self.thread = threading.Thread(target=train, daemon=True)
        self.thread.start()
        self.asked.acquire()

    def __call__(self, step: int) -> None:
        "From one question for a batch to the next."
        self.told.release()
        self.asked.acquire()
        if self.over:
            raise RuntimeError("the training ended before its time; its error is above")

    def finish(self) -> None:
        "Ends the training."
        while self.thread.is_alive():
            self.told.release()
            self.thread.join(0.01)


@dataclass
class Bench:
    "One batch size and augmentation."

    source: ContinuousViews
    clock: Callable[[], float]
    steps: int  # timed in each round
    width: int = 16  # of the encoder

    def module(self) -> Contrastive:
        "An encoder with a SimCLR head."
        encoder = small_resnet(self.source.generator.image_shape[0], width=self.width)
        module = Contrastive(encoder, OBJECTIVES["simclr"](encoder.num_features), TrainConfig(WARM + self.steps + 1, warmup=1))
        return module.to(self.source.device)

    def latents(self, step: int) -> tuple[Latents, Latents]:
        "An anchor and its positive."
        stream = partial(self.source.stream, step=step, epoch=0, device=self.source.device)
        anchor = self.source.generator.sample(self.source.batch_size, stream("anchor"))
        return anchor, self.source.perturb(anchor, lambda group: stream(f"step/1/{group}"))

    def train_step(self, module: Contrastive, optimiser: torch.optim.Optimizer, views: Tensor, step: int) -> None:
        "A plain training step."
        rng = self.source.stream("augment", step, 0)
        views = self.source.augment(views.flatten(0, 1), rng).unflatten(0, views.shape[:2])
        with half_if(module.config.precision == "bf16-mixed", views.device):
            loss = module.objective.step(module.encoder, views)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def encoder(self, first: int) -> Callable[[int], None]:
        "Training on views that lie ready."
        module = self.module()
        optimiser, views = module.config.build_optimiser(module.parameters()), self.source.draw(first, 0)
        return lambda step: self.train_step(module, optimiser, views, step)

    def decode(self, first: int) -> Callable[[int], None]:
        "Decoding latents that lie ready."
        ready = {step: self.latents(step) for step in range(first, first + WARM + self.steps)}
        return torch.no_grad()(lambda step: self.source.generator.decode_views(ready[step][0], [ready[step][1]]))

    def official(self, first: int) -> Callable[[int], None]:
        "Two whole decodes, the generator moved away and back, and the training step."
        module, generator = self.module(), deepcopy(self.source.generator)  # the others' stays where it is
        optimiser = module.config.build_optimiser(module.parameters())

        def step(index: int) -> None:
            generator.to("cuda" if torch.cuda.is_available() else "cpu")
            with torch.no_grad():
                views = torch.stack([generator.decode(draw) for draw in self.latents(index)], 1)
                copies = [{name: value.clone() for name, value in generator.state_dict().items()} for _ in range(2)]
            generator.to("cpu")
            self.train_step(module, optimiser, views, index)
            del copies

        return step

    def timed(self, variants: dict[str, Callable[[int], None]], first: int) -> dict[str, float]:
        "Mean seconds per step of each, in turns of one step, after some that do not count."
        times: dict[str, list[float]] = {name: [] for name in variants}
        for step in range(first, first + WARM + self.steps):
            for name, work in variants.items():
                start = self.clock()
                work(step)
                times[name].append(self.clock() - start)
        return {name: float(np.mean(each[WARM:])) for name, each in times.items()}

    def trained(
        self, variants: dict[str, Callable[[int], None]], sources: dict[str, ContinuousViews | Prefetched], first: int
    ) -> dict[str, float]:
        "The same, with `fit` on sources beside."
        held = {name: Held(source, torch.get_num_threads()) for name, source in sources.items()}
        for one in held.values():
            one.start(self.module())
        times = self.timed(variants | held, first)
        for one in held.values():
            one.finish()
        return times

    def round(self, index: int) -> dict[str, float]:
        "Seconds per step of every variant, on batches of this round."
        source = replace(self.source, seed=index)
        again = Replayed(source.generator, source.perturb, replays=4, augment=source.augment, seed=index,
                         batch_size=source.batch_size, steps_per_epoch=source.steps_per_epoch)  # fmt: skip
        first = index * (self.steps + WARM)
        plain = {name: getattr(self, name)(first) for name in ("encoder", "decode", "official")}
        times = self.trained(plain, {"stream": source, "replayed-4": again}, first)
        with Prefetched(source) as ahead:
            return times | self.trained({}, {"prefetched": ahead}, first)


def wall() -> float:
    "Seconds, when the device has done what it was told."
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rows(setting: str, times: pd.DataFrame) -> Iterator[dict[str, object]]:
    "The rows of one setting in speed.csv."
    for case, (ours, peer) in CASES.items():
        ours, peer = (1000 * times[list(names)].sum(axis=1) for names in (ours, peer))
        ratio = ours / peer if case == "continuous-overhead" else peer / ours
        low, high = ratio.quantile([0.1, 0.9])
        yield dict(case=case, setting=setting, ours=round(ours.median(), 2), peer=round(peer.median(), 2), unit="ms/step",
                   ratio=round(ratio.median(), 4), low=round(low, 4), high=round(high, 4))  # fmt: skip


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one batch size, two rounds; writes nothing")
    parser.add_argument("--busy", action="store_true", help="processor seconds, for a machine that has other work; writes nothing")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.busy else wall
    generator = load_generator("fashion-stylegan2").to("cuda" if torch.cuda.is_available() else "cpu")
    grid = [(size, t_x) for size in (32, 64, 128, 256) for t_x in ("none", "no_color")]
    settings = [(64, "no_color")] if options.quick else grid
    found = []
    for size, t_x in settings:
        source = ContinuousViews(generator, RECIPE.perturb(generator.layout), augment=AUGMENTATIONS[t_x], batch_size=size,
                                 steps_per_epoch=1000)  # fmt: skip
        bench = Bench(source, clock, steps=3 if options.quick else max(6, 1024 // size))
        times = pd.DataFrame([bench.round(index) for index in range(2 if options.quick else options.rounds)])
        print(f"batch {size}, {t_x}, ms/step:", (1000 * times.median()).round(1).to_dict(), flush=True)
        found += rows(f"batch {size}, {t_x}", times)
    table = pd.DataFrame(found)
    print(table.to_string(index=False))
    if not (options.quick or options.busy):
        keep(table)


if __name__ == "__main__":
    main()
