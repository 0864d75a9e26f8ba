"Trainings take bfloat16 where the machine computes in it, and float32 elsewhere."
import pytest
import torch

from mlvgm_mi.contrastive import TrainConfig
from mlvgm_mi.generators.training import TrainingConfig
from mlvgm_mi.precision import computes_bfloat16, half_if, usual_precision


@pytest.fixture(params=["AVX512", "AVX2", "DEFAULT", "SVE256"])
def capability(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param


def test_defaults_follow_the_machine(capability):
    fast = capability == "AVX512"
    assert computes_bfloat16() is computes_bfloat16("cpu") is fast
    assert usual_precision() == TrainConfig().precision == ("bf16-mixed" if fast else "32-true")
    assert TrainingConfig().bfloat16 is fast


def test_what_is_asked_for_is_taken(capability):
    assert TrainConfig(precision="bf16-mixed").precision == "bf16-mixed"
    assert TrainingConfig(bfloat16=True).bfloat16 is True


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_asked_whether_it_emulates(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert computes_bfloat16() is computes_bfloat16("cuda:1") is native
    assert usual_precision() == ("bf16-mixed" if native else "32-true")


def test_other_devices_stay_in_float32():
    assert not computes_bfloat16("meta")


@pytest.mark.parametrize("enabled, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_networks_run_in_half_only_where_it_is_enabled(enabled, dtype):
    layer = torch.nn.Linear(2, 2)
    with half_if(enabled, torch.device("cpu")):
        assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32
