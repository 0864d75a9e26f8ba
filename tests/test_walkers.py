"Walkers move what they should, survive their files, and are measured by nats that agree with the closed form."
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pickle_corpus as corpus
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from mlvgm_mi.checkpoints import WeightsError, save_weights
from mlvgm_mi.delta import COLUMNS, WalkConfig, delta_curves, delta_table, fit_groups, fit_walkers
from mlvgm_mi.generators.core import LinearGaussian, gaussian_mi, linear_pair_mi, load_generator
from mlvgm_mi.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from mlvgm_mi.latents import Block, Layout, rng_for
from mlvgm_mi.perturb import Additive, Perturb, Resample, moves, single
from mlvgm_mi.views import AUGMENTATIONS, ContinuousViews
from mlvgm_mi.walkers import (
    CONTROLS, EqualNorm, Learned, Walkers, all_groups, control, displacement, fresh_walkers, load_group_walkers, load_walker_all,
    load_walkers, prior_norms, save_walkers,
)

GOLDEN = Path(__file__).parent / "golden"
CHUNKS = Layout.of([Block(name, (5,)) for name in "xyz"])
SIXFOLD = Layout.of([Block(f"z{k}", (20,)) for k in range(6)])


def streams(seed=0):
    return lambda group: rng_for(seed, f"step/{group}")


def loud(size, noise=0, seed=0):
    "A walker whose moves are as large as its latents."
    walker = Learned(size, noise=noise, rng=rng_for(seed, "loud"))
    for weight in walker.requires_grad_(False).parameters():
        weight.mul_(40)
    return walker


@pytest.fixture(scope="module")
def gan():
    "A network with random weights in which all slots share one z."
    config = StyleGAN2Config(z_dim=8, w_dim=8, img_resolution=8, img_channels=1, num_layers=1, channel_base=64)
    generator = StyleGAN2(config, {"coarse": (0, 1), "fine": (1, 4)}).eval().requires_grad_(False)
    for i, weight in enumerate(generator.parameters()):
        weight.copy_(torch.randn(weight.shape, generator=rng_for(i, "gan")))
    return generator


# steps

def test_a_fresh_walker_has_the_weights_of_the_paper():
    net = Learned(200, rng=rng_for(0, "a")).net
    weights, biases = (torch.cat([getattr(net[i], kind).flatten() for i in (0, 2)]) for kind in ("weight", "bias"))
    assert weights.std().item() == pytest.approx(0.01, rel=0.02) and abs(weights.mean().item()) < 1e-4
    assert 0.0009 < biases.abs().max() <= 0.001 and isinstance(net[1], torch.nn.ReLU) and len(net) == 3
    again = Learned(200, rng=rng_for(0, "a")).net
    assert torch.equal(again[0].weight, net[0].weight) and not torch.equal(net[0].weight, Learned(200).net[0].weight)


def test_a_walker_is_a_residual_network_and_a_step():
    walker, z = loud(5), tuple(torch.randn(4, 5, generator=rng_for(0, name)) for name in "xyz")
    moved = Perturb(CHUNKS, {"y": walker})(z, streams())
    torch.testing.assert_close(moved[1], z[1] + walker.net(z[1]))
    assert moved[0] is z[0] and moved[2] is z[2] and (moved[1] - z[1]).norm() > 1
    torch.testing.assert_close(walker.scaled(0.5)(z[1]) - z[1], 0.5 * (moved[1] - z[1]))
    assert walker.scaled(0)(z[1]) is z[1] and walker.scaled(0.5).net is walker.net
    double = walker(z[1].double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), moved[1])
    image = torch.randn(4, 1, 5, 1, generator=rng_for(0, "image"))
    torch.testing.assert_close(walker(image).flatten(1), walker(image.flatten(1)))


def test_noisy_walkers_do_not_share_their_noise():
    "One stream for all groups, as in the paper's release, would give a correlation of 1."
    zeros, walker = tuple(torch.zeros(2000, 5) for _ in range(3)), loud(5, noise=6)
    moved = Walkers(CHUNKS, dict.fromkeys("xyz", walker))(zeros, streams())
    for a, b in itertools.combinations(moved, 2):
        assert a.std(0).min() > 0.01 and abs(np.corrcoef((a - a.mean(0)).flatten(), (b - b.mean(0)).flatten())[0, 1]) < 0.06
    again = Walkers(CHUNKS, dict.fromkeys("zyx", walker))(zeros, streams())
    assert all(torch.equal(a, b) for a, b in zip(moved, again)), "the order of the sets does not matter"


def test_a_joint_walker_sees_all_its_chunks_and_a_single_one_its_own():
    z = tuple(torch.randn(3, 5, generator=rng_for(0, name)).requires_grad_() for name in "xyz")
    joint = Walkers(CHUNKS, {"x+z": loud(10)})(z, streams())
    assert joint[1] is z[1]
    assert torch.autograd.grad(joint[0].sum(), z[2], retain_graph=True)[0].abs().max() > 0
    apart = Walkers(CHUNKS, {"x": loud(5), "z": loud(5)})(z, streams())
    assert torch.autograd.grad(apart[0].sum(), z[2], allow_unused=True)[0] is None


def test_a_shared_latent_moves_once_and_only_in_the_slots_of_its_set(gan):
    walkers = fresh_walkers(gan, ["coarse", "fine"])
    sizes = [step.size for moves in (walkers, fresh_walkers(gan, ["coarse+fine"])) for step in moves.steps.values()]
    assert sizes == [8, 8, 8]
    z = gan.sample(3, rng_for(0, "z"))
    moved = walkers(z, streams())
    assert moved[1] is moved[2] is moved[3] and moved[0] is not moved[1] and len({id(t) for t in moved}) == 2
    alone = fresh_walkers(gan, ["fine"])(z, streams())
    assert alone[0] is z[0] and torch.equal(alone[1], moved[1])


def test_sizes_follow_the_layout():
    line = LinearGaussian.random([1, 1, 1], pixels=6, width=4)
    assert all_groups(line.layout) == "z0+z1+z2"
    assert [step.size for step in fresh_walkers(line, ["z0", "z1+z2"]).steps.values()] == [4, 8]


def test_gradients_reach_walkers_through_shared_prefixes_and_leave_the_generator_alone(gan):
    walkers = fresh_walkers(gan, ["coarse", "fine"])
    z = gan.sample(3, rng_for(0, "z"))
    positives = [Walkers(gan.layout, {name: step})(z, streams()) for name, step in walkers.steps.items()]
    gan.decode_views(z, positives)[:, 1:].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in walkers.parameters())
    assert all(weight.grad is None for weight in gan.parameters())


def test_walkers_are_a_perturbation_for_views(gan):
    walkers = Walkers(gan.layout, {name: loud(8, seed=i) for i, name in enumerate(gan.layout.group_names)})
    source = ContinuousViews(generator=gan, perturb=walkers, augment=AUGMENTATIONS["none"], batch_size=4, steps_per_epoch=1)
    views = source.batch(0)
    assert views.shape == (4, 2, 1, 8, 8) and torch.equal(views, source.batch(0)) and not views.requires_grad
    assert not torch.equal(views[:, 0], views[:, 1])


@pytest.mark.parametrize("build, words", [
    (lambda: Learned(0), "size=0"), (lambda: Learned(3, (0,)), r"hidden=\(0,\)"), (lambda: Learned(3, noise=-1), "noise=-1"),
    (lambda: Learned(3, gain=math.inf), "gain=inf"), (lambda: Learned(3)(torch.zeros(2, 4)), "z has 4 numbers.*made for 3"),
    (lambda: Walkers(CHUNKS, {"x+y": loud(10), "y": loud(5)}), "share a group"),
    (lambda: Walkers(CHUNKS, {"x": loud(5)})((torch.zeros(1, 5),), streams()), "latents has 1 blocks, the layout 3"),
    (lambda: moves(Perturb(CHUNKS, {"x": loud(5)})), "no closed form"),
])
def test_bad_walkers_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_unknown_names_are_listed():
    with pytest.raises(KeyError, match="'w' is no group.*x, y, z"):
        Walkers(CHUNKS, {"x+w": loud(10)})
    with pytest.raises(KeyError, match="kind='drunk'.*untrained, direction"):
        control(Walkers(CHUNKS, {"x": loud(5)}), "drunk")


# controls and the ruler

@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_go_as_far_and_elsewhere(kind):
    z = tuple(torch.randn(500, 5, generator=rng_for(0, name)) for name in "xyz")
    walkers = Walkers(CHUNKS, {"x": loud(5), "y+z": loud(10, seed=1)})
    ours, other = walkers(z, streams()), control(walkers, kind)(z, streams())
    for blocks in ([0], [1, 2]):
        a, b = (torch.cat([moved[k] - z[k] for k in blocks], 1) for moved in (ours, other))
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=1e-3, atol=1e-6)
        assert torch.cosine_similarity(a, b).mean().abs() < 0.9
    assert all(step.walker is walkers.steps[name] for name, step in control(walkers, kind).steps.items())


def test_random_directions_are_uniform():
    z = torch.zeros(20_000, 4)
    moved = EqualNorm(lambda z, rng: z + torch.tensor([3.0, 0, 0, 0]), Additive(1.0))(z, rng_for(0, "e"))
    torch.testing.assert_close(moved.norm(dim=1), torch.full((20_000,), 3.0))
    torch.testing.assert_close(moved.T @ moved / len(moved), 9 / 4 * torch.eye(4), atol=0.06, rtol=0)


def test_displacement_is_the_papers_number(gan):
    z = gan.sample(50, rng_for(0, "z"))
    positive = single(gan.layout, "fine", Resample())(z, streams())
    found = displacement(gan, z, positive)
    torch.testing.assert_close(found["z"], (positive[1] - z[1]).norm(dim=1))
    w, moved = gan.mapping(z[0]), gan.mapping(positive[1])
    torch.testing.assert_close(found["code"], math.sqrt(3) * (moved - w).norm(dim=1))
    assert all((lengths == 0).all() and lengths.shape == (50,) for lengths in displacement(gan, z, z).values())


def test_normalised_displacement_does_not_grow_with_the_group(gan):
    "The paper's delta grows with the square root of the number of slots, or of chunks."
    line = LinearGaussian.random([1] * 6, pixels=4, width=8)
    for generator, pairs in ((gan, {"coarse": 1, "fine": 3}), (line, {"few": 1, "many": 5})):
        layout = generator.layout.regroup(dict(zip(pairs, [(0, 1), (1, len(generator.layout.blocks))])))
        z, raw, normalised = generator.sample(2000, rng_for(0, "z")), {}, {}
        for group in layout.groups:
            lengths = displacement(generator, z, single(layout, group.name, Resample())(z, streams()))["code"]
            raw[group.name] = lengths.mean().item()
            normalised[group.name] = raw[group.name] / prior_norms(generator, group.blocks, rng_for(0, "p"))["code"]
        (small, large), slots = raw.values(), list(pairs.values())
        assert large / small == pytest.approx(math.sqrt(slots[1]), rel=0.08)
        assert list(normalised.values()) == pytest.approx([math.sqrt(2)] * 2, rel=0.08)


# files

def test_walkers_survive_their_file(tmp_path):
    walkers = Walkers(CHUNKS, {"x": loud(5, noise=2).scaled(0.5), "y+z": Learned(10, (7, 3))})
    save_walkers(tmp_path / "new" / "w.safetensors", walkers, generator="toy", mi_nats=2.0)
    loaded = load_walkers(tmp_path / "new" / "w.safetensors", CHUNKS)
    z = tuple(torch.randn(4, 5, generator=rng_for(0, name)) for name in "xyz")
    assert all(torch.equal(a, b) for a, b in zip(walkers(z, streams()), loaded(z, streams())))
    assert [step.config for step in loaded.steps.values()] == [step.config for step in walkers.steps.values()]
    assert isinstance(loaded, Perturb) and not any(weight.requires_grad for weight in loaded.parameters())


def test_files_that_do_not_fit_are_named(tmp_path):
    path = save_walkers(tmp_path / "w.safetensors", Walkers(CHUNKS, {"x": loud(5)}))
    with pytest.raises(WeightsError, match="w.safetensors: .*'x' is no group"):
        load_walkers(path, SIXFOLD)
    with pytest.raises(WeightsError, match="w.safetensors: the walker of 'x' moves 5 numbers, this layout has 7"):
        load_walkers(path, Layout.of([Block("x", (7,))]))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="w.safetensors"):
        load_walkers(path, CHUNKS)
    save_weights(tmp_path / "g.safetensors", {"synthesis.b4.const": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match="holds 'stylegan2', no walkers"):
        load_walkers(tmp_path / "g.safetensors", CHUNKS)
    with pytest.raises(TypeError, match="'x' is Additive"):
        save_walkers(tmp_path / "no", Walkers(CHUNKS, {"x": Additive(1.0)}))
    assert not (tmp_path / "no").exists()


def test_the_navigator_of_cop_gen_moves_all_chunks(tmp_path):
    gold = load_file(GOLDEN / "navigator.safetensors")
    state = {key.removeprefix("rand.sd."): value for key, value in gold.items() if key.startswith("rand.sd.")}
    (tmp_path / "navigator.pth").write_bytes(corpus.navigator_file(state))
    walkers = load_walkers(tmp_path / "navigator.pth", SIXFOLD)
    assert list(walkers.steps) == ["z0+z1+z2+z3+z4+z5"]
    moved = walkers(gold["in.z"].split(20, 1), streams())
    torch.testing.assert_close(torch.cat(moved, 1), gold["in.z"] + gold["rand.out.Tz"], atol=5e-5, rtol=0)


def released(tmp_path, size, start, stop):
    walker = corpus.NonlinearWalker(size)
    walker.start, walker.stop, walker.g_type = start, stop, "bigbigan"
    with corpus.standing_in(a=corpus.NonlinearWalker):
        (tmp_path / "walker.ckpt").write_bytes(corpus.torch_file({"nn_walker": walker}))
    return walker.walker, tmp_path / "walker.ckpt"


def test_walkers_of_the_release_move_their_run_of_chunks(tmp_path):
    net, path = released(tmp_path, 60, 2, 5)
    walkers, z = load_walkers(path, SIXFOLD), SIXFOLD_DRAW
    moved = walkers(z, streams())
    torch.testing.assert_close(torch.cat(moved[2:5], 1), torch.cat(z[2:5], 1) + net(torch.cat(z[2:5], 1)))
    assert list(walkers.steps) == ["z2+z3+z4"] and all(moved[k] is z[k] for k in (0, 1, 5))
    slots = Layout.of([Block(f"w{i}", (60,)) for i in range(6)], {"a": (0, 2), "b": (2, 5), "c": (5, 6)})
    assert list(load_walkers(path, slots).steps) == ["b"], "all slots of a StyleGAN2 share one latent of 60 numbers"
    assert list(load_walkers(path, slots, "a+c").steps) == ["a+c"]
    with pytest.raises(WeightsError, match="moves blocks 2 to 5, which are no groups.*regroup"):
        load_walkers(path, SIXFOLD.regroup({"a": (0, 3), "b": (3, 6)}))
    with pytest.raises(WeightsError, match="moves 60 numbers, this layout has 20"):
        load_walkers(path, SIXFOLD, "z1")


SIXFOLD_DRAW = tuple(torch.randn(4, 20, generator=rng_for(k, "six")) for k in range(6))


# a course on the linear generator, with linear walkers: every number has a closed form

GAINS = [2.0, 0.8]
COURSE = WalkConfig(steps=60, every=15, lr=8e-3, controls=(), candidates=512, blocks=2, pool=2048, head_start=200)


def line_of(gains=GAINS):
    return LinearGaussian.random(gains, pixels=8, width=3).eval()


def exact(line, k, move):
    "Nats of noisy pairs whose block `k` goes from `z` to `move @ z`."
    parts = [m.double() @ m.double().T for m in line.mixing]
    mixing, noise = line.mixing[k].double(), torch.eye(8, dtype=torch.float64)
    rest, moved = sum(parts) - parts[k], mixing @ move.double()
    anchor, positive, cross = sum(parts) + noise, rest + moved @ moved.T + noise, rest + moved @ mixing.T
    return gaussian_mi(torch.cat([torch.cat([anchor, cross.T], 1), torch.cat([cross, positive], 1)]), 8)


def test_the_closed_form_agrees_with_the_one_of_the_generator():
    line = line_of()
    assert exact(line, 0, 0.3 * torch.eye(3)) == pytest.approx(linear_pair_mi(line, {"z0": (0.3, 0)}, 1.0))


@pytest.fixture(scope="module")
def course():
    line = line_of()
    walkers = {name: fresh_walkers(line, [name], hidden=()) for name in line.layout.group_names}
    frame = fit_walkers(line, walkers, COURSE, name="line")
    return line, walkers, frame


def curve(frame, group, kind="walker", space="code"):
    return frame[(frame["group"] == group) & (frame["control"] == kind) & (frame["space"] == space)].sort_values("step")


def test_nats_of_a_taught_walker_agree_with_the_closed_form(course):
    line, walkers, frame = course
    for k, name in enumerate(walkers):
        move = torch.eye(3) + walkers[name].steps[name].net[0].weight.detach()
        last = curve(frame, name).iloc[-1]
        assert last["step"] == 60
        assert last["mi_nats"] == pytest.approx(exact(line, k, move), rel=0.10, abs=3 * last["se"])


def test_the_curve_starts_at_what_an_anchor_shares_with_itself_and_falls(course):
    line, walkers, frame = course
    whole = linear_pair_mi(line, {}, 1.0)
    for name in walkers:
        points = curve(frame, name)
        assert points["delta"].iloc[0] < 0.05 and points["mi_nats"].iloc[0] == pytest.approx(whole, rel=0.12)
        assert points["delta"].is_monotonic_increasing and (points["se"] > 0).all()
        assert points["mi_nats"].iloc[0] - points["mi_nats"].iloc[-1] > 5 * points["se"].max()


def test_weaker_blocks_need_larger_displacement(course):
    line, walkers, frame = course
    table = delta_table(frame, levels=[0.85 * linear_pair_mi(line, {}, 1.0)])
    for _, part in table.groupby("space"):
        strong, weak = part.set_index("group").loc[["z0", "z1"], "delta"]
        assert 0 < 1.5 * strong < weak


def test_the_frame_says_how_it_was_measured(course):
    _, walkers, frame = course
    assert tuple(frame.columns) == COLUMNS and set(frame["space"]) == {"z", "code"} and set(frame["generator"]) == {"line"}
    assert not frame.duplicated(["group", "control", "step", "space", "seed"]).any() and set(frame["n"]) == {1024}
    assert frame["ceiling"].unique() == pytest.approx(math.log(512)) and set(frame["sigma_x"]) == {1.0}
    z, code = (frame[frame["space"] == space].reset_index() for space in ("z", "code"))
    np.testing.assert_allclose(z["delta"], code["delta"], rtol=1e-5)
    np.testing.assert_allclose(z["length"] / z["delta"], math.sqrt(3), rtol=0.05)
    assert (frame["delta_se"] > 0).all() and (frame["delta_se"] < 0.2 * frame["delta"]).all()


# small courses: the machinery

TINY = WalkConfig(steps=8, every=2, candidates=16, blocks=1, batch=8, pool=16, head_start=3, features=8, remembered=3, together=2,
                  rounds=1, settle=1)


class Killed(Exception):
    pass


class Mortal(LinearGaussian):
    left = 10**9

    def decode_views(self, anchor, positives):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().decode_views(anchor, positives)


def mortal(left=10**9):
    generator = Mortal(list(line_of().mixing))
    generator.left = left
    return generator


def weights(walkers):
    return torch.cat([weight.flatten() for moves in walkers.values() for weight in moves.parameters()])


@pytest.mark.parametrize("calls", [9, 23])
def test_a_killed_course_goes_on_to_the_last_bit(tmp_path, calls):
    whole, frame = fit_groups(mortal(), TINY, seed=1)
    with pytest.raises(Killed):
        fit_groups(mortal(calls), TINY, seed=1, state=tmp_path / "state.pt")
    before = mortal()
    resumed, again = fit_groups(before, TINY, seed=1, state=tmp_path / "state.pt")
    pd.testing.assert_frame_equal(frame, again, check_exact=True)
    assert torch.equal(weights(whole), weights(resumed))
    after = mortal(0)
    _, finished = fit_groups(after, TINY, seed=1, state=tmp_path / "state.pt")
    pd.testing.assert_frame_equal(frame, finished, check_exact=True)
    assert before.left > 10**9 - 60 and after.left == 0, "a finished course decodes no views again"
    with pytest.raises(ValueError, match="state.*belongs to a course with other"):
        fit_groups(mortal(), TINY, seed=2, state=tmp_path / "state.pt")


def test_seeds_repeat_and_differ():
    frames = [fit_groups(line_of(), TINY, seed=seed)[1] for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    assert not np.allclose(frames[0]["mi_nats"], frames[2]["mi_nats"]) and set(frames[2]["seed"]) == {1}


@pytest.mark.parametrize("setting", [{"target": 100.0}, {"reach": 1e-6}])
def test_a_walker_is_done_when_its_last_points_say_so_and_not_before(setting):
    _, frame = fit_groups(line_of(), WalkConfig(**{**vars(TINY), **setting, "smooth": 2}))
    assert sorted(frame["step"].unique()) == [0, 2]


def test_the_target_is_compared_with_a_mean_of_points(monkeypatch):
    "One lucky value does not end a course."
    from mlvgm_mi import delta

    values = iter([1.0, 9.0, 1.0, 2.0, 1.0])
    fake = lambda self, scores, sigma_x=0.0: delta_estimate(next(values))  # noqa: E731
    monkeypatch.setattr(delta.InfoNCE, "estimate", fake)
    _, frame = fit_groups(line_of(), WalkConfig(**{**vars(TINY), "controls": (), "smooth": 2, "target": 2.0}), groups=["z1"])
    assert list(frame[frame["space"] == "z"]["mi_nats"]) == [1.0, 9.0, 1.0, 2.0]


def delta_estimate(nats):
    from mlvgm_mi.mi import MIEstimate

    return MIEstimate(nats, 0.1, 5.0, 16, "infonce", 1.0)


def test_walkers_that_are_done_stay_while_others_go_on(monkeypatch):
    from mlvgm_mi import delta

    monkeypatch.setattr(delta, "_is_done", lambda course, name: name == "z0" and course.step == 4)
    walkers, frame = fit_groups(line_of(), TINY)
    assert curve(frame, "z0")["step"].tolist() == [0, 2, 4] and curve(frame, "z1")["step"].tolist() == [0, 2, 4, 6, 8]
    monkeypatch.setattr(delta, "_is_done", lambda course, name: course.step == 4)
    early, _ = fit_groups(line_of(), TINY)
    assert torch.equal(weights({"z0": early["z0"]}), weights({"z0": walkers["z0"]}))


def test_a_course_of_a_network_with_a_shared_latent(gan):
    before = [weight.clone() for weight in gan.parameters()]
    sets = {"all": fresh_walkers(gan, ["coarse+fine"]), "each": fresh_walkers(gan, ["coarse", "fine"], noise=2)}
    frame = fit_walkers(gan, sets, TINY)
    assert list(dict.fromkeys(frame["group"])) == ["all", "each"] and np.isfinite(frame["mi_nats"]).all()
    z, code = (frame[frame["space"] == space]["length"].to_numpy() for space in ("z", "code"))
    assert not np.allclose(z, code) and set(frame["control"]) == {"walker", *CONTROLS}
    assert all(torch.equal(a, b) for a, b in zip(before, gan.parameters()))


def test_controls_are_measured_at_the_displacement_of_their_walker():
    _, frame = fit_groups(line_of(), TINY)
    table = frame[frame["space"] == "z"].pivot(index=["group", "step"], columns="control", values="delta")
    for kind in CONTROLS:
        np.testing.assert_allclose(table[kind], table["walker"], rtol=1e-3)


def test_a_generator_that_is_not_frozen_is_refused():
    with pytest.raises(ValueError, match="freeze it"):
        fit_groups(line_of().requires_grad_(True), TINY)


@pytest.mark.parametrize("field, value, words", [
    ("steps", 0, "steps=0 is too small; use 1"), ("candidates", 2, "candidates=2"), ("batch", 1, "batch=1"),
    ("sigma_x", 0.0, "sigma_x=0.0 must be positive"), ("lr", math.nan, "lr=nan"), ("reach", -1.0, "reach=-1.0"),
    ("controls", ("drunk",), "'drunk' is unknown; choose from untrained, direction"),
])
def test_bad_settings_are_named(field, value, words):
    with pytest.raises(ValueError, match=words):
        WalkConfig(**{field: value})


# the table, on curves whose answers are set

def made(ends, se=0.01, points=5):
    "Straight lines from 4 nats at displacement 0 to `ends[seed]` at displacement 2."
    delta = np.linspace(0, 2, points)
    parts = [pd.DataFrame({"delta": delta, "mi_nats": 4 + (end - 4) * delta / 2, "seed": seed}) for seed, end in enumerate(ends)]
    constant = {"generator": "made", "group": "a", "control": "walker", "space": "z", "se": se, "sigma_x": 1.0}
    return pd.concat(parts).assign(**constant, estimator="infonce")


def test_table_of_one_seed_reads_the_line():
    table = delta_table(made([0.0]), levels=[3.0, 1.0]).set_index("level")
    assert table["delta"].to_dict() == pytest.approx({3.0: 0.5, 1.0: 1.5})
    assert table.loc[1.0, "low"] == pytest.approx(1.5 - 0.0196 / 2) and table.loc[1.0, "high"] == pytest.approx(1.5 + 0.0196 / 2)


def test_table_of_seeds_has_t_intervals():
    row = delta_table(made([0.0, 0.4, 0.8]), levels=[2.0]).iloc[0]
    values = [4 / 4, 4 / 3.6, 4 / 3.2]
    mean, half = np.mean(values), stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert (row["delta"], row["low"], row["high"]) == pytest.approx((mean, mean - half, mean + half))
    assert (row["seeds"], row["reached"]) == (3, 3)


def test_a_level_that_was_not_reached_is_marked_and_not_extrapolated():
    table = delta_table(made([1.5, 2.5]), levels=[1.0, 2.0, 3.0, 5.0]).set_index("level")
    assert table["reached"].to_dict() == {1.0: 0, 2.0: 1, 3.0: 2, 5.0: 2}
    assert table.loc[[1.0, 2.0], "delta"].eq(math.inf).all() and table.loc[1.0, "high"] == math.inf
    assert table.loc[5.0, "delta"] == 0, "a level above the start needs no displacement"


def test_noise_does_not_move_a_crossing_far():
    frame = made([0.0], se=0.1, points=41)
    frame["mi_nats"] += np.random.default_rng(0).normal(0, 0.1, len(frame))
    assert delta_table(frame, levels=[2.0])["delta"].iloc[0] == pytest.approx(1.0, abs=0.12)


def test_curves_that_do_not_compare_are_refused():
    with pytest.raises(ValueError, match="sigma_x = .*select one"):
        delta_table(pd.concat([made([0.0]), made([0.0]).assign(sigma_x=0.5)]))


def test_the_figure_has_a_panel_per_generator_and_a_style_per_control():
    both = pd.concat([made([0.0]), made([1.0]).assign(generator="other"), made([0.5]).assign(control="direction")])
    axes = delta_curves(both, "z").figure.axes
    assert [ax.get_title() for ax in axes] == ["made", "other"]
    assert [line.get_linestyle() for line in axes[0].lines] == ["-", ":"]
    assert [text.get_text() for text in axes[1].get_legend().texts] == ["learned walker", "direction"]


def test_the_figure_shows_estimates_below_zero():
    low, high = delta_curves(made([-1.0]), "z").get_ylim()
    assert low < -1.0 and high > 4.0


def test_files_of_one_walker_and_of_several_are_not_mistaken(tmp_path):
    network = load_generator("fashion-stylegan2")
    layout, one, several = network.layout, tmp_path / "one.safetensors", tmp_path / "several.safetensors"
    save_walkers(one, fresh_walkers(network, [all_groups(layout)]))
    save_walkers(several, fresh_walkers(network, layout.group_names))
    assert len(load_walker_all(one, layout).steps) == 1 and len(load_group_walkers(several, layout).steps) == 4
    with pytest.raises(ValueError, match="one.safetensors: holds one walker of all groups"):
        load_group_walkers(one, layout)
    with pytest.raises(ValueError, match="several.safetensors: holds walkers of w0-1, w2-3, w4-5, w6-7, expected one of all"):
        load_walker_all(several, layout)
