"Cells: keys, copies, and files that are whole or not there."

import pandas as pd
import pytest

from mlvgm_mi.cells import cell, digest, weights_digest, write_frame
from mlvgm_mi.generators.core import load_generator


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
