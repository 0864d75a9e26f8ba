"Files whole or not there; every truncation and every turned bit is refused; nothing that is read can run code."
import hashlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mlvgm_mi.checkpoints import (
    FORMAT, WeightsError, atomic_path, file_digest, load_into, read_state, read_weights, save_state, save_weights,
)
from mlvgm_mi.latents import rng_for


def small_state():
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# atomic_path

def test_atomic_path_writes_beside_the_target_and_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "new" / "x.npz") as temporary:
        assert temporary.parent == tmp_path / "new" and temporary.suffix == ".npz"
        temporary.write_text("whole")
        assert not (tmp_path / "new" / "x.npz").exists()
    assert names(tmp_path / "new") == ["x.npz"] and (tmp_path / "new" / "x.npz").read_text() == "whole"


@pytest.mark.parametrize("accident", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_path_cleans_up_after_any_exception(tmp_path, accident):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(accident), atomic_path(target) as temporary:
        temporary.write_text("ne")
        raise accident
    assert names(tmp_path) == ["x.txt"] and target.read_text() == "old"


def test_atomic_path_says_when_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.txt: nothing was written"), atomic_path(tmp_path / "x.txt"):
        pass
    assert names(tmp_path) == []


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")
    code = ("import os, sys; from mlvgm_mi.checkpoints import atomic_path\n"
            "with atomic_path(sys.argv[1]) as path:\n"
            "    path.write_text('ne'); os.kill(os.getpid(), 9)")
    done = subprocess.run([sys.executable, "-c", code, str(target)])
    assert done.returncode == -9 and target.read_text() == "old"


def test_two_writers_do_not_share_a_temporary_name(tmp_path):
    with atomic_path(tmp_path / "x") as one, atomic_path(tmp_path / "x") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "1"  # the outer block ends last


def test_files_get_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert os.stat(tmp_path / "ours").st_mode == os.stat(tmp_path / "plain").st_mode


def test_file_digest(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert file_digest(tmp_path / "x") == hashlib.sha256(content).hexdigest()


# weights

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_back_bit_for_bit(tmp_path, dtype):
    base = torch.randn(4, 6, generator=rng_for(0, "weights")).mul(10).to(dtype)
    state = {"matrix": base, "transposed": base.T, "scalar": base[0, 0], "empty": base[:0], "shared": base[1:]}
    config = {"width": 3, "rates": [0.1, None], "name": "ü"}
    back, read = read_weights(save_weights(tmp_path / "w.safetensors", state, config))
    assert read == config and set(back) == set(state)
    for name, tensor in state.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    one = save_weights(tmp_path / "1", small_state(), {"x": 1, "y": 2})
    two = save_weights(tmp_path / "2", dict(reversed(small_state().items())), {"y": 2, "x": 1})
    assert file_digest(one) == file_digest(two)


def test_every_truncation_is_refused(tmp_path):
    good = save_weights(tmp_path / "good", small_state(), {"x": 1}).read_bytes()
    bad = tmp_path / "bad.safetensors"
    for length in range(len(good)):
        bad.write_bytes(good[:length])
        with pytest.raises(WeightsError, match="bad.safetensors: truncated.*copy it again"):
            read_weights(bad)


def test_every_turned_bit_is_refused(tmp_path):
    good = save_weights(tmp_path / "good", small_state(), {"x": 1}).read_bytes()
    bad = tmp_path / "bad.safetensors"
    for at in range(len(good)):
        spoiled = bytearray(good)
        spoiled[at] ^= 1 << at % 8
        bad.write_bytes(spoiled)
        with pytest.raises(WeightsError, match="bad.safetensors: "):
            read_weights(bad)


def test_turned_bits_in_the_tensors_are_caught_by_the_digest(tmp_path):
    good = save_weights(tmp_path / "good", small_state(), {"x": 1}).read_bytes()
    bad = tmp_path / "bad"
    for at in range(len(good) - 26, len(good)):  # 6 floats and 2 bools
        spoiled = bytearray(good)
        spoiled[at] ^= 1
        bad.write_bytes(spoiled)
        with pytest.raises(WeightsError, match="bad: the digest of its content is .* bytes have changed"):
            read_weights(bad)


@pytest.mark.parametrize("field, value, message", [
    ("format", "mlvgm_mi weights 999", "format is 'mlvgm_mi weights 999', expected"),
    ("config", '{"x": 2}', "the digest of its content"),
    ("digest", "0" * 64, "it promises 000000000000"),
])
def test_changed_metadata_is_refused(tmp_path, field, value, message):
    path = save_weights(tmp_path / "w", small_state(), {"x": 1})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(small_state(), path, metadata=metadata)
    assert read_weights(path)[1] == {"x": 1}  # the file itself is fine
    save_file(small_state(), path, metadata=metadata | {field: value})
    with pytest.raises(WeightsError, match=message):
        read_weights(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": FORMAT}])
def test_a_foreign_safetensors_file_is_refused(tmp_path, metadata):
    save_file(small_state(), tmp_path / "w", metadata=metadata)
    with pytest.raises(WeightsError, match="w: .*(format|digest)"):
        read_weights(tmp_path / "w")


def test_what_is_no_file_of_weights_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="gone: there is no such file"):
        read_weights(tmp_path / "gone")
    with pytest.raises(WeightsError, match=tmp_path.name):
        read_weights(tmp_path)
    for content in (b"", b"hello", pickle.dumps({"a": 1}), b"\0" * 100):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(WeightsError, match="other: truncated, corrupt or no safetensors file"):
            read_weights(tmp_path / "other")


@pytest.mark.parametrize("config, error", [({"f": print}, TypeError), ({"x": float("nan")}, ValueError)])
def test_a_config_that_is_not_json_leaves_the_old_file(tmp_path, config, error):
    path = save_weights(tmp_path / "w", small_state(), {"x": 1})
    with pytest.raises(error):
        save_weights(path, small_state(), config)
    assert names(tmp_path) == ["w"] and read_weights(path)[1] == {"x": 1}


# into a module

def net(out=2):
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, out))


def test_load_into_fills_parameters_and_buffers():
    source, target = net(), net()
    source[1].running_mean.fill_(7)
    assert load_into(target, source.state_dict(), "here") is target
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))


def without(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize("change, message", [
    (lambda s: without(s, "2.bias"), "'2.bias' is missing"),
    (lambda s: without(s, "1.running_var"), "'1.running_var' is missing"),
    (lambda s: s | {"3.weight": torch.zeros(1)}, "'3.weight' is not in the module"),
    (lambda s: s | {"0.weight": torch.zeros(4, 5)}, r"'0.weight' has shape \(4, 5\), the module expects \(4, 3\)"),
    (lambda s: {}, "and 4 more; build the module from the configuration"),
])
def test_load_into_names_the_key_and_touches_nothing(change, message):
    target = net()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    wrong = change({name: tensor + 1 for name, tensor in before.items()})
    with pytest.raises(WeightsError, match=f"file.safetensors: does not fit Sequential: .*{message}"):
        load_into(target, wrong, "file.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


# training states

def test_a_resumed_optimizer_takes_the_same_steps(tmp_path):
    def steps(module, optimizer, first, last):
        for step in range(first, last):
            x = torch.randn(8, 3, generator=rng_for(0, "batch", step=step))
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()

    straight = net()
    start = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    steps(straight, torch.optim.AdamW(straight.parameters()), 0, 6)

    broken_off = load_into(net(), start, "start")
    optimizer = torch.optim.AdamW(broken_off.parameters())
    steps(broken_off, optimizer, 0, 3)
    state = {"net": broken_off.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    path = save_state(tmp_path / "s.pt", state)

    back, resumed = read_state(path), net()
    load_into(resumed, back["net"], path)
    optimizer = torch.optim.AdamW(resumed.parameters())
    optimizer.load_state_dict(back["optimizer"])
    steps(resumed, optimizer, back["step"], 6)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))


def test_a_random_generator_goes_on_where_it_was(tmp_path):
    rng = rng_for(0, "go on")
    torch.randn(5, generator=rng)
    path = save_state(tmp_path / "s", {"rng": rng.get_state()})
    expected = torch.randn(5, generator=rng)
    rng.set_state(read_state(path)["rng"])
    assert torch.equal(torch.randn(5, generator=rng), expected)


def spoil(content, kind):
    for at in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        yield {"cut": content[:at], "flipped": bytes(flipped), "longer": content + bytes(at + 1)}[kind]


@pytest.mark.parametrize("kind", ["cut", "flipped", "longer"])
def test_a_spoiled_state_is_refused(tmp_path, kind):
    good = save_state(tmp_path / "good", small_state()).read_bytes()
    for content in spoil(good, kind):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(WeightsError, match="bad: (truncated|its bytes have changed).* go back to an earlier state"):
            read_state(tmp_path / "bad")


def test_states_of_others_are_refused(tmp_path):
    torch.save(small_state(), tmp_path / "plain.pt")
    cases = {"plain.pt": "not written by save_state", "gone": "No such file", "": "Is a directory"}
    for path, message in cases.items():
        with pytest.raises(WeightsError, match=message):
            read_state(tmp_path / path)


class Hostile:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_a_state_that_would_run_code_is_refused_on_both_sides(tmp_path, capsys):
    path = save_state(tmp_path / "s.pt", {"step": 1})
    with pytest.raises(WeightsError, match="s.pt: not plain .*Unsupported global"):
        save_state(path, {"step": 2, "x": Hostile()})
    assert names(tmp_path) == ["s.pt"] and read_state(path) == {"step": 1}

    torch.save({"x": Hostile()}, path)
    sealed = path.read_bytes() + b"mlvgm_mi sha256=" + file_digest(path).encode()
    path.write_bytes(sealed)
    with pytest.raises(WeightsError, match="s.pt: not plain"):
        read_state(path)
    assert capsys.readouterr().out == ""


def test_torch_reads_past_the_seal(tmp_path):
    path = save_state(tmp_path / "s.pt", small_state())
    assert torch.equal(torch.load(path, weights_only=True)["a"], small_state()["a"])


def test_the_config_is_readable_by_safetensors_alone(tmp_path):
    path = save_weights(tmp_path / "w", small_state(), {"x": [1, 2]})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == {"x": [1, 2]} and metadata["format"] == FORMAT
