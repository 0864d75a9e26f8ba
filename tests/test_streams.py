"Batches made ahead, used again or kept: always those that the same step and epoch would have had."
import gc
import os
import threading
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch

from mlvgm_mi.contrastive import OBJECTIVES, Contrastive, TrainConfig, fit, small_resnet
from mlvgm_mi.generators.core import Generator
from mlvgm_mi.latents import Block, Layout
from mlvgm_mi.perturb import Additive, Perturb, Resample, single
from mlvgm_mi.streams import Prefetched, Recorded, Replayed, in_process, in_thread
from mlvgm_mi.views import AUGMENTATIONS, ContinuousViews, RealViews, mixed, view_loader


class Rows(Generator):
    "Shows its latents: pixel = sigmoid(z), one row of the image per block. Counts the rows it makes."

    layout = Layout.of([Block("a", (8,)), Block("b", (8,))])
    image_shape = (1, 8, 8)
    made = 0

    def start(self, batch):
        return torch.zeros(batch, 1, 0, 8)

    def stage(self, k, state, code):
        self.made += len(code)
        return torch.cat([state.to(code), code[:, None, None].expand(-1, 1, 4, 8)], 2)

    def render(self, state):
        return torch.sigmoid(state)


class Failing(Rows):
    def render(self, state):
        raise ArithmeticError("a bad layer")


class Deadly(Rows):
    def render(self, state):
        os._exit(3)


MOVE_BOTH = Perturb(Rows.layout, {"a": Additive(1), "b": Additive(1)})
PLAN = dict(augment=AUGMENTATIONS["none"], batch_size=6, steps_per_epoch=5)


def continuous(generator=None, perturb=MOVE_BOTH, **plan):
    return ContinuousViews(generator or Rows(), perturb, **(PLAN | plan))


def replayed(replays, perturb=MOVE_BOTH, **plan):
    return Replayed(Rows(), perturb, replays=replays, **(PLAN | plan))


forked = partial(in_process, start="fork")  # quick; `in_process` as it is has a test of its own


# anchors used again

def appearances(batches):
    "Anchor -> the steps in which it was seen; and all positives."
    seen = {}
    for step, batch in enumerate(batches):
        for anchor in batch[:, 0]:
            seen.setdefault(tuple(anchor.flatten().tolist()), []).append(step)
    return seen, torch.cat([batch[:, 1:].flatten(0, 1).flatten(1) for batch in batches])


@pytest.mark.parametrize("replays, views", [(2, 2), (3, 2), (6, 3)])
def test_an_anchor_serves_in_steps_running_with_fresh_positives(replays, views):
    steps = 3 * replays
    batches = list(replayed(replays, views=views, steps_per_epoch=steps))
    seen, positives = appearances(batches)
    assert len(seen) == (steps + replays - 1) * 6 // replays
    whole = [when for when in seen.values() if when[0] > 0 and when[-1] < steps - 1]
    assert all(when == list(range(when[0], when[0] + replays)) for when in whole) and whole
    assert len(positives.unique(dim=0)) == len(positives) == steps * 6 * (views - 1)
    assert all(len(batch[:, 0].flatten(1).unique(dim=0)) == 6 for batch in batches)


def test_positives_belong_to_their_anchors():
    "The group that stays is the same in anchor and positive, whatever the age."
    for batch in replayed(3, single(Rows.layout, "b", Resample())):
        assert torch.equal(batch[:, 0, :, :4], batch[:, 1, :, :4]) and not torch.equal(batch[:, 0, :, 4:], batch[:, 1, :, 4:])


def test_one_replay_is_continuous_sampling():
    assert all(map(torch.equal, replayed(1), continuous()))


def test_replay_pays_for_a_part_of_the_anchors_and_for_moved_suffixes():
    source = replayed(3, single(Rows.layout, "b", Resample()))
    source.batch(2)
    before = source.generator.made
    source.batch(3)
    assert source.generator.made - before == 2 + (2 + 6)  # two new anchors, then with them their six positives


@pytest.mark.parametrize("replays", [1, 2, 3])
def test_replayed_batches_do_not_depend_on_what_came_before(replays):
    make = partial(replayed, replays, augment=AUGMENTATIONS["simclr"])
    source = make()
    source.set_epoch(2)
    batches = list(source)
    for step in (4, 0, 3, 1):
        assert torch.equal(make().batch(step, epoch=2), batches[step]) and torch.equal(source.batch(step, 2), batches[step])
    loader = view_loader(source, workers=2)
    assert all(map(torch.equal, loader, batches))


def test_replayed_anchors_of_ranks_seeds_and_epochs_are_apart():
    sources = [(replayed(2, rank=rank, world_size=2, seed=seed), epoch) for rank in (0, 1) for seed in (0, 1) for epoch in (0, 1)]
    anchors = torch.cat([source.batch(step, epoch)[:, 0].flatten(1) for source, epoch in sources for step in (0, 2)])
    assert len(anchors.unique(dim=0)) == len(anchors)


def test_a_draw_is_not_disturbed_by_one_of_another_thread():
    source, other = replayed(2), []
    of_age = source._of_age

    def interrupted(cohort, age):  # between two cohorts of a batch another batch is drawn
        source._of_age = of_age
        thread = threading.Thread(target=lambda: other.append(source.draw(0, 1)))
        thread.start()
        thread.join()
        return of_age(cohort, age)

    source._of_age = interrupted
    assert torch.equal(source.draw(4, 0), replayed(2).draw(4, 0)) and torch.equal(other[0], replayed(2).draw(0, 1))


@pytest.mark.parametrize("replays", [0, 4, -1])
def test_replays_that_do_not_divide_the_batch(replays):
    with pytest.raises(ValueError, match=f"replays={replays} must divide batch_size=6"):
        replayed(replays)


# made ahead

@pytest.fixture(params=[in_thread, forked], ids=["thread", "process"])
def worker(request):
    return request.param


def test_prefetched_batches_are_those_of_the_source(worker):
    source = replayed(2, augment=AUGMENTATIONS["simclr"])
    jumps = [(0, 0), (1, 0), (4, 0), (0, 1), (1, 1), (3, 1), (0, 0), (0, 0), (4, 3)]
    with Prefetched(source, ahead=3, worker=worker) as ahead:
        for epoch in (0, 2):
            ahead.set_epoch(epoch)
            made = list(ahead)
            assert len(made) == len(ahead) == 5
            assert all(torch.equal(batch, source.batch(step, epoch)) for step, batch in enumerate(made))
        assert all(torch.equal(ahead.batch(*jump), source.batch(*jump)) for jump in jumps)


def test_a_spawned_process_makes_the_same_batches():
    source = continuous(rank=1, world_size=2)
    with Prefetched(source, worker=in_process) as ahead:
        assert all(torch.equal(batch, source.batch(step)) for step, batch in enumerate(ahead))


def test_batches_are_made_before_they_are_asked_for():
    source, made = continuous(), threading.Event()
    original = source.draw
    source.draw = lambda step, epoch: (made.set() if step == 2 else None, original(step, epoch))[1]
    with Prefetched(source, ahead=2) as ahead:
        ahead.batch(0)
        assert made.wait(timeout=60)


def test_errors_of_the_worker_reach_the_user_and_do_not_end_it(worker):
    source = continuous(Failing())
    with Prefetched(source, worker=worker) as ahead:
        for step in (0, 3):
            with pytest.raises(ArithmeticError, match="a bad layer"):
                ahead.batch(step)


def test_a_dead_worker_is_reported_not_waited_for():
    with Prefetched(continuous(Deadly()), worker=forked) as ahead:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the worker that makes batches has died"):
                ahead.batch(0)


def prefetchers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_closing_or_forgetting_ends_the_worker():
    ahead = Prefetched(continuous())
    first = ahead.batch(0)
    assert prefetchers()
    ahead.close()
    assert not prefetchers()
    assert torch.equal(ahead.batch(0), first)  # it starts again when it is needed
    (thread,) = prefetchers()
    del ahead
    gc.collect()
    thread.join(timeout=60)
    assert not prefetchers()


def test_a_loader_with_workers_of_its_own_gets_the_same():
    source = continuous()
    with Prefetched(source) as ahead:
        ahead.batch(0)
        loader = torch.utils.data.DataLoader([0, 1, 2, 3], batch_size=None, num_workers=1, collate_fn=ahead.batch)
        assert all(map(torch.equal, loader, [source.batch(step) for step in range(4)]))


def test_batches_are_brought_to_a_device():
    with Prefetched(continuous(), device="meta") as ahead:
        assert ahead.batch(0).device.type == "meta"


def test_there_must_be_something_ahead():
    with pytest.raises(ValueError, match="ahead=0 must be at least 1"):
        Prefetched(continuous(), ahead=0)


def trained(source, folder, steps=6):
    encoder = small_resnet(1, width=2)
    config = TrainConfig(steps=steps, warmup=1, precision="32-true")
    module = Contrastive(encoder, OBJECTIVES["simclr"](encoder.num_features), config)
    fit(module, source, checkpoint_folder=folder, checkpoint_every=2)
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_run_that_is_cut_and_resumed_on_prefetched_batches_ends_the_same(tmp_path):
    plan = dict(steps_per_epoch=6, augment=AUGMENTATIONS["simclr"])
    reference = trained(replayed(3, **plan), tmp_path / "whole")
    source = replayed(3, **plan)
    original = source.draw
    source.draw = lambda step, epoch: original(step, epoch) if step < 5 else 1 / 0
    with Prefetched(source) as ahead:
        with pytest.raises(ZeroDivisionError):
            trained(ahead, tmp_path / "cut")
    with Prefetched(replayed(3, **plan)) as ahead:
        resumed = trained(ahead, tmp_path / "cut")
    histories = [pd.read_csv(tmp_path / name / "history.csv") for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*histories)
    assert all(torch.equal(reference[name], resumed[name]) for name in reference)


# decoded once

def test_who_comes_second_reads(tmp_path):
    source = continuous()
    first = Recorded.of(source, tmp_path)
    made = [first.batch(step, epoch) for epoch in (0, 1) for step in range(5)]
    assert max((batch - source.batch(i % 5, i // 5)).abs().max() for i, batch in enumerate(made)) <= 0.5 / 255 + 1e-6
    second = Recorded.of(continuous(Failing()), tmp_path)
    assert all(torch.equal(batch, second.batch(i % 5, i // 5)) for i, batch in enumerate(made))
    flipped = Recorded.of(replace(source, augment=AUGMENTATIONS["no_color"]), tmp_path).batch(0)
    assert flipped.shape == made[0].shape and not torch.equal(flipped, made[0])


def test_later_epochs_augment_what_was_decoded_anew(tmp_path):
    source = replace(continuous(), augment=AUGMENTATIONS["no_color"])
    once, flat = Recorded.of(source, tmp_path, epochs=1), Recorded.of(continuous(), tmp_path, epochs=1)
    first, later = ([stream.batch(2, epoch) for epoch in (0, 1)] for stream in (once, flat))
    assert not torch.equal(*first) and torch.equal(*later) and len(list(tmp_path.iterdir())) == 1
    assert not torch.equal(flat.batch(2, 0), Recorded.of(continuous(), tmp_path).batch(2, 1))
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        Recorded.of(source, tmp_path, epochs=0)


def test_ranks_keep_files_of_their_own(tmp_path):
    batches = [Recorded.of(continuous(rank=rank, world_size=2), tmp_path).batch(0) for rank in (0, 1)]
    assert not torch.equal(*batches) and len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_batch_leaves_no_file(tmp_path):
    with pytest.raises(ArithmeticError):
        Recorded.of(continuous(Failing()), tmp_path).batch(0)
    assert not list(tmp_path.iterdir())


# devices

def test_a_stream_moves_with_its_learned_steps():
    class Learned(torch.nn.Linear):
        def forward(self, z, rng):
            return z + super().forward(z)

    source = continuous(perturb=Perturb(Rows.layout, {"b": Learned(8, 8)}))
    source.generator.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    assert source.to(torch.device("meta")) is source
    assert source.device.type == "meta" and source.perturb.steps["b"].weight.is_meta


def test_wrappers_and_mixtures_move_what_they_hold(tmp_path):
    def with_weight():
        source = continuous()
        source.generator.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
        return source

    real = RealViews(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), **PLAN)
    assert real.to("meta") is real and torch.equal(real.batch(0), torch.zeros(6, 2, 1, 8, 8))
    both = mixed(real, with_weight(), 0.5)
    assert both.to("meta") is both and both.generated.device.type == "meta"
    assert Recorded.of(with_weight(), tmp_path).to("meta").source.device.type == "meta"
