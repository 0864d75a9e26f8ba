"""What each process of test_ddp does, and the runs that a process alone is compared on: `ddp_ranks.py FOLDER`, under torchrun."""
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, nn

from mlvgm_mi.contrastive import OBJECTIVES, Contrastive, TrainConfig, fit, small_resnet
from mlvgm_mi.generators.core import LinearGaussian
from mlvgm_mi.latents import rng_for
from mlvgm_mi.perturb import Perturb, VariancePreserving
from mlvgm_mi.views import AUGMENTATIONS, ContinuousViews

TWO = dict(accelerator="cpu", devices=2, strategy="ddp")
OPTIONS = {"emi": dict(projection=3), "swav": dict(prototypes=6)}
STEPS = 3


def place():
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class Slices:
    "Every process has its rows of the same global batches."
    rows: int = 16

    def __len__(self):
        return STEPS

    def batch(self, step, epoch=0):
        whole = torch.rand(self.rows, 3, 1, 8, 8, generator=rng_for(0, "global", step=step), dtype=torch.float64)
        rank, world = place()
        return whole.chunk(world)[rank]


def without_norms(module):
    "Batch norms out: torch can synchronise them on GPUs alone."
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            setattr(module, name, nn.Identity())
        else:
            without_norms(child)
    return module


def exact(name):
    "Float64, plain SGD and no norms: what is left to differ is the arithmetic of the spreading."
    config = TrainConfig(STEPS, lr=1e-3, warmup=1, optimiser="sgd", precision="64-true")
    objective = OBJECTIVES[name](32, **OPTIONS.get(name, {}))
    return Contrastive(without_norms(small_resnet(width=4)), without_norms(objective), config)


class Recording(LinearGaussian):
    "Images of 16x16 pixels; keeps the anchors it was asked for, and counts how often it was moved."
    image_range = (0.0, 1.0)
    moves = 0

    def sample(self, *args, **kwargs):
        self.anchors = getattr(self, "anchors", [])
        self.anchors.append(super().sample(*args, **kwargs))
        return self.anchors[-1]

    def start(self, batch):
        return self.mixing[0].new_zeros(batch, 256)

    def render(self, state):
        return state.view(-1, *self.image_shape).sigmoid()

    def _apply(self, *args, **kwargs):
        self.moves += 1
        return super()._apply(*args, **kwargs)


def continuous():
    generator = Recording.random([1.0, 1.0], pixels=256)
    generator.image_shape = (1, 16, 16)
    perturb = Perturb(generator.layout, {group.name: VariancePreserving(0.5) for group in generator.layout.groups})
    plan = dict(augment=AUGMENTATIONS["none"], batch_size=8, steps_per_epoch=2)
    return ContinuousViews(generator=generator, perturb=perturb, **plan)


def with_norms(name):
    "As in practice: batch norms, AdamW, bfloat16."
    return Contrastive(small_resnet(width=4), OBJECTIVES[name](32, **OPTIONS.get(name, {})), TrainConfig(STEPS, warmup=1))


def dying(fatal):
    "The same batches, until a step of the training."
    source = continuous()
    batch = source.batch

    def until(step, epoch=0):
        if epoch * len(source) + step == fatal:
            raise InterruptedError("killed")
        return batch(step, epoch)

    source.batch = until
    return source


def killed_and_resumed(name, folder):
    "How many checkpoints it left, then its losses and parameters."
    with suppress(InterruptedError):
        fit(with_norms(name), dying(STEPS - 1), folder, checkpoint_every=1, trainer_options=TWO)
    left, module = len(list(folder.glob("step-*.ckpt"))), with_norms(name)
    history = fit(module, continuous(), folder, checkpoint_every=1, trainer_options=TWO)
    return left, history["loss"].tolist(), dict(module.named_parameters())


@dataclass(frozen=True)
class Blind(Slices):
    "Knows no rank."

    def batch(self, step, epoch=0):
        return torch.rand(8, 2, 1, 8, 8, generator=rng_for(0, "blind", step=step), dtype=torch.float64)


def refusal(source):
    try:
        fit(exact("simclr"), source, trainer_options=TWO)
    except ValueError as error:
        return str(error)


def main(folder):
    kept = {"blind": refusal(Blind()), "resumed": killed_and_resumed("byol", folder / "resumed")}
    for name in OBJECTIVES:
        module = exact(name)
        kept[name] = fit(module, Slices(), trainer_options=TWO)["loss"].tolist(), module.state_dict()
    for name in ("byol", "swav"):
        module, source = with_norms(name), continuous()
        history = fit(module, source, folder / name, checkpoint_every=2, trainer_options=TWO)
        kept[f"{name}-norms"] = history["loss"].tolist(), dict(module.named_parameters())
    generator = source.generator
    kept["generator"] = dict(anchors=generator.anchors, moves=generator.moves, names=[name for name, _ in module.named_modules()])
    torch.save(kept, folder / f"rank-{place()[0]}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
