"The page with a slider: its pictures are the generator's, its numbers those that were measured, and it needs nothing else."
import base64
import io
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mlvgm_mi.cli import app
from mlvgm_mi.explore import at_strengths, explorer
from mlvgm_mi.generators.core import LinearGaussian, load_generator
from mlvgm_mi.impact import ALL_GROUPS, ImpactConfig, impact, nats_left
from mlvgm_mi.latents import rng_for

LINE = LinearGaussian.random([1.0, 0.5, 0.2], pixels=6, width=2)
SMALL = ImpactConfig(strengths=(0.5, 1.0), joint=(0.25, 1.0), candidates=64, blocks=1, pool=128, steps=5, components=6)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def pixels(address):
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def squares(rows=("a", "b"), strengths=3, anchors=2, channels=1, side=4):
    rng = rng_for(0, "squares")
    return {row: torch.rand(strengths, anchors, channels, side, side, generator=rng) for row in rows}


def test_every_row_is_the_generator_on_an_arc_of_one_group():
    strengths = [0.0, 0.3, 1.0]
    found = at_strengths(LINE, strengths, anchors=4, seed=7)
    z = LINE.sample(4, rng_for(7, "anchor"))
    fresh = [torch.randn(4, 2, generator=rng_for(7, f"step/{name}")) for name in LINE.layout.group_names]
    arc = [[math.sqrt(1 - s * s) * a + s * e for a, e in zip(z, fresh)] for s in strengths]
    for k, name in enumerate(LINE.layout.group_names):
        for i in range(3):
            expected = LINE.decode(tuple(arc[i][j] if j == k else z[j] for j in range(3)))
            torch.testing.assert_close(found[name][i], expected)
    for i in range(3):
        torch.testing.assert_close(found[ALL_GROUPS][i], LINE.decode(tuple(arc[i])))
    assert list(found) == [*LINE.layout.group_names, ALL_GROUPS]


def test_another_seed_gives_other_anchors_and_other_arcs():
    one, other = (at_strengths(LINE, [0.0, 1.0], anchors=2, seed=seed)["z0"] for seed in (0, 1))
    assert not torch.allclose(one[0], other[0]) and not torch.allclose(one[1] - one[0], other[1] - other[0])


@pytest.mark.parametrize("given, message", [
    (dict(strengths=[1.5]), "strength=1.5"), (dict(strengths=[0.5], anchors=0), "anchors=0")])
def test_strengths_and_anchors_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        at_strengths(LINE, **given)


def test_nats_are_those_of_the_frame():
    frame = impact(LINE, SMALL, seed=0, name="line")
    left, read = nats_left(frame), frame[frame.estimator == "infonce"].set_index(["group", "strength"]).mi_nats
    assert list(left) == ["z0", "z1", "z2", ALL_GROUPS] and list(left["z1"]) == [0.0, 0.5, 1.0]
    assert left["z1"][0.5] == read["z1", 0.5] and left[ALL_GROUPS][0.25] == read[ALL_GROUPS, 0.25]
    assert left[ALL_GROUPS][0.0] == left["z0"][0.0] and list(left[ALL_GROUPS]) == [0.0, 0.25, 1.0]
    with pytest.raises(ValueError, match="curves do not mix"):
        nats_left(pd.concat([frame, frame.assign(generator="other")]))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_holds_every_image(channels):
    images, strengths = squares(channels=channels), [0.0, 0.5, 1.0]
    data = data_of(explorer(images, strengths, {"a": {0.0: 2.0, 1.0: 0.25}}))
    assert data["strengths"] == strengths and data["most"] == 2.0
    assert [row["nats"] for row in data["rows"]] == [[2.0, None, 0.25], [None] * 3]
    for row in data["rows"]:
        for k, address in enumerate(row["images"]):
            strip = pixels(address)
            for n in range(2):
                tile = strip[2:6, 2 + 6 * n : 6 + 6 * n].reshape(4, 4, -1)
                expected = (255 * images[row["name"]][k, n]).round().permute(1, 2, 0).expand(4, 4, 3).numpy()
                assert np.abs(tile.astype(int) - expected).max() == 0


def test_large_images_are_shown_small():
    (row,) = data_of(explorer(squares(["a"], 1, 2, 3, 512), [0.0]))["rows"]
    assert pixels(row["images"][0]).shape == (132, 262, 3)


def test_the_page_needs_nothing_but_itself_and_runs_no_name():
    page = explorer(squares(["</script><script>alert(1)</script>"]), [0.0, 0.5, 1.0], title="<b>mine & yours</b>")
    assert "http" not in page and "alert(1)</script>" not in page and "<b>" not in page
    assert data_of(page)["rows"][0]["name"] == "</script><script>alert(1)</script>"
    assert "in nats" not in page  # no legend of bars that are not there


@pytest.mark.parametrize("change, message", [
    (lambda x: x[:2], "for 2 strengths, expected 3"), (lambda x: x[:, 0], "expected .S, N, C, H, W."),
    (lambda x: x * 2, "expected .0, 1."),
    (lambda x: x - 0.5, "rescale or clamp"), (lambda x: x.expand(-1, -1, 2, -1, -1), "C = 1 or 3"),
    (lambda x: x / 0, "expected .0, 1.")])
def test_images_that_cannot_be_shown_are_named(change, message):
    with pytest.raises(ValueError, match=f"row 'a' .*{message}"):
        explorer({"a": change(squares()["a"])}, [0.0, 0.5, 1.0])


# ---- the command


def run(*words):
    return CliRunner().invoke(app, ["explore", *map(str, words)], catch_exceptions=False)


def test_the_command_writes_a_page(tmp_path):
    measured = {**dict.fromkeys(["z0", "z1", "z2", "z3"], (0.0, 0.4, 1.0)), ALL_GROUPS: (0.5,)}
    frame = pd.DataFrame([
        dict(generator=generator, group=group, step="vp", strength=s, mi_nats=3 - s, estimator="infonce", sigma_x=1.0)
        for generator in ("fashion-bigbigan", "other") for group, strengths in measured.items() for s in strengths])
    frame.to_csv(tmp_path / "impact.csv")
    result = run("fashion-bigbigan", "--curves", tmp_path / "impact.csv", "--out", tmp_path / "page.html", "--anchors", 2)
    assert result.exit_code == 0 and result.output.startswith("written: ")
    data = data_of((tmp_path / "page.html").read_text())
    assert data["strengths"] == [0.0, 0.4, 1.0] and [row["name"] for row in data["rows"]] == ["z0", "z1", "z2", "z3", ALL_GROUPS]
    assert data["rows"][0]["nats"] == [3.0, 2.6, 2.0] and data["rows"][-1]["nats"] == [3.0, None, None]
    images = at_strengths(load_generator("fashion-bigbigan"), data["strengths"], anchors=2)
    assert data == data_of(explorer(images, data["strengths"], nats_left(frame[frame.generator == "other"]), ""))


def test_the_command_without_curves(tmp_path):
    run("fashion-stylegan2", "--out", tmp_path / "page.html", "--anchors", 1, "--ticks", 3)
    data = data_of((tmp_path / "page.html").read_text())
    assert data["strengths"] == [0.0, 0.5, 1.0] and data["rows"][0]["nats"] == [None] * 3


@pytest.mark.parametrize("words, message", [
    (["linear-gaussian"], "rescale or clamp"), (["fashion-nvae", "--ticks", 1], "--ticks 1"),
    (["fashion-nvae", "--anchors", 0], "anchors=0"),
    (["fashion-nvae", "--curves", "some.csv"], "has curves of a, b, none of fashion-nvae"),
    (["fashion-nvae", "--curves", "strange.csv"], "has no columns generator and mi_nats")])
def test_mistakes_leave_no_page(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"generator": ["a", "b"], "mi_nats": 0.0}).to_csv("some.csv")
    pd.DataFrame({"x": [0.0]}).to_csv("strange.csv")
    with pytest.raises(ValueError, match=message):
        run(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.csv", "strange.csv"]
