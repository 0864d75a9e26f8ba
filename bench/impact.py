"""One sweep for all groups against the published procedure, a separate training per group.

`python bench/impact.py [--generators NAME ...] [--quick] [--busy] [--threads N]` prints tables and replaces its rows in
results/bench/speed.csv. Both sides end with the same table: nats at every strength of every group, each value with the
same standard error or a smaller one. Both run in one process on the same generator and take turns.

* ours: `fit_impact` and its frame: anchors, prefixes and one critic shared by all groups, several looks at a decoded pair
* separate: for every group a fresh critic of the same kind, trained on as many pairs of its group as ours is; every step
  draws fresh anchors, decodes anchor and positive whole, and runs the critic a second time on the updated weights, as the
  published training does for its walker; every measured pair is decoded whole, twice; measuring goes on, a block of
  candidates at a time, until the standard error is as small as ours

The peer's steps are the fewest of several numbers at which its values have caught up with ours (none of the groups lower by
more than the interval of the difference, on average over strengths); so its time is not padded by training that it does
not need. Of each round after the first, only a part of the peer's steps and blocks is run, and scaled up.
"""

import argparse
import math
import time
from dataclasses import dataclass
from typing import Callable

import numpy as np
import pandas as pd
import torch
from rows import keep
from torch import Tensor

from mlvgm_mi.generators.core import GENERATORS, Generator, load_generator
from mlvgm_mi.impact import ALL_GROUPS, ImpactConfig, ImpactCritic, fit_impact
from mlvgm_mi.latents import normal, rng_for
from mlvgm_mi.mi import InfoNCE, MIEstimate, initialise, optimise
from mlvgm_mi.optics import Optics
from mlvgm_mi.perturb import VariancePreserving, single

MOST_BLOCKS = 8


@dataclass
class Separate:
    "The published procedure for one group."

    generator: Generator
    group: str
    config: ImpactConfig
    seed: int

    def __post_init__(self) -> None:
        self.layout = self.generator.layout
        self.drawn = 0  # batches so far, each from streams of its own

    def pairs(self, n: int, strength: float) -> tuple[Tensor, Tensor]:
        "Fresh anchors and positives `(n, C, H, W)`, both decoded whole."
        self.drawn += 1
        rng_of = lambda stream: rng_for(self.seed, f"separate/{self.group}/{stream}", step=self.drawn)  # noqa: E731
        anchor = self.generator.sample(n, rng_of("anchor"))
        moved = single(self.layout, self.group, VariancePreserving(strength))(anchor, rng_of)
        with torch.no_grad():
            return self.generator.decode(anchor), self.generator.decode(moved)

    def scores(self, images: tuple[Tensor, Tensor], strength: float) -> Tensor:
        "Scores `(1, N, N)` under fresh noise."
        condition = torch.tensor([[strength if name == self.group else 0.0 for name in self.layout.group_names]])
        noise = normal((2, len(images[0]), self.optics.size), rng_for(self.seed, f"noise/{self.group}", step=self.drawn))
        x, y = (self.critic.features(self.optics.observe(self.optics.project(i), e)) for i, e in zip(images, noise))
        return self.critic(x, y[None], condition)

    def train(self, steps: int) -> None:
        "Trains a fresh critic on fresh pairs."
        self.optics = Optics(self.pairs(1024, 1.0)[0], self.config.sigma_x, self.config.components)
        self.critic = ImpactCritic(self.optics.size, len(self.layout.groups), self.config.features)
        initialise(self.critic, rng_for(self.seed, f"separate/{self.group}/critic"))
        strengths = rng_for(self.seed, f"separate/{self.group}/strength")
        last: list[tuple[tuple[Tensor, Tensor], float]] = []

        def loss_at(step: int) -> Tensor:
            if last:
                InfoNCE().loss(self.scores(*last.pop()))  # the walker's pass, without its way back through the generator
            draw = torch.rand(2, generator=strengths)
            strength = 1.0 if draw[0] < 0.2 else draw[1].item()
            last.append((self.pairs(self.config.batch, strength), strength))
            return InfoNCE().loss(self.scores(*last[0]))

        optimise(self.critic.parameters(), loss_at, steps, self.config.lr, label=self.group)

    @torch.no_grad()
    def block(self, strength: float) -> Tensor:
        "Scores `(1, N, N)` of fresh pairs, decoded 64 at a time."
        parts = [self.pairs(64, strength) for _ in range(math.ceil(self.config.candidates / 64))]
        images = tuple(torch.cat(side)[: self.config.candidates] for side in zip(*parts))
        return self.scores(images, strength)

    def measure(self, strength: float, error: float) -> MIEstimate:
        "Block after block, until the standard error is at most `error`."
        blocks = [self.block(strength)]
        while InfoNCE().estimate(torch.cat(blocks)).se > error and len(blocks) < MOST_BLOCKS:
            blocks.append(self.block(strength))
        return InfoNCE().estimate(torch.cat(blocks), self.config.sigma_x)


def timed(clock: Callable[[], float], work: Callable[[], object]) -> tuple[float, object]:
    "Seconds and result."
    start = clock()
    found = work()
    return clock() - start, found


def separate(generator: Generator, config: ImpactConfig, frame: pd.DataFrame, steps: int, seed: int) -> pd.DataFrame:
    "The peer's table: a row per group and strength, beside the values of `frame`."
    rows = []
    for group, part in frame.groupby("group", sort=False):
        peer = Separate(generator, group, config, seed)
        peer.train(steps)
        for ours in part.itertuples():
            found = peer.measure(ours.strength, ours.se)
            rows.append((group, ours.strength, ours.mi_nats, ours.se, found.nats, found.se, found.n // config.candidates))
    return pd.DataFrame(rows, columns=["group", "strength", "ours", "ours_se", "separate", "separate_se", "blocks"])


def caught_up(table: pd.DataFrame) -> bool:
    "Whether no group of the peer is lower than ours by more than the interval of the mean difference."
    behind = table.assign(gap=table.ours - table.separate, variance=table.ours_se**2 + table.separate_se**2).groupby("group")
    return bool((behind.gap.mean() <= 1.96 * np.sqrt(behind.variance.mean())).all())


def part_of(generator: Generator, config: ImpactConfig, table: pd.DataFrame, steps: int, seed: int) -> None:
    "An eighth of the peer's work: training steps of every group, and blocks."
    for group, part in table.groupby("group", sort=False):
        peer = Separate(generator, group, config, seed)
        peer.train(steps // 8)
        for _ in range(max(1, round(part.blocks.sum() / 8))):
            peer.block(1.0)


def one_generator(name: str, config: ImpactConfig, steps: list[int], rounds: int, clock: Callable[[], float]) -> dict[str, object]:
    "The row of speed.csv; prints what both sides found."
    generator, ours, peer = load_generator(name), [], []
    warm_up = ImpactConfig(pool=config.batch, steps=2, candidates=64, looks=1, strengths=(1.0,))
    fit_impact(generator, warm_up).frame  # noqa: B018
    for index in range(rounds):
        seconds, frame = timed(clock, lambda: fit_impact(generator, config, seed=index, name=name).frame)
        ours.append(seconds)
        if index:
            peer.append(8 * timed(clock, lambda: part_of(generator, config, table, enough, index))[0])
            continue
        frame = frame[frame.group != ALL_GROUPS]
        for enough in steps:
            seconds, table = timed(clock, lambda: separate(generator, config, frame, enough, seed=0))
            print(f"{name}: separate critics, {enough} steps, {seconds:.1f} s, caught up: {caught_up(table)}", flush=True)
            if caught_up(table):
                break
        peer.append(seconds)
    print(table.assign(difference=table.ours - table.separate,
                       interval=1.96 * np.hypot(table.ours_se, table.separate_se)).round(3).to_string(index=False))  # fmt: skip
    ratio = np.array(peer) / np.array(ours)
    return dict(case="impact", setting=f"{name}, separate critics of {enough} steps", ours=round(np.median(ours), 2),
                peer=round(np.median(peer), 2), unit="s", ratio=round(np.median(ratio), 3), low=round(ratio.min(), 3),
                high=round(ratio.max(), 3))  # fmt: skip


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [name for name in ("fashion-stylegan2", "fashion-bigbigan") if name in GENERATORS]
    parser.add_argument("--generators", nargs="+", default=known)
    parser.add_argument("--quick", action="store_true", help="one round, small numbers; writes nothing")
    parser.add_argument("--busy", action="store_true", help="processor seconds, for a machine that has other work; writes nothing")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.busy else time.perf_counter
    config, steps, rounds = ImpactConfig(), [200, 400, 800], 3
    if options.quick:
        config = ImpactConfig(pool=768, steps=100, candidates=256, strengths=(0.5, 1.0), features=64)
        steps, rounds = [25, 50, 100], 1
    table = pd.DataFrame([one_generator(name, config, steps, rounds, clock) for name in options.generators])
    print(table.to_string(index=False))
    if not (options.quick or options.busy):
        keep(table)


if __name__ == "__main__":
    main()
