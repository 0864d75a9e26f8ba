"Streams that never meet, batches that do not depend on who draws them, and augmentations that treat every image apart."
import copy
import itertools
import math
import pickle
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from mlvgm_mi import passes as passes_module
from mlvgm_mi import views as module
from mlvgm_mi.generators.core import Generator, LinearGaussian, check_generator
from mlvgm_mi.latents import Block, Layout, rng_for
from mlvgm_mi.passes import Passes
from mlvgm_mi.perturb import Additive, Perturb, Resample, single
from mlvgm_mi.views import (
    AUGMENTATIONS, Augmentation, ColorJitter, ContinuousViews, FixedViews, Grayscale, HorizontalFlip, RandomResizedCrop,
    RealViews, ViewSource, draw_views, draws_as, loader_steps, mixed, view_loader,
)

NONE = AUGMENTATIONS["none"]


class Window(Generator):
    "Shows its latents: pixel = sigmoid(z), one row of the image per block. Counts the rows it decodes."

    def __init__(self):
        super().__init__()
        self.layout = Layout.of([Block("a", (8,)), Block("b", (8,))])
        self.image_shape, self.rows = (1, 2, 8), 0

    def start(self, batch):
        return torch.zeros(batch, 1, 0, 8)

    def stage(self, k, state, code):
        self.rows += len(code)
        return torch.cat([state.to(code), code[:, None, None]], 2)

    def render(self, state):
        return torch.sigmoid(state)


def latents(views):
    return torch.logit(views.double())


def continuous(**changes):
    generator = Window()
    perturb = Perturb(generator.layout, {"a": Additive(1), "b": Additive(1)})
    settings = dict(perturb=perturb, augment=NONE, batch_size=16, steps_per_epoch=6)
    return ContinuousViews(generator, **(settings | changes))


def rows(batches):
    "Anchors as a set of hashable pixel rows."
    return [tuple(anchor.flatten().tolist()) for batch in batches for anchor in batch[:, 0]]


def test_the_window_keeps_the_contract():
    assert len(check_generator(Window())) == 9


# streams

def test_ten_thousand_streams_have_distinct_first_draws():
    names = ("anchor", "step/1/a", "step/1/b", "step/2/a", "augment")
    places = [dict(zip(("epoch", "step", "rank", "worker"), place))
              for place in itertools.product(range(5), range(10), range(4), range(2))]
    draws = [tuple(torch.randn(4, generator=rng_for(seed, name, **place)).tolist())
             for seed, name, place in itertools.product(range(5), names, places)]
    assert len(set(draws)) == len(draws) == 10_000
    assert len({draw[0] for draw in draws}) > 9_990


def test_ranks_workers_and_epochs_never_share_an_anchor():
    anchors = []
    for rank, epoch in itertools.product(range(2), range(2)):
        source = continuous(rank=rank, world_size=2)
        source.set_epoch(epoch)
        anchors += rows(view_loader(source, workers=2))
    assert len(anchors) == 2 * 2 * 6 * 16 == len(set(anchors))


def test_the_check_above_would_see_ranks_that_forget_who_they_are():
    forgetful = [continuous(rank=rank, world_size=2) for rank in range(2)]
    forgetful[1].place = lambda: (0, 2)
    anchors = [anchor for source in forgetful for anchor in rows(source)]
    assert len(set(anchors)) == len(anchors) / 2


def test_the_noise_of_groups_views_and_anchors_is_uncorrelated():
    "The paper's release gives all groups one noise vector: correlation 1."
    z = latents(torch.cat(list(continuous(batch_size=100, views=3))))  # (600, 3, 1, 2, 8)
    anchor, noise = z[:, 0, 0], z[:, 1:, 0] - z[:, :1, 0]
    series = {"anchor a": anchor[:, 0], "anchor b": anchor[:, 1], **{
        f"view {v} group {k}": noise[:, v, k] for v in range(2) for k in range(2)}}
    assert noise.std() == pytest.approx(1, abs=0.02)
    for first, second in itertools.combinations(series, 2):
        assert abs(np.corrcoef(series[first].flatten(), series[second].flatten())[0, 1]) < 0.06, (first, second)


def test_noise_of_one_step_is_not_the_anchor_of_the_next():
    z = latents(torch.cat(list(continuous())))[:, :, 0].flatten(2)
    anchors, noise = z[:, 0], z[:, 1] - z[:, 0]
    assert torch.cdist(anchors, noise).min() > 1e-2


# what a batch depends on

BYTES = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 8)
PLAN = dict(augment=NONE, batch_size=16)
SOURCES = {
    "continuous": continuous,
    "real": lambda **kw: RealViews(BYTES, **(PLAN | kw)),
    "fixed": lambda **kw: FixedViews.generate(Window(), continuous().perturb, 200, **(PLAN | kw)),
}


@pytest.fixture(params=SOURCES)
def make(request):
    return SOURCES[request.param]


def test_a_batch_does_not_depend_on_what_was_drawn_before(make):
    source = make(augment=AUGMENTATIONS["simclr"])
    source.set_epoch(3)
    batches = list(source)
    assert len(batches) == len(source)
    for step in reversed(range(len(source))):
        assert torch.equal(source.batch(step, epoch=3), batches[step])
        assert torch.equal(make(augment=AUGMENTATIONS["simclr"]).batch(step, epoch=3), batches[step])
    assert not torch.equal(source.batch(0, epoch=2), batches[0])


def test_seeds_and_ranks_give_other_batches(make):
    first = make().batch(0)
    assert not torch.equal(first, make(seed=1).batch(0))
    assert not torch.equal(first, make(rank=1, world_size=2).batch(0))


def test_workers_change_nothing_and_hear_of_epochs(make):
    source = make()
    loader = view_loader(source, workers=2)
    for epoch in (0, 1):
        source.set_epoch(epoch)
        expected = [source.batch(step, epoch) for step in range(len(source))]
        drawn = list(loader)
        assert len(drawn) == len(loader) == len(expected) and all(map(torch.equal, drawn, expected))


@pytest.mark.parametrize("workers, expected", [(None, [[0, 1, 2, 3, 4]]), (1, [[0, 1, 2, 3, 4]]), (2, [[0, 2, 4], [1, 3]]),
                                               (3, [[0, 3], [1, 4], [2]])])
def test_workers_share_the_steps_of_an_epoch(workers, expected, monkeypatch):
    for worker, steps in enumerate(expected):
        info = workers and SimpleNamespace(id=worker, num_workers=workers)
        monkeypatch.setattr(module, "get_worker_info", lambda info=info: info)
        assert list(loader_steps(5)) == steps


def test_global_randomness_is_neither_read_nor_touched(make):
    source = make(augment=AUGMENTATIONS["simclr"])
    torch.manual_seed(0)
    first, state = source.batch(0), torch.get_rng_state()
    torch.manual_seed(1)
    second = source.batch(0)
    assert torch.equal(first, second) and torch.equal(state, torch.manual_seed(0).get_state())


def test_shapes_and_range(make):
    batch = make(augment=AUGMENTATIONS["simclr"], views=3).batch(0)
    assert batch.shape == (16, 3, 1, 2, 8) and batch.dtype == torch.float32
    assert 0 <= batch.min() and batch.max() <= 1


def test_an_encoder_can_be_trained_on_the_batches(make):
    net = nn.Conv2d(1, 2, 2)
    net(make().batch(0).flatten(0, 1)).sum().backward()
    assert net.weight.grad.abs().sum() > 0


def test_an_initialised_process_group_knows_better(make, monkeypatch):
    expected = make(rank=1, world_size=2).batch(0)
    source = make()
    monkeypatch.setattr(module.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(module.distributed, "get_rank", lambda *args: 1)
    monkeypatch.setattr(module.distributed, "get_world_size", lambda *args: 2)
    assert torch.equal(source.batch(0), expected)
    copied = pickle.dumps(source)  # what a spawned worker gets
    monkeypatch.undo()
    assert pickle.loads(copied).place() == (1, 2) and torch.equal(pickle.loads(copied).batch(0), expected)


@pytest.mark.parametrize("settings, problem", [
    (dict(batch_size=1), "batch_size=1 must be at least 2"), (dict(views=1), "views=1 must be at least 2"),
    (dict(steps_per_epoch=0), "steps_per_epoch=0"), (dict(rank=2, world_size=2), "rank=2"),
    (dict(world_size=0), "world_size=0"),
])
def test_impossible_settings_are_named(settings, problem):
    for make in (SOURCES["continuous"], SOURCES["real"]):
        with pytest.raises(ValueError, match=problem):
            make(**settings)


# passes: which epoch is served to whom was not told

def same(drawn, expected):
    return all(torch.equal(*pair) for pair in zip(drawn, expected, strict=True))


def of_epoch(source, epoch):
    return [source.batch(step, epoch) for step in range(len(source))]


KINDS = {
    "alone": {}, "anew": dict(num_workers=2), "kept": dict(num_workers=2, persistent_workers=True),
    "spawned, kept": dict(num_workers=2, multiprocessing_context="spawn", persistent_workers=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_is_the_next_epoch_or_the_one_that_was_set(kind):
    source = continuous()
    loader = DataLoader(source, batch_size=None, **KINDS[kind])
    assert same(loader, of_epoch(source, 0)) and same(loader, of_epoch(source, 1)) and source.epoch == 2
    source.set_epoch(1)
    assert same(loader, of_epoch(source, 1)) and same(loader, of_epoch(source, 2))
    assert same(DataLoader(source, batch_size=None, **KINDS[kind]), of_epoch(source, 3))


def test_stored_sources_go_on_as_well(make):
    source = make()
    assert same(source, of_epoch(source, 0)) and same(source, of_epoch(source, 1))


def test_loaders_of_all_sizes_follow_one_another():
    source = continuous()
    kept, one = view_loader(source, workers=2), view_loader(source, workers=1)
    for epoch, loader in enumerate([source, one, one, kept, one, view_loader(source, workers=2), kept, source]):
        assert same(loader, of_epoch(source, epoch))


@pytest.mark.parametrize("kind", ["alone", "anew", "kept"])
def test_a_pass_that_is_broken_off_has_begun(kind):
    source = continuous()
    loader = DataLoader(source, batch_size=None, **KINDS[kind])
    assert torch.equal(next(iter(loader)), source.batch(0, 0))
    assert same(loader, of_epoch(source, 1))
    source.set_epoch(0)
    assert torch.equal(next(iter(loader)), source.batch(0, 0))
    source.set_epoch(0)
    assert same(loader, of_epoch(source, 0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))], ids=["copied", "pickled"])
def test_a_copy_goes_its_own_way_and_its_workers_hear_of_epochs(copied):
    source = continuous()
    source.set_epoch(3)
    other = copied(source)
    loader = view_loader(other, workers=2)
    assert same(loader, of_epoch(source, 3))
    other.set_epoch(7)
    assert same(loader, of_epoch(source, 7)) and source.epoch == 3


def rank_epochs(passes, sent):
    "What a rank sees whose workers start before it chooses an epoch."
    loader = DataLoader(Told(passes), batch_size=None, num_workers=1, persistent_workers=True)
    seen = [*loader, *loader]
    passes.set(5)
    sent.put([*seen, *loader, *loader])


class Told(torch.utils.data.IterableDataset):
    "Gives the epoch of each pass."

    def __init__(self, passes):
        self.passes = passes

    def __iter__(self):
        return iter([self.passes.begin()])


@pytest.mark.parametrize("start, n", [("fork", 2), ("spawn", 1)])
def test_ranks_that_share_a_source_count_for_themselves(start, n):
    context, passes = torch.multiprocessing.get_context(start), Passes()
    passes.begin()
    sent = context.Queue()
    ranks = [context.Process(target=rank_epochs, args=(passes, sent)) for _ in range(n)]
    for rank in ranks:
        rank.start()
    assert [sent.get(timeout=300) for _ in ranks] == [[1, 2, 5, 6]] * n and passes.next == 1
    for rank in ranks:
        rank.join()


class Pool:
    "Workers of a loader that begin their passes when the test says so."

    def __init__(self, passes, n, monkeypatch):
        self.copies, self.patch = [copy.copy(passes) for _ in range(n)], monkeypatch

    def begin(self, *workers):
        return [self._begin(worker) for worker in workers]

    def _begin(self, worker):
        info = SimpleNamespace(id=worker, num_workers=len(self.copies))
        with self.patch.context() as patch:
            patch.setattr(passes_module, "get_worker_info", lambda: info)
            return self.copies[worker].begin()


def test_a_worker_that_starts_late_is_not_led_astray(monkeypatch):
    passes = Passes()
    passes.set(4)
    pool = Pool(passes, 3, monkeypatch)
    assert pool.begin(0) == [4]  # a look at a batch, while the others are being started
    passes.set(4)
    assert pool.begin(2, 1) == [4, 4] and pool.begin(1, 0, 2) == [4, 4, 4] and pool.begin(0, 1, 2) == [5, 5, 5]
    passes.set(0)
    assert passes.begin() == 0 and pool.begin(2, 0, 1) == [1, 1, 1]


def test_a_worker_may_be_a_pass_behind(monkeypatch):
    pool = Pool(Passes(), 2, monkeypatch)
    assert pool.begin(0, 0) == [0, 1] and pool.begin(1, 1) == [0, 1] and pool.begin(1, 0) == [2, 2]


def test_what_cannot_be_numbered_is_named(monkeypatch):
    with pytest.raises(ValueError, match="epoch=-1 must lie between 0"):
        continuous().set_epoch(-1)
    assert Pool(Passes(), 128, monkeypatch).begin(127, 0) == [0, 0]
    with pytest.raises(ValueError, match="num_workers=129 are too many .* at most 128"):
        Pool(Passes(), 129, monkeypatch).begin(0)


# stored sources

NUMBERED = torch.arange(240, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)


def numbers(batches):
    return [round(255 * value) for batch in batches for value in batch[:, 0, 0, 0, 0].tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_is_a_permutation_over_all_ranks(world_size):
    orders = []
    for epoch in range(2):
        sources = [RealViews(NUMBERED, augment=NONE, batch_size=20, rank=rank, world_size=world_size)
                   for rank in range(world_size)]
        for source in sources:
            source.set_epoch(epoch)
        drawn = [numbers(source) for source in sources]
        assert sorted(sum(drawn, [])) == list(range(240)) and len({len(order) for order in drawn}) == 1
        orders.append(drawn)
    assert orders[0] != orders[1] and orders[0][0] != sorted(orders[0][0])


def test_a_long_epoch_goes_round_again_in_another_order():
    source = RealViews(NUMBERED, augment=NONE, batch_size=20, steps_per_epoch=30)
    drawn = numbers(source)
    laps = drawn[:240], drawn[240:480]
    assert len(drawn) == 600 and sorted(laps[0]) == sorted(laps[1]) == list(range(240)) and laps[0] != laps[1]


def test_views_of_a_real_image_are_equal_before_and_apart_after_augmentation():
    images = torch.randint(0, 255, (64, 1, 16, 16), dtype=torch.uint8, generator=rng_for(0, "images"))
    plain = RealViews(images, augment=NONE, views=4, batch_size=32).batch(0)
    assert all(torch.equal(plain[:, 0], plain[:, v]) for v in range(1, 4))
    augmented = RealViews(images, augment=AUGMENTATIONS["simclr"], views=4, batch_size=32).batch(0)
    assert len(augmented.flatten(0, 1).unique(dim=0)) == 128


def test_stored_pairs_stay_together_and_are_what_was_decoded():
    generator = Window()
    perturb = single(generator.layout, "b", Resample())
    source = FixedViews.generate(generator, perturb, 50, views=3, seed=5, chunk=20, augment=NONE, batch_size=50)
    decoded = torch.cat([draw_views(generator, perturb, 20, lambda name: rng_for(5, f"fixed/{name}", step=chunk), 3)
                         for chunk in range(3)])[:50]
    assert (source.stored.float() / 255 - decoded).abs().max() <= 0.5 / 255 + 1e-6
    batch = source.batch(0)
    assert torch.equal(batch[:, 0, 0, 0], batch[:, 2, 0, 0]) and not torch.equal(batch[:, 1, 0, 1], batch[:, 2, 0, 1])


def test_a_small_set_is_the_first_part_of_a_large_one():
    generator, perturb = Window(), continuous().perturb
    plan = dict(chunk=16, augment=NONE, batch_size=4)
    sets = [FixedViews.generate(generator, perturb, n, **plan).stored for n in (10, 16, 40)]
    assert torch.equal(sets[0], sets[2][:10]) and torch.equal(sets[1], sets[2][:16])
    assert len(sets[2][:, 0].flatten(1).unique(dim=0)) == 40


LOUD = LinearGaussian.random([1.0, 1.0])  # its images are not in [0, 1]
STILL = Perturb(LOUD.layout, {})


@pytest.mark.parametrize("build, error, problem", [
    (lambda: RealViews(NUMBERED, augment=NONE, batch_size=121, world_size=2), ValueError, "batch_size=121 .* 240 are"),
    (lambda: RealViews(NUMBERED.float(), augment=NONE), TypeError, "torch.float32"),
    (lambda: RealViews(NUMBERED[0], augment=NONE), TypeError, r"\(1, 2, 2\)"),
    (lambda: FixedViews(NUMBERED, augment=NONE), TypeError, r"expected uint8 \(N, V, C, H, W\)"),
    (lambda: continuous(steps_per_epoch=None), ValueError, "steps_per_epoch=None"),
    (lambda: FixedViews.generate(LOUD, STILL, 4, augment=NONE, batch_size=2), ValueError, "images span"),
    (lambda: ContinuousViews(LOUD, STILL, augment=NONE, steps_per_epoch=1).batch(0), ValueError, "images span"),
])
def test_wrong_inputs_are_named(build, error, problem):
    with pytest.raises(error, match=problem):
        build()


# generated views

def test_synthetic_views_are_decoded_once():
    source = continuous(views=4, perturb=Perturb(Window().layout, {}))
    batch = source.batch(0)
    assert source.generator.rows == 2 * 16  # two blocks, one decode each
    assert all(torch.equal(batch[:, 0], batch[:, v]) for v in range(1, 4))


def test_a_late_group_restarts_in_the_middle():
    source = continuous(perturb=single(Window().layout, "b", Resample()))
    source.batch(0)
    assert source.generator.rows == 16 + 32


def test_clipped_anchors_stay_within_the_clip():
    z = latents(continuous(clip=0.9, batch_size=200).batch(0))
    assert z[:, 0].abs().max() <= 0.9 + 1e-4 < z[:, 1].abs().max()


# mixed batches

@pytest.mark.parametrize("share, rows_", [(0.25, 4), (0.5, 8), (0.8, 13)])
def test_a_mixed_batch_has_its_share(share, rows_):
    real, generated = SOURCES["real"](), continuous(batch_size=99)
    both = mixed(real, generated, share)
    batch = both.batch(2, epoch=1)
    assert batch.shape == (16, 2, 1, 2, 8) and len(both) == len(real)
    assert torch.equal(batch[16 - rows_:], replace(generated, batch_size=rows_).batch(2, epoch=1))
    assert all(len(row.unique()) == 1 for row in batch[: 16 - rows_])


@pytest.mark.parametrize("share, problem", [
    (0.05, "gives 1 generated"), (0.95, "gives 15 generated"), *((share, "must lie between 0 and 1") for share in (
        0, 1, -1, 2, math.nan, math.inf)),
])
def test_a_mix_of_one_thing_is_refused(share, problem):
    with pytest.raises(ValueError, match=f"share={share} {problem}"):
        mixed(SOURCES["real"](), continuous(), share)


def places():
    return [dict(seed=seed, rank=rank, world_size=2) for seed in (0, 1) for rank in (0, 1)]


def test_mixtures_of_seeds_and_ranks_share_no_rows():
    mixtures = [mixed(SOURCES["real"](batch_size=8, **place), continuous(**place), 0.5) for place in places()]
    drawn = rows(mixture.draw(step, epoch)[4:] for mixture in mixtures for step in (0, 1) for epoch in (0, 1))
    assert len(set(drawn)) == len(drawn) == 4 * 4 * 4


@pytest.mark.parametrize("change", [dict(seed=1), dict(rank=1, world_size=2), dict(world_size=2)])
def test_parts_that_draw_as_another_seed_or_rank_would_are_refused(change):
    for real, generated in (({}, change), (change, {})):
        with pytest.raises(ValueError, match="generated draws with seed=.*mix parts that agree"):
            mixed(SOURCES["real"](**real), continuous(**generated), 0.5)
    parts = SOURCES["real"](), continuous()
    with pytest.raises(ValueError, match="real draws with seed=0, rank=0, world_size=1, the mixture with") as refused:
        replace(mixed(*parts, 0.5), **change)
    way_out = str(refused.value).split("as in ")[1]  # runs as it stands
    anew = eval(way_out, dict(mixed=mixed, replace=replace, real=parts[0], generated=parts[1], share=0.5))
    assert draws_as(anew) == draws_as(anew.generated) == draws_as(continuous(**change))
    assert torch.equal(anew.draw(0, 0)[8:], continuous(batch_size=8, **change).draw(0, 0))


def test_a_process_group_makes_ranks_agree(monkeypatch):
    monkeypatch.setattr(module.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(module.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(module.distributed, "get_world_size", lambda: 2)
    both = mixed(SOURCES["real"](rank=1, world_size=2), continuous(), 0.5)
    assert torch.equal(both.draw(0, 0)[8:], continuous(batch_size=8, rank=1, world_size=2).draw(0, 0))


def test_a_mix_of_pairs_and_triples_is_refused():
    with pytest.raises(ValueError, match="real has 2 views of an anchor, generated 3"):
        mixed(SOURCES["real"](), continuous(views=3), 0.5)


@dataclass(eq=False)
class Own(ViewSource):
    "A source of one's own, which says nothing of its images, and may draw what it likes."
    drawn: tuple[int, ...]

    def draw(self, step, epoch):
        return torch.zeros(self.drawn)


def own(*drawn, **plan):
    return Own(drawn, **(PLAN | dict(steps_per_epoch=6) | plan))


COLOUR = torch.zeros(40, 2, 3, 2, 8, dtype=torch.uint8)


@pytest.mark.parametrize("other", [FixedViews(COLOUR, **PLAN), RealViews(COLOUR[:, 0], **PLAN),
                                   mixed(FixedViews(COLOUR, **PLAN), own(4, 2, 3, 2, 8), 0.25)])
def test_images_of_two_shapes_are_refused_before_they_are_drawn(other):
    for real, generated in ((continuous(), other), (other, continuous())):
        with pytest.raises(ValueError, match=r"real has images of shape \([13], 2, 8\), generated of \([13], 2, 8\); give both"):
            mixed(real, generated, 0.5)


@pytest.mark.parametrize("drawn, problem", [
    ((4, 2, 1, 2, 8), None), ((16, 2, 1, 2, 8), r"generated drew views of shape \(16, 2, 1, 2, 8\), but has batch_size=4"),
    ((4, 3, 1, 2, 8), r"generated drew views of shape \(4, 3, 1, 2, 8\), but .* views=2"),
    ((4, 2, 3, 2, 8), r"real has images of shape \(1, 2, 8\), generated of \(3, 2, 8\); give both"),
])
def test_what_a_source_draws_is_looked_at(drawn, problem):
    both = mixed(SOURCES["real"](), own(*drawn), 0.25)
    if problem is None:
        assert both.batch(0).shape == (16, 2, 1, 2, 8)
    else:
        with pytest.raises(ValueError, match=problem):
            both.batch(0)


@pytest.mark.parametrize("changes, problem", [
    (dict(batch_size=32), "batch_size=32, but real gives 12 rows and generated 4; .*with_batch_size"),
    (dict(views=3), "real has 2 views of an anchor, generated 2 and the mixture 3"),
])
def test_a_mixture_is_not_changed_alone(changes, problem):
    with pytest.raises(ValueError, match=problem):
        replace(mixed(SOURCES["real"](), continuous(), 0.25), **changes)


def test_a_batch_size_is_changed_and_nothing_else(make):
    source = make(seed=5, views=3)
    other = source.with_batch_size(6)
    assert type(other) is type(source) and source.batch_size == 16
    assert torch.equal(other.batch(1), make(seed=5, views=3, batch_size=6).batch(1))


@pytest.mark.parametrize("share, rows_", [(0.25, (24, 8)), (0.5, (16, 16))])
def test_a_mixture_of_another_size_keeps_its_share(share, rows_):
    real, generated = SOURCES["real"](), continuous()
    larger = mixed(real, generated, share).with_batch_size(32)
    parts = replace(real, batch_size=rows_[0]), replace(generated, batch_size=rows_[1])
    assert torch.equal(larger.draw(1, 2), torch.cat([part.draw(1, 2) for part in parts])) and len(larger.batch(0)) == 32


def test_mixtures_are_mixed():
    thirds = mixed(SOURCES["real"](batch_size=24), mixed(SOURCES["fixed"](batch_size=20), continuous(), 0.5), 2 / 3)
    assert thirds.batch(0).shape == (24, 2, 1, 2, 8)
    assert (thirds.real.batch_size, thirds.generated.real.batch_size, thirds.generated.generated.batch_size) == (8, 8, 8)
    assert torch.equal(thirds.draw(0, 0)[16:], continuous(batch_size=8).draw(0, 0))


# augmentations

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_image_gets_its_own_randomness(name, channels):
    image = torch.rand(1, channels, 16, 16, generator=rng_for(0, "image"))
    images = image.expand(8, -1, -1, -1)
    out = AUGMENTATIONS[name](images, rng_for(0, "augment"))
    assert out.shape == images.shape and out.dtype == images.dtype and 0 <= out.min() and out.max() <= 1
    distinct = len(out.flatten(1).unique(dim=0))
    assert distinct == 1 if name == "none" else distinct >= 6  # no_crop leaves an image alone with probability 0.1
    assert torch.equal(image.expand(8, -1, -1, -1), images)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_accept_double_precision(name):
    images = torch.rand(4, 3, 16, 16, generator=rng_for(0, "image"))
    out = [AUGMENTATIONS[name](x, rng_for(0, "augment")) for x in (images, images.double())]
    assert out[1].dtype == torch.float64
    torch.testing.assert_close(out[0].double(), out[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("images, error", [
    (torch.full((2, 1, 4, 4), 1.01), ValueError), (torch.full((2, 1, 4, 4), -0.01), ValueError),
    (torch.full((2, 1, 4, 4), math.nan), ValueError), (torch.zeros(1, 4, 4), ValueError),
    (torch.zeros(2, 2, 1, 4, 4), ValueError), (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), TypeError),
])
def test_images_out_of_range_are_refused(images, error):
    for augmentation in AUGMENTATIONS.values():
        with pytest.raises(error, match="images "):
            augmentation(images, rng_for(0, "augment"))


def boxes(images, seed=0):
    return RandomResizedCrop().boxes(images, rng_for(seed, "boxes"))


@pytest.mark.parametrize("height, width", [(32, 32), (24, 48)])
def test_boxes_are_drawn_as_torchvision_draws_them(height, width):
    from torchvision.transforms import RandomResizedCrop as Reference

    w, h = boxes(torch.zeros(20_000, 1, height, width))
    torch.manual_seed(0)
    big = torch.zeros(1, 100 * height, 100 * width)  # so that rounding to whole pixels does not matter
    drawn = [Reference.get_params(big, (0.2, 1.0), (3 / 4, 4 / 3))[2:] for _ in range(1500)]  # (height, width)
    reference = np.array(drawn) / big.shape[1:]
    for ours, theirs in ((w * h, reference.prod(1)), (w, reference[:, 1]), (h, reference[:, 0])):
        quantiles = np.linspace(0.05, 0.95, 7)
        assert np.quantile(ours, quantiles) == pytest.approx(np.quantile(theirs, quantiles), abs=0.03)


def test_a_box_that_never_fits_is_the_whole_image():
    width, height = RandomResizedCrop((1, 1), (2, 3)).boxes(torch.zeros(5, 1, 8, 8), rng_for(0, "boxes"))
    assert (width == 1).all() and (height == 1).all()


@pytest.mark.parametrize("axis", [2, 3])
def test_a_crop_shows_its_box(axis):
    "On a ramp along an axis, a crop is a ramp inside the old one whose slope is the box."
    ramp = ((torch.arange(64) + 0.5) / 64).view((1, 1, 64, 1) if axis == 2 else (1, 1, 1, 64)).expand(300, 1, 64, 64)
    out = RandomResizedCrop()(ramp, rng_for(0, "boxes"))
    size = boxes(ramp)[3 - axis]
    profile = out.movedim(axis, 3)[:, 0, 32]
    inner = profile[:, 32:48] - profile[:, 16:32]
    torch.testing.assert_close(inner, (size / 4)[:, None].expand(-1, 16), atol=1e-4, rtol=0)
    assert profile.min() > 0 and profile.max() < 1 and profile[:, 0].std() > 0.1


def test_flips_flip_about_half():
    images = torch.rand(1, 1, 4, 4, generator=rng_for(0, "image")).expand(2000, -1, -1, -1)
    out = HorizontalFlip()(images, rng_for(0, "flip"))
    flipped = (out == images.flip(-1)).flatten(1).all(1)
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.04) and torch.equal(out[~flipped], images[~flipped])


def test_grey_is_grey_for_about_a_fifth():
    images = torch.rand(2000, 3, 4, 4, generator=rng_for(0, "image"))
    out = Grayscale()(images, rng_for(0, "grey"))
    grey = (out[:, 0] == out[:, 1]).flatten(1).all(1)
    assert grey.float().mean() == pytest.approx(0.2, abs=0.03) and torch.equal(out[~grey], images[~grey])
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    torch.testing.assert_close(out[grey][:, 0], luma[grey], atol=1e-5, rtol=0)


def test_jitter_does_to_pixels_what_kornia_does():
    from kornia.augmentation import ColorJiggle

    images = torch.rand(6, 3, 8, 8, generator=rng_for(0, "images"))
    rng = rng_for(0, "jitter")
    torch.rand(6, generator=rng)  # which images are chosen: all of them
    names = ("brightness_factor", "contrast_factor", "saturation_factor")
    params = {name: 0.8 * torch.rand(6, generator=rng) + 0.6 for name in names}
    params["hue_factor"] = 0.2 * torch.rand(6, generator=rng) - 0.1
    params["order"] = torch.randperm(4, generator=rng)
    params |= {"batch_prob": torch.ones(6), "forward_input_shape": torch.tensor(images.shape)}
    reference = ColorJiggle(0.4, 0.4, 0.4, 0.1, p=1.0)(images, params=params)
    torch.testing.assert_close(ColorJitter(p=1.0)(images, rng_for(0, "jitter")), reference, atol=1e-5, rtol=0)
    assert (reference - images).abs().mean() > 0.05


def test_jitter_leaves_a_fifth_alone():
    images = 0.4 + 0.1 * torch.rand(2000, 1, 2, 2, generator=rng_for(0, "images"))
    out = ColorJitter()(images, rng_for(0, "jitter"))
    alone = ((out - images).abs() < 1e-6).flatten(1).all(1)
    assert alone.float().mean() == pytest.approx(0.2, abs=0.03)


def test_own_augmentations_are_a_line():
    flip = Augmentation(HorizontalFlip(1.0))
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(flip(images, rng_for(0, "flip")), images.flip(-1))
    assert repr(flip) == "Augmentation(HorizontalFlip(p=1.0))"
