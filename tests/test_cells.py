"Cells: keys, copies, and files that are whole or not there."

from dataclasses import dataclass
from functools import partial

import pandas as pd
import pytest
import torch

from mlvgm_mi import cells
from mlvgm_mi.cells import cell, described, digest, weights_digest, write_frame
from mlvgm_mi.generators.core import load_generator
from mlvgm_mi.perturb import Additive, Perturb
from mlvgm_mi.views import AUGMENTATIONS


def test_cells_are_keyed_by_what_determines_them(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return pd.DataFrame({"value": [0.1 + 0.2], "n": [1]})

    first = cell(tmp_path / "c.csv", {"a": 1}, compute)
    content = (tmp_path / "c.csv").read_bytes()
    pd.testing.assert_frame_equal(cell(tmp_path / "c.csv", {"a": 1}, compute), first)
    assert len(calls) == 1 and (tmp_path / "c.csv").read_bytes() == content
    cell(tmp_path / "new" / "c.csv", {"a": 1}, compute, also_in=[tmp_path])
    assert len(calls) == 1 and (tmp_path / "new" / "c.csv").read_bytes() == content
    cell(tmp_path / "c.csv", {"a": 2}, compute)
    assert len(calls) == 2


@pytest.mark.parametrize("looks", [str.isdigit, lambda key: key.replace("e", "", 1).isdigit() and "e" in key[1:-1]])
def test_a_key_that_looks_like_a_number_is_found_again(tmp_path, looks):
    determines = next(number for number in range(100_000) if looks(digest(number)))
    made = cell(tmp_path / "one.csv", determines, lambda: pd.DataFrame({"value": [1.0]}))
    pd.testing.assert_frame_equal(cell(tmp_path / "one.csv", determines, lambda: pytest.fail("computed again")), made)


def test_a_failing_cell_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cell(tmp_path / "c.csv", {}, fail)
    assert not list(tmp_path.iterdir())


def test_digests_follow_the_weights():
    one, two = load_generator("fashion-stylegan2"), load_generator("fashion-stylegan2")
    assert weights_digest(one) == weights_digest(two)
    two.mapping.fc0.bias[0] += 1e-3
    assert weights_digest(one) != weights_digest(two)


def test_an_equal_frame_leaves_its_file_alone(tmp_path):
    path, frame = tmp_path / "folder" / "t.csv", pd.DataFrame({"a": [0.1 + 0.2]})
    write_frame(frame, path)
    before = path.stat().st_ino
    write_frame(frame, path)
    assert path.stat().st_ino == before
    write_frame(frame + 1, path)
    assert pd.read_csv(path).a.item() == 1 + 0.1 + 0.2
    assert [file.name for file in path.parent.iterdir()] == ["t.csv"]


@dataclass
class Setting:
    "An object with a public and a private attribute."
    value: object
    _cache: int = 0


class Speaking(Setting):
    "Says itself what counts."

    def identity(self):
        return "always the same"


def layer(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(2, 2)


def shifted(group, sigma):
    return Perturb(load_generator("fashion-stylegan2").layout, {group: Additive(sigma)})


@pytest.mark.parametrize(("one", "same", "other"), [
    (1, 1, 2), ("a", "a", "b"), (None, None, 0), (0.5, 0.5, 0.25), ([1, 2], (1, 2), [2, 1]),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2, "b": 1}),
    (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3, 2)), (torch.zeros(2), torch.zeros(2), torch.tensor([0.0, 1e-30])),
    (layer(0), layer(0), layer(1)), (len, len, max),
    (torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16(), torch.tensor([0.0, 1.0]).bfloat16()),
    (layer(0).bfloat16(), layer(0).bfloat16(), layer(1).bfloat16()), (torch.tensor(True), torch.tensor(True), torch.tensor(False)),
    (partial(round, ndigits=1), partial(round, ndigits=1), partial(round, ndigits=2)),
    (Setting(1), Setting(1, _cache=3), Setting(2)), (Setting(Setting(1)), Setting(Setting(1)), Setting(Setting(2))),
    (Speaking(1), Speaking(2), Setting(1)), (shifted("w0-1", 0.1), shifted("w0-1", 0.1), shifted("w0-1", 0.2)),
    (shifted("w0-1", 0.1), shifted("w0-1", 0.1), shifted("w2-3", 0.1)),
    (AUGMENTATIONS["simclr"], type(AUGMENTATIONS["simclr"])(*AUGMENTATIONS["simclr"].operations), AUGMENTATIONS["no_color"]),
])
def test_a_description_tells_values_apart(one, same, other):
    assert digest(described(one)) == digest(described(same)) != digest(described(other))


def test_of_large_tensors_a_part_is_read_that_reaches_the_end(monkeypatch):
    monkeypatch.setattr(cells, "WHOLE_BYTES", 100)
    one, other = torch.zeros(20_000), torch.zeros(20_000)
    other[15_000:] = 1
    assert described(one) != described(other)


def test_networks_differ_by_plain_attributes_of_their_parts_too():
    def built(slope, training=False, note=0):
        network = torch.nn.Sequential(torch.nn.LeakyReLU(slope)).train(training)
        network._note = note
        return digest(described(network))

    assert built(0.1) != built(0.2) and built(0.1) == built(0.1, training=True, note=1)
