"""Two gloo processes against one: no latent twice, the loss and the gradient of the whole batch, weights in step."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ddp_ranks
import pandas as pd
import pytest
import torch

from mlvgm_mi.checkpoints import read_state
from mlvgm_mi.contrastive import OBJECTIVES, Contrastive, fit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([*command, ddp_ranks.__file__, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def differing(one, other, **tolerance):
    assert one.keys() == other.keys()
    return [key for key in one if not torch.allclose(one[key], other[key], **tolerance)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_have_the_loss_and_the_gradient_of_one(name, ranks):
    "After plain SGD steps equal weights are equal gradients."
    alone = ddp_ranks.exact(name)
    first = {key: value.double() for key, value in alone.state_dict().items()}
    losses = fit(alone, ddp_ranks.Slices())["loss"].tolist()
    for theirs, state in (rank[name] for rank in ranks):
        assert theirs == pytest.approx(losses, rel=1e-9)
        assert not differing(state, alone.state_dict(), rtol=1e-9, atol=1e-12)
    assert len(differing(first, alone.state_dict(), rtol=1e-6, atol=1e-9)) > len(first) / 2  # it did learn


def test_a_loss_of_each_part_would_not_pass():
    "Half the batch is another loss: the agreement above is not for free."
    class HalfBlind(ddp_ranks.Slices):
        def batch(self, step, epoch=0):
            return super().batch(step, epoch)[:8]

    whole, half = (fit(ddp_ranks.exact("simclr"), source)["loss"][0] for source in (ddp_ranks.Slices(), HalfBlind()))
    assert half != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", ["byol-norms", "swav-norms"])
def test_encoders_heads_targets_and_prototypes_are_the_same_everywhere(name, ranks):
    (losses, ours), (also, theirs) = (rank[name] for rank in ranks)
    assert losses == also
    assert not differing(ours, theirs, rtol=0, atol=0)
    assert any(part in key for key in ours for part in ("target", "prototypes"))


def test_killed_and_resumed_on_two_processes_is_uninterrupted(ranks):
    for rank in ranks:
        checkpoints, losses, parameters = rank["resumed"]
        assert 0 < checkpoints < ddp_ranks.STEPS and losses == rank["byol-norms"][0]
        assert not differing(parameters, rank["byol-norms"][1], rtol=0, atol=0)


def test_a_source_that_knows_no_rank_is_refused(ranks):
    for rank in ranks:
        assert rank["blind"].startswith("all 2 processes were given the same views")


def test_processes_of_a_notebook_bring_back_history_and_weights(ranks, tmp_path):
    "Lightning forks them from the process that called `fit`, which has seen no step itself."
    module = ddp_ranks.with_norms("swav")
    history = fit(module, ddp_ranks.continuous(), tmp_path, trainer_options=ddp_ranks.TWO | {"strategy": "ddp_notebook"})
    losses, parameters = ranks[0]["swav-norms"]
    assert history["loss"].tolist() == losses and history["step"].tolist() == list(range(ddp_ranks.STEPS))
    assert pd.read_csv(tmp_path / "history.csv").equals(history)
    assert not differing(dict(module.named_parameters()), parameters, rtol=0, atol=0)


def test_ranks_never_share_a_latent(ranks):
    anchors = [torch.cat(blocks, 1) for rank in ranks for blocks in rank["generator"]["anchors"]]
    rows = torch.cat(anchors)
    assert len(anchors) == 2 * ddp_ranks.STEPS and len(rows) == 2 * ddp_ranks.STEPS * 8
    assert len(rows.unique(dim=0)) == len(rows) and len(rows.flatten().unique()) == rows.numel()


def test_the_generator_is_placed_once_and_is_no_part_of_the_module(ranks, folder):
    for rank in ranks:
        assert rank["generator"]["moves"] == 1
        assert not [name for name in rank["generator"]["names"] if "generator" in name or "source" in name]
    checkpoint = read_state(max((folder / "swav").glob("step-*.ckpt")))
    assert not [key for key in checkpoint["state_dict"] if key.split(".")[0] not in ("encoder", "objective")]
    assert "mixing" not in str(list(checkpoint["state_dict"]))


def test_the_first_process_writes_for_all(folder):
    assert sorted(path.name for path in (folder / "swav").iterdir()) == ["history.csv", "step-00000002.ckpt", "step-00000003.ckpt"]


def test_a_checkpoint_of_two_processes_is_taken_up_by_one(folder, ranks):
    module = ddp_ranks.with_norms("swav")
    assert isinstance(module, Contrastive)
    history = fit(module, ddp_ranks.continuous(), folder / "swav", checkpoint_every=2)
    assert history["loss"].tolist() == pytest.approx(ranks[0]["swav-norms"][0])
    assert not differing(dict(module.named_parameters()), ranks[0]["swav-norms"][1], rtol=0, atol=0)


def test_an_unfinished_run_of_two_processes_is_not_taken_up_by_one(folder, tmp_path):
    shutil.copy(folder / "swav" / "step-00000002.ckpt", tmp_path)
    with pytest.raises(ValueError, match="unfinished run of 2 processes, and this is one of 1"):
        fit(ddp_ranks.with_norms("swav"), ddp_ranks.continuous(), tmp_path, checkpoint_every=2)
