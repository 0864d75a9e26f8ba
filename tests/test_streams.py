"Batches made ahead, used again or kept: always those that the same step and epoch would have had."
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import lightning
import pandas as pd
import psutil
import pytest
import torch

from mlvgm_mi.cells import described, digest
from mlvgm_mi.contrastive import OBJECTIVES, Contrastive, PlaceSource, Repeated, TrainConfig, fit, small_resnet
from mlvgm_mi.generators.core import Generator
from mlvgm_mi.latents import Block, Layout
from mlvgm_mi.perturb import Additive, Perturb, Resample, single
from mlvgm_mi.streams import Prefetched, Recorded, Replayed, in_process, in_thread
from mlvgm_mi.views import AUGMENTATIONS, ContinuousViews, RealViews, mixed, view_loader


class Rows(Generator):
    "Shows its latents: pixel = sigmoid(z), one row of the image per block. Counts the rows it makes."

    layout = Layout.of([Block("a", (8,)), Block("b", (8,))])
    image_shape = (1, 8, 8)
    _made = 0

    def start(self, batch):
        return torch.zeros(batch, 1, 0, 8)

    def stage(self, k, state, code):
        self._made += len(code)
        return torch.cat([state.to(code), code[:, None, None].expand(-1, 1, 4, 8)], 2)

    def render(self, state):
        return torch.sigmoid(state)


class Placed(Rows):
    "Makes its images where, and in the number format in which, its weight is."

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def render(self, state):
        return super().render(state).to(self.weight)


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
    before = source.generator._made
    source.batch(3)
    assert source.generator._made - before == 2 + (2 + 6)  # two new anchors, then with them their six positives


@pytest.mark.parametrize("replays", [1, 2, 3])
def test_replayed_batches_do_not_depend_on_what_came_before(replays):
    make = partial(replayed, replays, augment=AUGMENTATIONS["simclr"])
    source = make()
    source.set_epoch(2)
    batches = list(source)
    for step in (4, 0, 3, 1):
        assert torch.equal(make().batch(step, epoch=2), batches[step]) and torch.equal(source.batch(step, 2), batches[step])
    source.set_epoch(2)
    assert all(torch.equal(*pair) for pair in zip(view_loader(source, workers=2), batches, strict=True))


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


def test_older_cohorts_do_not_stay_behind_where_the_source_was():
    source = Replayed(Placed(), MOVE_BOTH, replays=3, **PLAN)
    stream = source.stream
    source.stream = lambda *address, device, **more: stream(*address, **more)  # "meta" has no random numbers
    assert source.draw(2, 0).device.type == "cpu"
    assert source.to("meta") is source and source.draw(3, 0).device.type == "meta"


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


KILLED = """
import os, signal, sys, torch
from mlvgm_mi.streams import in_process
from mlvgm_mi.views import AUGMENTATIONS, RealViews

if __name__ == "__main__":
    images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    executor = in_process(RealViews(images, augment=AUGMENTATIONS["none"], batch_size=4), sys.argv[1])
    print(executor.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def ended(pid):
    "Whether a process is gone, or waits for nothing but to be buried."
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_does_not_outlive_a_parent_that_is_killed(tmp_path, start):
    (tmp_path / "killed.py").write_text(KILLED)
    with open(tmp_path / "pid", "w") as out, open(tmp_path / "log", "w") as log:  # pipes would be waited for until all is over
        done = subprocess.run([sys.executable, tmp_path / "killed.py", start], stdout=out, stderr=log)
    assert done.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    worker = int((tmp_path / "pid").read_text())
    try:
        deadline = time.monotonic() + 60
        while not ended(worker):
            assert time.monotonic() < deadline, f"process {worker} is still there"
            time.sleep(0.1)
    finally:
        if not ended(worker):
            os.kill(worker, signal.SIGKILL)


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


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_of_a_loader_share_the_steps(workers, started):
    source = continuous()
    with Prefetched(source) as ahead:
        if started:
            ahead.batch(0)
        loader = view_loader(ahead, workers)
        for epoch in (0, 1):
            ahead.set_epoch(epoch)
            made = list(loader)
            assert len(made) == len(loader) == 5
            assert all(torch.equal(batch, source.batch(step, epoch)) for step, batch in enumerate(made))


@pytest.mark.parametrize("loaded", [iter, partial(view_loader, workers=0), partial(view_loader, workers=2)],
                         ids=["plain", "loader", "workers"])
def test_passes_over_what_is_prefetched_are_epochs(worker, loaded):
    source = continuous()
    with Prefetched(source, worker=worker) as ahead:
        for epoch in (0, 1, 2):
            made = list(loaded(ahead))
            assert len(made) == 5 and all(torch.equal(batch, source.batch(step, epoch)) for step, batch in enumerate(made))


def test_nothing_is_made_twice_or_in_vain_from_pass_to_pass():
    source, asked = continuous(), []
    original = source.draw
    source.draw = lambda step, epoch: (asked.append((step, epoch)), original(step, epoch))[1]
    with Prefetched(source, ahead=2) as ahead:
        batches = [*ahead, *ahead]
    made = [(step, epoch) for epoch in (0, 1) for step in range(5)]
    assert len(batches) == 10 and asked[:10] == made and set(asked[10:]) <= {(0, 2), (1, 2)}


class Watching(lightning.LightningModule):
    "Keeps what it is trained on."

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, views, step):
        self.seen.append(views)
        return self.weight * views.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_that_knows_of_no_epochs_is_served_new_batches(workers):
    source, module = continuous(), Watching()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    lightning.Trainer(max_epochs=3, accelerator="cpu", **quiet).fit(module, view_loader(source, workers))
    expected = [source.batch(step, epoch) for epoch in range(3) for step in range(5)]
    assert len(module.seen) == 15 and all(map(torch.equal, module.seen, expected))


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

def test_who_comes_second_reads(tmp_path, monkeypatch):
    source = continuous()
    first = Recorded.of(source, tmp_path)
    made = [first.batch(step, epoch) for epoch in (0, 1) for step in range(5)]
    assert max((batch - source.batch(i % 5, i // 5)).abs().max() for i, batch in enumerate(made)) <= 0.5 / 255 + 1e-6
    monkeypatch.setattr(ContinuousViews, "draw", lambda *_: pytest.fail("drawn again"))
    second = Recorded.of(continuous(), tmp_path)
    assert all(torch.equal(batch, second.batch(i % 5, i // 5)) for i, batch in enumerate(made))
    flipped = Recorded.of(replace(source, augment=AUGMENTATIONS["no_color"]), tmp_path).batch(0)
    assert flipped.shape == made[0].shape and not torch.equal(flipped, made[0])


def test_later_epochs_augment_what_was_decoded_anew(tmp_path):
    source = replace(continuous(), augment=AUGMENTATIONS["no_color"])
    once, flat = Recorded.of(source, tmp_path, epochs=1), Recorded.of(continuous(), tmp_path, epochs=1)
    first, later = ([stream.batch(2, epoch) for epoch in (0, 1)] for stream in (once, flat))
    assert not torch.equal(*first) and torch.equal(*later) and len(list(tmp_path.glob("*.npy"))) == 1
    assert not torch.equal(flat.batch(2, 0), Recorded.of(continuous(), tmp_path).batch(2, 1))
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        Recorded.of(source, tmp_path, epochs=0)


def test_passes_are_recorded_epoch_by_epoch_or_augmented_anew(tmp_path):
    every, one = Recorded.of(continuous(), tmp_path / "every"), Recorded.of(continuous(), tmp_path / "one", epochs=1)
    passes = {stream: [torch.stack(list(stream)) for _ in range(2)] for stream in (every, one)}
    assert not torch.equal(*passes[every]) and torch.equal(*passes[one])
    assert [len(list(stream.folder.glob("*.npy"))) for stream in (every, one)] == [10, 5]
    flipped = replace(one, augment=AUGMENTATIONS["no_color"])
    assert not torch.equal(*(torch.stack(list(flipped)) for _ in range(2)))


def test_ranks_keep_files_of_their_own(tmp_path):
    batches = [Recorded.of(continuous(rank=rank, world_size=2), tmp_path).batch(0) for rank in (0, 1)]
    assert not torch.equal(*batches) and len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.parametrize("kind", ["stored", "mixed"])
def test_other_numbers_of_ranks_keep_files_of_their_own(tmp_path, kind):
    for world_size in (1, 2, 3, 1):
        source = stored(world_size=world_size)
        source = source if kind == "stored" else mixed(source, continuous(world_size=world_size), 0.25)
        drawn = (source.draw(1, 0) * 255).round() / 255
        torch.testing.assert_close(Recorded.of(source, tmp_path).batch(1), drawn, atol=1e-6, rtol=0)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["0-0-000001.npy", "0of2-0-000001.npy", "0of3-0-000001.npy"]


def test_an_interrupted_batch_leaves_no_file(tmp_path):
    with pytest.raises(ArithmeticError):
        Recorded.of(continuous(Failing()), tmp_path).batch(0)
    assert not list(tmp_path.glob("*.npy*"))


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
    real = RealViews(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), **PLAN)
    assert real.to("meta") is real and torch.equal(real.batch(0), torch.zeros(6, 2, 1, 8, 8))
    both = mixed(real, continuous(Placed()), 0.5)
    assert both.to("meta") is both and both.generated.device.type == "meta"
    recorded = Recorded.of(continuous(Placed()), tmp_path)
    assert recorded.to("meta") is recorded and recorded.source.device.type == "meta"
    ahead = Prefetched(continuous(Placed()))
    assert ahead.to("meta") is ahead and ahead.source.device.type == "meta"


# a number format stands for a device in what follows: modules move to both alike, and there is one device only

@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_worker_moves_with_its_source_and_no_batch_is_lost(worker, steps):
    source, expected = continuous(Placed()), continuous(Placed()).to(torch.float64)
    with Prefetched(source, worker=worker) as ahead:
        before = [ahead.batch(step) for step in range(steps)]
        ahead.to(torch.float64)
        after = [ahead.batch(step) for step in range(steps, 5)]
    assert {batch.dtype for batch in before} <= {torch.float32} and {batch.dtype for batch in after} == {torch.float64}
    assert all(torch.equal(batch, expected.batch(step).to(batch)) for step, batch in enumerate(before + after))


@pytest.mark.parametrize("steps", [0, 1])
def test_a_chosen_device_stays_chosen(steps):
    with Prefetched(continuous(Placed()), device="cpu") as ahead:
        for step in range(steps):
            ahead.batch(step)
        assert ahead.to("meta") is ahead and ahead.source.device.type == "cpu"
        assert torch.equal(ahead.batch(1), continuous(Placed()).batch(1))


def test_a_worker_that_places_the_source_has_the_last_word():
    with Prefetched(continuous(Placed()), worker=lambda source: in_thread(source.to(torch.float64))) as ahead:
        assert ahead.to(torch.float32).batch(0).dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ahead: pickle.loads(pickle.dumps(ahead))], ids=["copied", "pickled"])
def test_a_copy_moves_and_works_alone(copied):
    with Prefetched(continuous(Placed())) as ahead:
        first = ahead.batch(0)
        with copied(ahead).to(torch.float64) as other:
            assert [stream.batch(1).dtype for stream in (other, ahead)] == [torch.float64, torch.float32]
            assert torch.equal(other.batch(0).float(), first)


def test_training_moves_a_prefetched_source():
    ahead = Prefetched(continuous(Placed()))
    PlaceSource(ahead).on_fit_start(None, SimpleNamespace(device="meta"))
    assert ahead.source.device.type == "meta"


def test_what_cannot_be_moved_is_prefetched_all_the_same():
    batch = continuous().batch(0)
    with Prefetched(Repeated([batch])) as ahead:
        assert torch.equal(ahead.to("meta").batch(0), batch)


# sizes

REAL = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)


def stored(**plan):
    return RealViews(REAL, **(PLAN | dict(batch_size=8) | plan))


def test_a_recording_keeps_the_size_it_has(tmp_path):
    recorded = Recorded.of(continuous(batch_size=8), tmp_path)
    for other in (partial(mixed, stored(), recorded, 0.25), partial(recorded.with_batch_size, 2),
                  partial(replace, recorded, batch_size=2)):
        with pytest.raises(ValueError, match="batch_size=2 and views=2, .* has 8 and 2; .* mix first and record the mixture"):
            other()
    with pytest.raises(ValueError, match="batch_size=8 and views=3, .* has 8 and 2"):
        replace(recorded, views=3)
    assert recorded.with_batch_size(8).batch_size == 8


@pytest.mark.parametrize("change", [dict(seed=1), dict(rank=1, world_size=2), dict(world_size=2)])
def test_a_recording_has_the_seed_and_rank_of_its_source(tmp_path, change):
    recorded = Recorded.of(continuous(), tmp_path)
    with pytest.raises(ValueError, match=r"its source draws with seed=0, rank=0, world_size=1; .*Recorded.of\(replace"):
        replace(recorded, **change)
    with pytest.raises(ValueError, match="generated draws with seed=0, rank=0, world_size=1, the mixture"):
        mixed(stored(**change), Recorded.of(continuous(batch_size=2), tmp_path), 0.25)


def test_a_recording_of_the_size_it_takes_can_be_mixed(tmp_path):
    drawn = mixed(stored(), continuous(batch_size=2), 0.25)
    for name, source in {"part": mixed(stored(), Recorded.of(continuous(batch_size=2), tmp_path / "part"), 0.25),
                         "whole": Recorded.of(drawn, tmp_path / "whole")}.items():
        for step in (1, 1, 0):
            torch.testing.assert_close(source.batch(step), drawn.batch(step), atol=0.5 / 255 + 1e-6, rtol=0)
        assert source.image_shape == (1, 8, 8) and len(list((tmp_path / name).glob("*.npy"))) == 2


RECORDED_OTHERS = [dict(batch_size=4), dict(views=3), dict(seed=1), dict(clip=1.0), dict(generator=Placed()),
                   dict(perturb=Perturb(Rows.layout, {"a": Additive(1), "b": Additive(2)}))]  # fmt: skip


@pytest.mark.parametrize("other", RECORDED_OTHERS, ids=lambda other: next(iter(other)))
@pytest.mark.parametrize("step", [1, 2])
def test_a_folder_of_another_source_is_refused(tmp_path, other, step):
    Recorded.of(continuous(), tmp_path).batch(1)
    with pytest.raises(ValueError, match="holds the batches of another source .*a folder of its own"):
        Recorded.of(continuous(**other), tmp_path).batch(step)
    assert len(list(tmp_path.glob("*.npy"))) == 1


@pytest.mark.parametrize("other", [".gitkeep", ".DS_Store", "images.npy"])
def test_a_folder_with_other_files_in_it_gets_its_name(tmp_path, other):
    (tmp_path / other).touch()
    Recorded.of(continuous(), tmp_path).batch(1)
    with pytest.raises(ValueError, match="holds the batches of another source"):
        Recorded.of(continuous(seed=1), tmp_path).batch(1)


@pytest.mark.parametrize("same", [dict(steps_per_epoch=4), dict(augment=AUGMENTATIONS["no_color"]), dict(rank=1, world_size=2)])
def test_a_folder_serves_other_lengths_augmentations_and_ranks(tmp_path, same):
    Recorded.of(continuous(), tmp_path).batch(1)
    Recorded.of(continuous(**same), tmp_path).batch(1)


@pytest.mark.parametrize("other", [dict(batch_size=4), dict(views=3)])
def test_batches_of_other_shapes_are_refused_in_folders_without_a_name(tmp_path, other):
    Recorded.of(continuous(), tmp_path).batch(1)
    (tmp_path / "source.txt").unlink()
    with pytest.raises(ValueError, match=r"0-0-000001.npy has shape \(6, 2, 1, 8, 8\), expected .*a folder of its own"):
        Recorded.of(continuous(**other), tmp_path).batch(1)


@pytest.mark.parametrize("use, problem", [
    (lambda ahead, folder: mixed(stored(), ahead, 0.5), r"generated is a Prefetched, .*Prefetched\(mixed"),
    (lambda ahead, folder: mixed(ahead, stored(), 0.5), r"real is a Prefetched, .*Prefetched\(mixed"),
    (lambda ahead, folder: Recorded.of(ahead, folder), r"source is a Prefetched, .*Prefetched\(Recorded"),
], ids=["generated", "real", "recorded"])
def test_what_is_augmented_already_is_not_mixed_or_recorded(tmp_path, use, problem):
    with Prefetched(continuous()) as ahead, pytest.raises(TypeError, match=problem):
        use(ahead, tmp_path)


def test_a_mixture_can_be_prefetched():
    both = mixed(stored(), continuous(), 0.25)
    with Prefetched(both) as ahead:
        assert all(torch.equal(batch, both.batch(step)) for step, batch in enumerate(ahead))


# what the batches depend on

def named(source):
    return digest(described(source))


OTHERS = {
    "seed": dict(seed=1), "rows": dict(batch_size=8), "views": dict(views=3), "steps": dict(steps_per_epoch=4),
    "augmentation": dict(augment=AUGMENTATIONS["no_color"]), "clip": dict(clip=1.0),
    "step": dict(perturb=Perturb(Rows.layout, {"a": Additive(1), "b": Additive(2)})), "generator": dict(generator=Placed()),
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_other_settings_are_another_source(changes):
    assert named(continuous(**changes)) != named(continuous()) == named(continuous(rank=1, world_size=2))


def test_sources_that_give_the_same_batches_have_one_name(tmp_path):
    source = continuous()
    ahead = Prefetched(source, worker=in_thread)
    assert named(ahead) == named(source)
    ahead.close()
    kept = [Recorded.of(continuous(), tmp_path / folder) for folder in ("one", "two")]
    assert named(kept[0]) == named(kept[1]) != named(Recorded.of(continuous(seed=1), tmp_path / "one"))
    others = [source, kept[0], replayed(2), replayed(3), stored(), mixed(stored(), continuous(batch_size=8), 0.5)]
    assert len({named(other) for other in others}) == len(others)


def test_other_pictures_are_another_source():
    other = REAL.clone()
    other[-1, 0, 0, 0] ^= 1
    assert named(RealViews(other, **(PLAN | dict(batch_size=8)))) != named(stored())


def test_a_training_is_not_taken_up_with_other_views_but_with_prefetched_ones(tmp_path):
    module = lambda: Contrastive(small_resnet(width=4), OBJECTIVES["simclr"](32), TrainConfig(steps=3, warmup=1))
    history = fit(module(), continuous(), tmp_path)
    ahead = Prefetched(continuous())
    assert fit(module(), ahead, tmp_path).equals(history)
    ahead.close()
    with pytest.raises(ValueError, match="other views;"):
        fit(module(), continuous(seed=1), tmp_path)
