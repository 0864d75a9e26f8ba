"""Losses against a second derivation, the training loop against being killed."""
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from tensorboardX.proto.event_pb2 import Event
from torch import nn
from torch.utils.data import DataLoader

from mlvgm_mi.checkpoints import WeightsError, read_state, save_state, save_weights
from mlvgm_mi.contrastive import (
    ENCODERS, OBJECTIVES, BatchSource, Contrastive, Objective, Repeated, SimCLR, Stream, TrainConfig, _global_state, _slurm,
    encode_views, fit, load_encoder, save_encoder, seeded_init, small_resnet,
)
from mlvgm_mi.encoders import _block
from mlvgm_mi.latents import rng_for

STEPS = 9


@dataclass
class Noise:
    "Random views by address; `fatal` is a step of the training at which `die` is called."
    fatal: int | None = None
    made: int = 0

    def __len__(self):
        return 4

    def die(self):
        raise InterruptedError("killed")

    def batch(self, step, epoch=0):
        if self.fatal == epoch * len(self) + step:
            self.die()
        self.made += 1
        return torch.rand(8, 2, 1, 16, 16, generator=rng_for(0, "noise", epoch=epoch, step=step))


class MovingTarget(Objective):
    "As BYOL: a copy of the encoder that follows slowly, is no parameter, and must survive a resume."

    def attach(self, encoder):
        self.target = small_resnet(width=4)
        self.target.load_state_dict(encoder.state_dict())
        self.target.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def step(self, encoder, views):
        online, target = encode_views(encoder, views), encode_views(self.target, views)
        return -nn.functional.cosine_similarity(online[:, 0].float(), target[:, 1].float()).mean()

    def after_step(self, encoder, step):
        self.calls += 1
        assert step == self.calls
        with torch.no_grad():
            for mine, theirs in zip(self.target.parameters(), encoder.parameters()):
                mine.lerp_(theirs, 0.1)


def simclr():
    return SimCLR(32)


def run(objective=simclr, seed=0, encoder=None, **config):
    config = dict(steps=STEPS, warmup=2) | config
    return Contrastive(small_resnet(width=4, seed=seed, **encoder or {}), objective(), TrainConfig(**config))


def assert_same(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def plain(temperature=0.3, width=8):
    "SimCLR without its head, in float64."
    objective = SimCLR(width, temperature).double()
    objective.head = nn.Identity()
    return objective


def draw(*shape, stream="features"):
    return torch.randn(*shape, generator=rng_for(0, stream), dtype=torch.float64)


# losses


def reference(features, temperature):
    "NT-Xent written out: one softmax per view, its partner the right answer."
    unit = [row / row.square().sum().sqrt() for pair in features for row in pair]
    total = 0.0
    for a in range(len(unit)):
        scores = {b: float(unit[a] @ unit[b]) / temperature for b in range(len(unit)) if b != a}
        total += math.log(sum(math.exp(score) for score in scores.values())) - scores[a ^ 1]
    return total / len(unit)


@pytest.mark.parametrize("instances", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5, 2.0])
def test_loss_is_the_formula(instances, temperature):
    features = draw(instances, 2, 8)
    assert plain(temperature)(features).item() == pytest.approx(reference(features, temperature), rel=1e-10)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
@pytest.mark.parametrize("instances", [2, 32, 128])
def test_chance_is_log_of_the_candidates_at_every_temperature(instances, temperature):
    "A hidden factor temperature / 0.07 would show at every temperature but 0.07."
    equal = torch.ones(instances, 2, 8, dtype=torch.float64)
    assert plain(temperature)(equal).item() == pytest.approx(math.log(2 * instances - 1), rel=1e-10)


def test_loss_of_equal_partners_and_orthogonal_strangers():
    features = torch.eye(8, dtype=torch.float64)[:6, None].repeat(1, 2, 1)
    assert plain(0.3)(features).item() == pytest.approx(math.log(1 + 10 * math.exp(-1 / 0.3)), rel=1e-10)


def test_loss_does_not_know_the_order_of_instances_or_views_or_the_length_of_vectors():
    features = draw(7, 2, 8)
    value = plain()(features)
    for same in (features[torch.randperm(7, generator=rng_for(0, "order"))], features.flip(1), 3 * features):
        torch.testing.assert_close(plain()(same), value)
    assert not torch.isclose(plain()(torch.stack([features[:, 0], features[:, 1].roll(1, 0)], 1)), value)


def test_more_views_average_over_pairs():
    features = draw(6, 3, 8)
    pairs = [plain()(features[:, pair]) for pair in ([0, 1], [0, 2], [1, 2])]
    torch.testing.assert_close(plain()(features), torch.stack(pairs).mean())


def test_gradients():
    assert torch.autograd.gradcheck(plain(), draw(4, 2, 8).requires_grad_())


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        SimCLR(8, temperature)


OPTIONS = {"emi": dict(projection=3), "swav": dict(prototypes=6)}  # for batches of 8


def build(name):
    return lambda: OBJECTIVES[name](32, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train_the_encoder_and_their_heads(name):
    module = run(build(name))
    before = {key: value.clone() for key, value in module.named_parameters()}
    fit(module, Noise())
    still = [key for key, value in module.named_parameters() if torch.equal(value, before[key])]
    assert not still


def test_objectives_see_float32_under_bfloat16():
    class Spy(Objective):
        def forward(self, features):
            seen.append((features.dtype, torch.is_autocast_enabled("cpu")))
            return features.square().mean()

    seen = []
    fit(run(Spy, precision="bf16-mixed"), Noise())
    assert set(seen) == {(torch.float32, False)}


def test_an_objective_without_forward_says_so():
    with pytest.raises(NotImplementedError, match="Objective must define forward"):
        Objective()(draw(2, 2, 8))


# encoders


@pytest.mark.parametrize(
    "name, options, width",
    [
        ("small_resnet", {}, 128),
        ("small_resnet", dict(channels=3, width=8, blocks=2, stem_stride=1), 64),
        ("resnet50", dict(channels=1), 2048),
    ],
)
def test_encoders_keep_their_promises_and_come_back_from_disk(name, options, width, tmp_path):
    encoder = ENCODERS[name](**options, seed=3).eval()
    images = torch.rand(2, options.get("channels", 1), 32, 32, generator=rng_for(0, "images"))
    assert encoder(images).shape == (2, width) and encoder.num_features == width
    back = load_encoder(save_encoder(tmp_path / "encoder.safetensors", encoder.to(memory_format=torch.channels_last)))
    assert not back.training and back.config == encoder.config
    assert_same(back, encoder)


def test_first_weights_are_those_of_the_seed_and_nothing_else_moves():
    before = torch.random.get_rng_state()
    a, b, other = small_resnet(width=4), small_resnet(width=4), small_resnet(width=4, seed=1)
    SimCLR(32)
    assert torch.equal(before, torch.random.get_rng_state())
    assert_same(a, b)
    convolutions = [key for key, value in a.state_dict().items() if value.ndim == 4]
    assert not any(torch.equal(a.state_dict()[key], other.state_dict()[key]) for key in convolutions)


def test_seeded_init_restores_the_state_after_an_error():
    before = torch.random.get_rng_state()
    with pytest.raises(KeyError), seeded_init(0, "x"):
        torch.rand(3)
        raise KeyError
    assert torch.equal(before, torch.random.get_rng_state())


def test_unknown_or_damaged_encoder_files(tmp_path):
    path = save_weights(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {"encoder": "vgg"})
    with pytest.raises(WeightsError, match="'vgg'"):
        load_encoder(path)
    path = save_encoder(tmp_path / "b.safetensors", small_resnet(width=4))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="b.safetensors"):
        load_encoder(path)


@pytest.mark.parametrize("option", ["channels", "width", "blocks", "stem_stride"])
def test_sizes_of_zero_are_refused(option):
    with pytest.raises(ValueError, match=f"{option}=0"):
        small_resnet(**{option: 0})


# encoders


@pytest.mark.parametrize("inputs, outputs, stride", [(4, 8, 2), (3, 8, 3), (16, 32, 2), (6, 4, 1)])
def test_shortcuts_are_strided_convolutions(inputs, outputs, stride):
    "With few channels last the strided kernel of some CPUs would write beyond its memory, so a peer sees channels first."
    shortcut = _block(inputs, outputs, stride).downsample[0]
    images = torch.randn(5, inputs, 7, 8, generator=rng_for(0, "images"))
    last = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    first = images.double().requires_grad_()
    found = shortcut.to(memory_format=torch.channels_last)(last)
    expected = nn.functional.conv2d(first, shortcut.weight.double(), stride=stride)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    push = torch.randn(found.shape, generator=rng_for(0, "push"))
    for a, b in zip(torch.autograd.grad(found, [last, shortcut.weight], push),
                    torch.autograd.grad(expected, [first, shortcut.weight], push.double())):  # fmt: skip
        torch.testing.assert_close(a.double(), b.double(), atol=1e-4, rtol=1e-4)


# configuration


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps"),
        (dict(lr=0.0), "lr"),
        (dict(weight_decay=-1.0), "weight_decay"),
        (dict(steps=10, warmup=10), "warmup=10"),
        (dict(optimiser="lars"), "'lars'.*adamw"),
        (dict(precision="bf16-true"), "use 'bf16-mixed'"),
        (dict(precision="16-true"), "use '16-mixed'"),
    ],
)
def test_senseless_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_numbers_of_numpy_reach_no_checkpoint(tmp_path):
    "A rate that was read out of a table is one of numpy's, which files that execute nothing cannot hold."
    config = dict(lr=pd.Series([0.01]).iloc[0], steps=np.int64(4), warmup=torch.tensor(1))
    module = run(**config)
    assert [type(value) for value in (module.config.lr, module.config.steps, module.config.warmup)] == [float, int, int]
    whole = fit(run(lr=0.01, steps=4, warmup=1), Noise())
    pd.testing.assert_frame_equal(fit(module, Noise(), tmp_path, checkpoint_every=2), whole)


def test_simsiams_predictor_keeps_its_learning_rate():
    class Spy(Contrastive):
        def optimizer_step(self, epoch, index, optimizer, *args, **kwargs):
            used.append({group["constant"]: group["lr"] for group in optimizer.param_groups})
            super().optimizer_step(epoch, index, optimizer, *args, **kwargs)

    used, config = [], TrainConfig(steps=STEPS, warmup=3, lr=0.01)
    module = Spy(small_resnet(width=4), OBJECTIVES["simsiam"](32), config)
    history = fit(module, Noise())
    assert [rates[True] for rates in used] == [0.01] * STEPS
    assert [rates[False] for rates in used] == pytest.approx(history.lr.tolist())
    still = {id(p) for p in module.objective.constant_lr()}
    groups = config.build_optimiser(module.parameters(), module.objective.constant_lr()).param_groups
    assert {id(p) for group in groups if group["constant"] for p in group["params"]} == still
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_history_holds_the_learning_rates_that_were_used(optimiser):
    class Spy(Contrastive):
        def optimizer_step(self, epoch, index, optimizer, *args, **kwargs):
            used.append([group["lr"] for group in optimizer.param_groups])
            super().optimizer_step(epoch, index, optimizer, *args, **kwargs)

    used, config = [], TrainConfig(steps=STEPS, warmup=3, lr=0.01, final_lr=0.1, optimiser=optimiser)
    history = fit(Spy(small_resnet(width=4), simclr(), config), Noise())
    assert [rates[0] for rates in used] == pytest.approx(history.lr.tolist()) and all(a == b for a, b in used)
    assert history.lr.max() == pytest.approx(0.01) and history.lr.idxmax() == 3
    assert history.step.tolist() == list(range(STEPS))


def test_weight_decay_spares_norms_and_biases():
    class Nothing(Objective):
        def forward(self, features):
            return 0 * features.sum()

    module = run(Nothing, weight_decay=0.5, lr=0.1)
    before = {key: value.clone() for key, value in module.named_parameters()}
    fit(module, Noise())
    for key, value in module.named_parameters():
        assert torch.equal(value, before[key]) == (value.ndim <= 1), key
        assert value.norm() <= before[key].norm()


# bad batches


@pytest.mark.parametrize(
    "views, message",
    [
        (torch.rand(8, 1, 16, 16), r"\(8, 1, 16, 16\).*\(B, V, C, H, W\)"),
        (torch.rand(1, 2, 1, 16, 16), "B=1"),
        (torch.rand(8, 1, 1, 16, 16), "V=1"),
        (torch.ones(8, 2, 1, 16, 16, dtype=torch.uint8), "uint8"),
    ],
)
def test_bad_batches_are_named(views, message):
    with pytest.raises(ValueError, match=message):
        fit(run(), [views])


def test_an_empty_source_is_named():
    with pytest.raises(ValueError, match="no batches"):
        fit(run(), [])


def test_views_that_are_not_finite_stop_the_run():
    with pytest.raises(FloatingPointError, match=r"nan at step 0.*\(they are not\)"):
        fit(run(), [torch.full((8, 2, 1, 16, 16), math.nan)])


def test_weights_that_are_not_finite_stop_the_run():
    module = run()
    nn.init.constant_(next(module.encoder.parameters()), math.inf)
    with pytest.raises(FloatingPointError, match=r"nan at step 0.*lr=.*\(they are\)"):
        fit(module, Noise())


# sources


def test_stream_is_the_same_from_everywhere_and_with_workers():
    noise = Noise()
    whole = list(Stream(noise, 0, 10))
    assert len(whole) == 10 and not torch.equal(whole[0], whole[4])
    for first, workers in [(0, 2), (3, 0), (7, 2)]:
        part = list(Stream(noise, first, 10, workers))
        assert all(torch.equal(a, b) for a, b in zip(part, whole[first:], strict=True))


def test_lists_are_sources_in_disguise():
    assert isinstance(Repeated([]), BatchSource) and isinstance(Noise(), BatchSource)
    assert not isinstance([], BatchSource)
    batches = [Noise().batch(step) for step in range(3)]
    a, b = run(), run()
    assert fit(a, batches).equals(fit(b, Repeated(batches)))
    assert_same(a, b)


# killed and resumed


@pytest.fixture(scope="module", params=["simclr-adamw", "simclr-sgd", "simclr-float32", "target"])
def case(request):
    start = {
        "simclr-adamw": lambda: run(),
        "simclr-sgd": lambda: run(optimiser="sgd", lr=0.1),
        "simclr-float32": lambda: run(precision="32-true"),
        "target": lambda: run(MovingTarget),
    }[request.param]
    module = start()
    return start, module, fit(module, Noise())


@pytest.mark.parametrize("name", ["simsiam", "byol", "swav"])
def test_every_kind_of_objective_goes_on_where_it_was(name, tmp_path):
    whole = run(build(name))
    history = fit(whole, Noise())
    with pytest.raises(InterruptedError):
        fit(run(build(name)), Noise(fatal=5), tmp_path, checkpoint_every=2)
    assert len(pd.read_csv(tmp_path / "history.csv")) == 4  # what was reached is on disk
    resumed = run(build(name))
    assert fit(resumed, Noise(), tmp_path, checkpoint_every=2).equals(history)
    assert_same(resumed, whole)


def test_a_target_wiped_on_resume_would_be_noticed(tmp_path):
    "What the official code does: on a resume the target is copied from the encoder again."
    class Wiping(Contrastive):
        def on_train_start(self):
            if self.history:
                self.objective.attach(self.encoder)

    whole, config = run(build("byol")), TrainConfig(steps=STEPS, warmup=2)
    history = fit(whole, Noise())
    assert any(not torch.equal(a, b) for a, b in zip(whole.objective.target["encoder"].parameters(), whole.encoder.parameters()))
    with pytest.raises(InterruptedError):
        fit(run(build("byol")), Noise(fatal=5), tmp_path, checkpoint_every=2)
    wiped = Wiping(small_resnet(width=4), build("byol")(), config)
    assert not fit(wiped, Noise(), tmp_path, checkpoint_every=2).equals(history)
    with pytest.raises(AssertionError, match="encoder.body"):
        assert_same(wiped, whole)


@pytest.mark.parametrize("killed, every", [(1, 1), (1, 2), (3, 1), (6, 2), (8, 3)])
def test_killed_and_resumed_is_uninterrupted(case, killed, every, tmp_path):
    start, whole, history = case
    with pytest.raises(InterruptedError):
        fit(start(), Noise(fatal=killed), tmp_path, checkpoint_every=every)
    resumed, source = start(), Noise()
    assert fit(resumed, source, tmp_path, checkpoint_every=every).equals(history)
    assert_same(resumed, whole)
    assert source.made <= STEPS - (killed - 1) // every * every  # the loader is one batch ahead
    assert len(list(tmp_path.glob("step-*.ckpt"))) == 2 and (tmp_path / "history.csv").exists()


def test_killed_twice(case, tmp_path):
    start, whole, history = case
    for killed in (3, 6):
        with pytest.raises(InterruptedError):
            fit(start(), Noise(fatal=killed), tmp_path, checkpoint_every=1)
    resumed = start()
    assert fit(resumed, Noise(), tmp_path, checkpoint_every=1).equals(history)
    assert_same(resumed, whole)


def test_a_finished_run_is_read_back_without_a_batch(case, tmp_path):
    start, whole, history = case
    fit(start(), Noise(), tmp_path)
    again, source = start(), Noise()
    assert fit(again, source, tmp_path).equals(history) and source.made == 0
    assert_same(again, whole)


class Drawing(Objective):
    "Draws from torch's global state with every loss and after every update."

    def __init__(self):
        super().__init__()
        self.register_buffer("walk", torch.zeros(3))

    def forward(self, features):
        kept = nn.functional.dropout(features, 0.3)
        return -nn.functional.cosine_similarity(kept[:, 0], kept[:, 1]).mean()

    def after_step(self, encoder, step):
        self.walk += torch.randn(3)


def drawing(kind=Contrastive, **config):
    encoder = small_resnet(width=4)
    encoder.body.append(nn.Dropout(0.2))
    return kind(encoder, Drawing(), TrainConfig(**dict(steps=STEPS, warmup=2) | config))


def test_what_networks_draw_goes_on_where_it_was(tmp_path):
    whole = drawing()
    history, before = fit(whole, Noise()), torch.random.get_rng_state()
    with pytest.raises(InterruptedError):
        fit(drawing(), Noise(fatal=5), tmp_path, checkpoint_every=2)
    torch.rand(7)  # the state outside is nobody's business
    resumed, outside = drawing(), torch.random.get_rng_state()
    assert fit(resumed, Noise(), tmp_path, checkpoint_every=2).equals(history)
    assert_same(resumed, whole)
    assert torch.equal(outside, torch.random.get_rng_state()) and not torch.equal(outside, before)


def test_seeds_ranks_and_steps_draw_differently():
    class SecondRank(Contrastive):
        global_rank = 1

    modules = [drawing(), drawing(seed=1), drawing(SecondRank)]
    histories = [fit(module, Noise()) for module in modules]
    assert len({tuple(history.loss) for history in histories}) == 3
    alike = fit(drawing(lr=1e-30, warmup=0), [Noise().batch(0)]).loss
    assert alike.nunique() == STEPS


def test_a_gpu_draws_from_the_stream_too(monkeypatch):
    gpu = torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (None, gpu))
    before, rng_on = gpu.get_state(), partial(rng_for, 3, "training", step=2)
    with pytest.raises(KeyError), _global_state(rng_on, torch.device("cuda", 1)):
        assert torch.equal(torch.rand(3, generator=gpu), torch.rand(3, generator=rng_on()))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=rng_on()))
        raise KeyError
    assert torch.equal(gpu.get_state(), before)


class Interrupted(Noise):
    def die(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("every, words", [
    (2, "stopped by Ctrl-C after 4 updates; the same call goes on from its last checkpoint"),
    (20, "stopped by Ctrl-C after 4 updates; it left no checkpoint"),
])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, every, words):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        fit(run(), Interrupted(fatal=5), tmp_path, checkpoint_every=every)
    assert str(stop.value) == words and signal.getsignal(signal.SIGINT) is handler


def test_another_exit_is_left_alone():
    class Leaving(Noise):
        def die(self):
            raise SystemExit(3)

    with pytest.raises(SystemExit) as stop:
        fit(run(), Leaving(fatal=2))
    assert stop.value.code == 3


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    "A job of one task, as its processes see it."
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.chdir(tmp_path)


class Watching(lightning.Callback):
    def on_train_batch_end(self, trainer, *_):
        self.handler = signal.getsignal(signal.SIGUSR1)


def test_lightning_requeues_nothing_under_slurm(slurm, tmp_path):
    "Its handler would leave a checkpoint in the working directory, from which the next run there would start."
    watching = Watching()
    history = fit(run(), Noise(), trainer_options={"callbacks": watching})
    assert watching.handler is signal.SIG_DFL and not list(tmp_path.iterdir())
    assert history.equals(fit(run(), Noise(), trainer_options={"plugins": SLURMEnvironment(auto_requeue=False)}))


def test_torchrun_inside_a_job_stays_torchrun(slurm, monkeypatch):
    assert [type(environment) for environment in _slurm([])] == [SLURMEnvironment]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not _slurm([])


def test_a_checkpoint_that_lightning_left_under_slurm_is_not_taken_up(slurm, tmp_path):
    fit(run(seed=1, steps=3), Noise(), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "step-00000003.ckpt", tmp_path / "hpc_ckpt_1.ckpt")
    with pytest.raises(ValueError, match="hpc_ckpt_1.ckpt: Lightning would go on from this file; move it away"):
        fit(run(), Noise())
    elsewhere = {"default_root_dir": tmp_path / "elsewhere"}
    with pytest.raises(InterruptedError):
        fit(run(), Noise(fatal=5), tmp_path / "run", 2, trainer_options=elsewhere)
    assert fit(run(), Noise(), tmp_path / "run", 2).equals(fit(run(), Noise(), trainer_options=elsewhere))


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_contrastive import Noise, build, fit, run

class Fatal(Noise):
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

for name in sys.argv[3:]:
    if os.fork() == 0:
        fit(run(build(name)), Fatal(fatal=6), os.path.join(sys.argv[2], name), checkpoint_every=2)
    print(os.WTERMSIG(os.wait()[1]))
"""


@pytest.mark.slow
def test_sigkill(tmp_path):
    names = ["simclr", "simsiam", "byol", "swav"]
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 4, done.stderr
    for name in names:
        assert list((tmp_path / name).glob("step-*.ckpt"))
        whole, resumed = run(build(name)), run(build(name))
        assert fit(whole, Noise()).equals(fit(resumed, Noise(), tmp_path / name, checkpoint_every=2))
        assert_same(whole, resumed)


DAMAGE = {
    "cut short": lambda content: content[:-100],
    "a bit turned": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("how_many", [1, 2])
def test_damaged_checkpoints_are_passed_over(damage, how_many, tmp_path):
    with pytest.raises(InterruptedError):
        fit(run(), Noise(fatal=8), tmp_path, checkpoint_every=3)
    paths = sorted(tmp_path.glob("step-*.ckpt"), reverse=True)
    assert len(paths) == 2
    for path in paths[:how_many]:
        path.write_bytes(damage(path.read_bytes()))
    whole, resumed = run(), run()
    with pytest.warns(UserWarning, match="passing over"):
        history = fit(resumed, Noise(), tmp_path, checkpoint_every=3)
    assert history.equals(fit(whole, Noise()))
    assert_same(whole, resumed)


@pytest.mark.parametrize("other, named", [
    (dict(seed=1), "weights"), (dict(lr=0.5), "lr"), (dict(warmup=1), "warmup"),
    (dict(objective=lambda: OBJECTIVES["dcl"](32)), "objective"),  # the same head, the same first weights
    (dict(objective=lambda: SimCLR(32, temperature=0.5)), "objective"),
    (dict(encoder=dict(stem_stride=1)), "encoder"), (dict(seed=1, encoder=dict(stem_stride=1)), "weights, encoder"),
])
def test_the_folder_of_another_run_is_refused(other, named, tmp_path):
    fit(run(), Noise(), tmp_path)
    with pytest.raises(ValueError, match=f"other {named};"):
        fit(run(**other), Noise(), tmp_path)


@dataclass(frozen=True)
class Options:
    power: int


class Tuned(Objective):
    "An objective with a setting of any type."

    def __init__(self, setting):
        super().__init__()
        self.setting = setting

    def forward(self, features):
        return features.square().mean()


@pytest.mark.parametrize("one, other", [
    ((1, 2), (1, 3)), ([0.5], [0.25]), ({"a": 1}, {"a": 2}), (None, 0.1), (None, ()), (torch.relu, torch.tanh),
    (nn.functional.relu, nn.functional.silu), (Options(1), Options(2)), (torch.ones(3), torch.zeros(3)),
], ids=lambda setting: type(setting).__name__)  # fmt: skip
def test_settings_of_any_plain_type_tell_runs_apart(one, other, tmp_path):
    short = dict(steps=2, warmup=0)
    history = fit(run(lambda: Tuned(one), **short), Noise(), tmp_path)
    assert fit(run(lambda: Tuned(one), **short), Noise(), tmp_path).equals(history)
    with pytest.raises(ValueError, match="other objective;"):
        fit(run(lambda: Tuned(other), **short), Noise(), tmp_path)


def test_a_part_that_is_frozen_makes_another_run(tmp_path):
    fit(run(), Noise(), tmp_path)
    module = small_resnet(width=4)
    module.body[0].requires_grad_(False)
    with pytest.raises(ValueError, match="other encoder;"):
        fit(Contrastive(module, simclr(), run().config), Noise(), tmp_path)


def test_how_gradients_are_clipped_belongs_to_the_run(tmp_path):
    clipped = dict(gradient_clip_val=0.01)
    history = fit(run(), Noise(), tmp_path, trainer_options=clipped)
    assert not history.equals(fit(run(), Noise()))
    same = dict(gradient_clip_val=torch.tensor(0.01, dtype=torch.float64), gradient_clip_algorithm=GradClipAlgorithmType.NORM)
    assert fit(run(), Noise(), tmp_path, trainer_options=same).equals(history)
    by_value = clipped | dict(gradient_clip_algorithm="value")
    for other, named in [({}, "val"), (dict(gradient_clip_val=0.02), "val"), (by_value, "algorithm")]:
        with pytest.raises(ValueError, match=f"other gradient_clip_{named};"):
            fit(run(), Noise(), tmp_path, trainer_options=other)


@dataclass
class Named(Noise):
    "Views that say what they are."
    name: str = "one"

    def identity(self):
        return self.name


def test_the_folder_of_other_views_is_refused(tmp_path):
    history = fit(run(), Named(), tmp_path)
    assert fit(run(), Named(), tmp_path).equals(history)
    for other in (Named(name="two"), Noise()):
        with pytest.raises(ValueError, match="other views;"):
            fit(run(), other, tmp_path)


TWO = dict(accelerator="cpu", devices=2, strategy="ddp_fork")


def test_an_unfinished_run_goes_on_with_as_many_processes(tmp_path):
    with pytest.raises(InterruptedError):
        fit(run(), Noise(fatal=5), tmp_path, checkpoint_every=2)
    with pytest.raises(ValueError, match="unfinished run of 1 processes, and this is one of 2"):
        fit(run(), Noise(), tmp_path, trainer_options=TWO)
    for path in tmp_path.glob("step-*.ckpt"):
        save_state(path, read_state(path) | {"world_size": 4})
    with pytest.raises(ValueError, match="unfinished run of 4 processes, and this is one of 1"):
        fit(run(), Noise(), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step-00000002.ckpt", "step-00000004.ckpt"]


def test_a_list_is_no_source_for_several_processes():
    with pytest.raises(ValueError, match="source is a list, from which all 2 processes would take the same batches"):
        fit(run(), [Noise().batch(0)], trainer_options=TWO)


def test_a_trained_module_is_not_trained_again_but_in_its_folder(tmp_path):
    module = run()
    history = fit(module, Noise(), tmp_path)
    assert fit(module, Noise(), tmp_path).equals(history)
    with pytest.raises(ValueError, match=f"trained for {STEPS} updates already"):
        fit(module, Noise())


@pytest.mark.parametrize("wrong, message", [
    (dict(checkpoint_every=0), "checkpoint_every=0 must be at least 1"),
    (dict(trainer_options={"accumulate_grad_batches": 2}), "larger batches"),
    (dict(trainer_options={"precision": "64-true"}), "precision='64-true': .* give it to TrainConfig"),
    (dict(trainer_options={"max_steps": 3}), "max_steps=3: .* give TrainConfig its steps"),
    (dict(trainer_options=TWO | {"strategy": "ddp_spawn"}), "strategy='ddp_spawn': .* torchrun .* 'ddp_notebook' in a notebook"),
])
def test_what_cannot_work_is_refused_before_training(wrong, message, tmp_path):
    module = run()
    with pytest.raises(ValueError, match=message):
        fit(module, Noise(), tmp_path, **wrong)
    assert not module.history and not list(tmp_path.iterdir())


def test_views_are_drawn_without_a_logger_too(tmp_path):
    fit(run(), Noise(), logs=tmp_path, trainer_options={"logger": False})
    assert (tmp_path / "views.png").stat().st_size > 1000


def test_global_state_and_output_stay_alone(tmp_path, capfd):
    module, before = run(), torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(module, Noise(), tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert capfd.readouterr() == ("", "")


# logs


def events(folder):
    "What TensorBoard would read: records of a length in 8 bytes, its checksum in 4, an event, its checksum in 4."
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def test_logs_hold_the_curve_and_the_first_views(tmp_path):
    history = fit(run(steps=25), Noise(), logs=tmp_path)
    found = [(value, event.step) for event in events(tmp_path) for value in event.summary.value]
    for name in ("loss", "lr"):
        pairs = {step: value.simple_value for value, step in found if value.tag == name}
        assert pairs == pytest.approx(history[name][[9, 19]].to_dict(), rel=1e-5)
    assert [value.tag for value, _ in found if value.HasField("image")] == ["views"]
    assert {"views.png", "views.pdf"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("every", "steps"), [(10, [9, 19]), (5, [4, 9, 14, 19, 24])])
def test_any_logger_gets_loss_and_rate(tmp_path, every, steps):
    options = {"logger": CSVLogger(tmp_path, name="", version=""), "log_every_n_steps": every}
    history = fit(run(steps=25), Noise(), trainer_options=options)
    logged = pd.read_csv(tmp_path / "metrics.csv").set_index("step")
    for name in ("loss", "lr"):
        assert logged[name].to_dict() == pytest.approx(history[name][steps].to_dict(), rel=1e-5)


def test_training_may_log_nothing():
    assert len(fit(run(steps=3), Noise(), trainer_options={"log_every_n_steps": 0})) == 3


def test_a_source_that_can_be_moved_is_moved_once():
    class Movable(Noise):
        def to(self, device):
            moves.append(str(device))
            return self

    moves = []
    fit(run(), Movable())
    assert moves == ["cpu"]


# what a caller gives

def test_own_callbacks_and_plugins_come_beside_the_packages(tmp_path):
    class Counts(lightning.Callback):
        steps = 0

        def on_train_batch_end(self, *_):
            self.steps += 1

    for given in ({"callbacks": Counts()}, {"callbacks": [Counts()], "plugins": []}):
        folder = tmp_path / f"{len(given)}"
        fit(run(steps=4), Noise(), folder, 2, trainer_options=given, logs=folder)
        counter = given["callbacks"][0] if isinstance(given["callbacks"], list) else given["callbacks"]
        assert counter.steps == 4 and (folder / "views.png").exists()
        assert [path.name for path in sorted(folder.glob("*.ckpt"))] == ["step-00000002.ckpt", "step-00000004.ckpt"]
        assert len(fit(run(steps=4), Noise(), folder, 2)) == 4  # the checkpoint can be read


@pytest.mark.parametrize("options, words", [
    ({"limit_train_batches": 3}, "limit_train_batches=3: the same views"), ({"overfit_batches": 1}, "overfit_batches=1")])
def test_options_that_would_repeat_views_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fit(run(), Noise(), trainer_options=options)


@pytest.mark.parametrize("source, words", [
    (DataLoader(torch.zeros(4, 2)), None), (iter([torch.rand(4, 2, 1, 8, 8)]), "source is a list_iterator"),
    ([(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8))], "a batch is a list, expected one tensor"),
])  # fmt: skip
def test_what_is_no_source_of_tensors_is_named(source, words):
    with pytest.raises(ValueError, match=words or "source is a DataLoader, expected a source or a list of batches"):
        fit(run(), source)


@pytest.mark.parametrize("config", [dict(lr=math.nan), dict(lr=math.inf), dict(final_lr=-5), dict(weight_decay=math.nan)])
def test_rates_are_finite(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        TrainConfig(**config)


def test_a_matrix_without_factors_is_a_loss_that_is_not_finite():
    class Singular(Objective):
        def step(self, encoder, views):
            return torch.linalg.cholesky(-torch.eye(2)).sum()

    with pytest.raises(FloatingPointError, match="the loss is nan at step 0; lower lr"):
        fit(run(Singular), Noise())


@pytest.mark.parametrize("scale, shift, words", [(255, 0, r"views span \[0.*, 25.*\], expected \[0, 1\]"), (2, -1, "views span")])
def test_views_of_another_range_are_refused(scale, shift, words):
    with pytest.raises(ValueError, match=words):
        fit(run(), [scale * torch.rand(8, 2, 1, 32, 32, generator=rng_for(0, "range")) + shift])


def test_a_training_step_needs_no_trainer():
    module = run()
    loss = module.training_step(Noise().batch(0), 0)
    loss.backward()
    assert module.history[0][:2] == (0, loss.item()) and all(p.grad is not None for p in module.encoder.parameters())
