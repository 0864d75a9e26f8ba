"Pictures pixel by pixel, bands and intervals number by number, files byte by byte."
import os
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mlvgm_mi import plot
from mlvgm_mi.latents import rng_for
from mlvgm_mi.plot import (
    IMPACT_COLUMNS, accuracy_bars, accuracy_grid, house_style, image_grid, impact_curves, save_figure, view_grid,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def noise(*shape):
    return torch.rand(*shape, generator=rng_for(0, "plot"))


def canvas(ax):
    return torch.from_numpy(np.asarray(ax.images[0].get_array())).permute(2, 0, 1)


# style

def test_the_style_is_put_back_even_after_an_error():
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError), house_style():
        assert dict(mpl.rcParams) != before
        raise RuntimeError
    assert dict(mpl.rcParams) == before


def test_a_setting_of_somebody_else_survives_the_style(monkeypatch):
    monkeypatch.setitem(mpl.rcParams, "interactive", False)
    with house_style():
        plt.ion()  # as a notebook does when its first figure is made
    assert plt.isinteractive()


# image grids

@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("columns, expected", [(None, 3), (2, 2), (5, 5), (99, 5)])
def test_every_image_is_where_it_should_be(channels, columns, expected):
    images = noise(5, channels, 8, 6)
    shown = canvas(image_grid(images, columns=columns))
    for i, image in enumerate(images):
        y, x = 2 + i // expected * 10, 2 + i % expected * 8
        torch.testing.assert_close(shown[:, y : y + 8, x : x + 6], image.expand(3, 8, 6))
    assert shown.shape == (3, 2 + -(-5 // expected) * 10, 2 + expected * 8)


def test_one_image_has_its_gap_or_not_but_is_whole():
    image = noise(1, 1, 8, 8)
    shown = canvas(image_grid(image))
    assert any(torch.equal(shown[0, y : y + 8, x : x + 8], image[0, 0]) for y in (0, 2) for x in (0, 2))


def test_titles_stand_over_their_images():
    ax = image_grid(noise(4, 1, 10, 10), columns=2, titles=list("abcd"))
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert places["a"][0] == places["c"][0] < places["b"][0] == places["d"][0]
    assert places["a"][1] == places["b"][1] < places["c"][1] == places["d"][1]
    assert places["a"][0] == 2 - 0.5 + 5


def test_axes_that_are_given_are_drawn_on():
    fig, ax = plt.subplots()
    assert image_grid(noise(1, 1, 4, 4), ax=ax) is ax and len(plt.get_fignums()) == 1


def test_tensors_of_a_network_can_be_shown_as_they_are():
    images = noise(2, 1, 4, 4).to(torch.bfloat16).requires_grad_()
    assert canvas(image_grid(images)).max() <= 1
    assert canvas(image_grid(torch.tensor([-1e-6, 1 + 1e-6]).view(2, 1, 1, 1).expand(2, 1, 4, 4))).max() == 1


@pytest.mark.parametrize("images, message", [
    (noise(2, 1, 4, 4) * 2 - 1, r"images spans \[-0.\d+, .*\], expected \[0, 1\]; rescale"),
    (noise(2, 1, 4, 4) * 255, "images spans .*, expected"),
    (torch.full((1, 1, 2, 2), float("nan")), r"images spans \[nan, nan\]"),
    ((noise(2, 1, 4, 4) * 255).byte(), "images has dtype torch.uint8, expected floats .* divide bytes by 255"),
    (noise(4, 4), r"images has shape \(4, 4\), expected \(N, C, H, W\)"),
    (noise(2, 4, 4, 1), r"images has shape \(2, 4, 4, 1\).* C = 1 or 3"),
    (noise(0, 1, 4, 4), "not empty"),
])
def test_what_is_no_batch_of_images_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images)


def test_missing_titles_are_refused():
    with pytest.raises(ValueError, match="titles has 1 entries, expected 2"):
        image_grid(noise(2, 1, 4, 4), titles=["a"])
    views = noise(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="row_titles has 3 entries, expected 2"):
        view_grid(views, row_titles="abc")
    with pytest.raises(ValueError, match="column_titles has 2 entries, expected 3"):
        view_grid(views, column_titles="ab")
    with pytest.raises(ValueError, match=r"views has shape \(3, 1, 4, 4\), expected \(B, V, C, H, W\)"):
        view_grid(views[0])


def test_views_of_an_anchor_share_a_row():
    views = noise(2, 3, 1, 5, 5)
    fig = view_grid(views, ["r0", "r1"], ["c0", "c1", "c2"])
    ax = fig.axes[0]
    for row in range(2):
        for column in range(3):
            y, x = 2 + 7 * row, 2 + 7 * column
            assert torch.equal(canvas(ax)[0, y : y + 5, x : x + 5], views[row, column, 0])
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert [places[f"c{v}"][0] for v in range(3)] == [4, 11, 18] and [places[f"r{b}"][1] for b in range(2)] == [4, 11]


# impact curves

def impact(**change):
    row = dict(generator="g", group="late", step="vp", strength=0.0, mi_nats=3.0, se=0.1, ceiling=5.0, n=148,
               estimator="infonce", sigma_x=0.1, seed=0)
    assert tuple(row) == IMPACT_COLUMNS
    rows = [row | change | {"group": group, "strength": s, "mi_nats": 3 - s * slope}
            for group, slope in {"late": 1, "early": 2, "mid": 1.5}.items() for s in (1.0, 0.0, 0.5)]
    return pd.DataFrame(rows)


def curve(ax, label):
    return next(line for line in ax.lines if line.get_label() == label).get_xydata()


def band(ax, index):
    "(strength, low, high) rows of the band drawn as number `index`."
    points = ax.collections[index].get_paths()[0].vertices
    columns = {x: points[points[:, 0] == x, 1] for x in np.unique(points[:, 0])}
    return {x: (column.min(), column.max()) for x, column in columns.items()}


def test_curves_run_along_strength_in_the_order_of_the_layout():
    ax = impact_curves(impact())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["late", "early", "mid"]
    assert curve(ax, "early").tolist() == [[0, 3], [0.5, 2], [1, 1]]
    assert ax.get_xlabel() == "strength" and "nats" in ax.get_ylabel()


def test_the_band_is_1_96_standard_errors():
    low, high = band(impact_curves(impact()), 0)[0.5]
    assert low == pytest.approx(2.5 - 0.196) and high == pytest.approx(2.5 + 0.196)


def test_seeds_are_averaged_and_their_spread_widens_the_band():
    frame = impact()
    both = pd.concat([frame, frame.assign(seed=1, mi_nats=frame["mi_nats"] + 0.4)])
    ax = impact_curves(both)
    assert curve(ax, "late")[:, 1].tolist() == pytest.approx([3.2, 2.7, 2.2])
    low, high = band(ax, 0)[0.0]
    se = np.sqrt((0.1**2 + 0.08) / 2)  # variance of 3.0 and 3.4 is 0.08
    assert high - low == pytest.approx(2 * 1.96 * se)


def test_the_ceiling_is_dashed_and_labelled_unless_there_is_none():
    ax = impact_curves(impact())
    (line,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert set(line.get_ydata()) == {5.0} and ax.get_ylim()[1] > 5
    assert [text.get_text() for text in ax.texts] == ["ceiling log 148 = 5.00"]
    ax = impact_curves(impact(ceiling=np.inf))
    assert not ax.texts and all(line.get_linestyle() == "-" for line in ax.lines)


def test_generators_and_steps_get_panels():
    frame = pd.concat([impact(), impact(step="additive"), impact(generator="h")])
    ax = impact_curves(frame)
    assert [panel.get_title() for panel in ax.figure.axes] == ["g, vp", "g, additive", "h, vp"]
    assert ax is ax.figure.axes[0]
    with pytest.raises(ValueError, match="frame mixes generator = g, h; select one of them or leave ax out"):
        impact_curves(frame[frame["step"] == "vp"], ax=plt.subplots()[1])


@pytest.mark.parametrize("column, value", [("estimator", "nwj"), ("n", 9), ("sigma_x", 0.2), ("ceiling", 6.0)])
def test_what_does_not_compare_is_not_averaged(column, value):
    with pytest.raises(ValueError, match=f"frame mixes {column} = .*, {value}; select one"):
        impact_curves(pd.concat([impact(), impact(**{column: value})]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_estimate_that_failed_is_not_left_out_in_silence(value):
    with pytest.raises(ValueError, match="frame has values of mi_nats that are not finite"):
        impact_curves(pd.concat([impact(), impact(seed=1).assign(mi_nats=value)]))


@pytest.mark.parametrize("column", IMPACT_COLUMNS)
def test_a_missing_column_is_named(column):
    with pytest.raises(ValueError, match=f"frame lacks the columns {column}; it has "):
        impact_curves(impact().drop(columns=column))


# accuracies

def scores(**rows):
    return pd.DataFrame([{"source": source, "t_x": "crop", "seed": seed, "accuracy": accuracy}
                         for source, row in rows.items() for seed, accuracy in enumerate(row)])


def interval(ax, row):
    "(low, mean, high) of a row of the plot."
    container = ax.containers[row]
    bars = container.lines[2]
    mean = container.lines[0].get_xdata()[0]
    if not bars:
        return mean, mean, mean
    segment = bars[0].get_segments()[0]
    return segment[0, 0], mean, segment[1, 0]


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_students(n):
    values = (0.8 + 0.1 * noise(n)).tolist()
    expected = stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=stats.sem(values))
    low, mean, high = interval(accuracy_bars(scores(a=values), "source"), 0)
    assert [low, mean, high] == pytest.approx([100 * expected[0], 100 * np.mean(values), 100 * expected[1]])


def test_rows_keep_their_order_and_every_seed_is_a_point():
    ax = accuracy_bars(scores(zebra=[0.1, 0.2], ant=[0.5], mule=[0.3, 0.4, 0.5]), "source")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["zebra", "ant", "mule"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
    points = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "o"]
    assert points == [pytest.approx([10, 20]), pytest.approx([50]), pytest.approx([30, 40, 50])]
    assert "%" in ax.get_xlabel()


def test_a_single_seed_has_no_interval():
    assert interval(accuracy_bars(scores(a=[0.5]), "source"), 0) == (50, 50, 50)


def test_rows_may_be_named_by_several_columns():
    ax = accuracy_bars(pd.concat([scores(a=[0.5]), scores(a=[0.6]).assign(t_x="none")]), ["source", "t_x"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a · crop", "a · none"]


@pytest.mark.parametrize("frame, message", [
    (scores(a=[80.7]), r"accuracy spans \[80.7, 80.7\], expected fractions in \[0, 1\]; divide percent by 100"),
    (scores(a=[float("nan")]), "accuracy spans"),
    (scores(a=[0.5, float("nan"), 0.6]), "accuracy spans"),
    (pd.concat([scores(a=[0.5]), scores(a=[0.6])]), "frame has 2 rows that share source, seed; select one probe"),
    (scores(a=[0.5]).drop(columns="seed"), "frame lacks the columns seed"),
    (scores(a=[0.5]).iloc[:0], "frame has no rows"),
])
def test_what_cannot_be_shown_honestly_is_refused(frame, message):
    for draw in (lambda: accuracy_bars(frame, "source"), lambda: accuracy_grid(frame.assign(t_x="none"), "source", "t_x")):
        with pytest.raises(ValueError, match=message.replace("source, seed", "source, (t_x, )?seed")):
            draw()


def test_a_grid_has_means_and_half_intervals_in_their_places():
    frame = pd.concat([scores(zebra=[0.7, 0.8, 0.9], ant=[0.5]), scores(ant=[0.1, 0.1]).assign(t_x="none")])
    ax = accuracy_grid(frame, "source", "t_x")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["zebra", "ant"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["crop", "none"]
    assert {cell.get_position(): cell.get_text() for cell in ax.texts} == {
        (0.5, 0.5): "80.0 ± 24.8", (0.5, 1.5): "50.0", (1.5, 1.5): "10.0 ± 0.0"}


# files

DRAW = """
import sys
import pandas as pd
from mlvgm_mi.plot import accuracy_bars, save_figure
rows = [dict(source=f"s{i}", seed=j, accuracy=0.5 + i / 10 + j / 100) for i in range(3) for j in range(3)]
frame = pd.DataFrame(rows)
save_figure(accuracy_bars(frame, "source").figure, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path):
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "MPLBACKEND": "agg"}
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / seed / "figure")], env=environment, check=True)
    for suffix in ("png", "pdf"):
        one, two = ((tmp_path / seed / f"figure.{suffix}").read_bytes() for seed in ("1", "2"))
        assert one == two and len(one) > 1000


def test_files_are_named_whole_and_nothing_else_is_left(tmp_path):
    paths = save_figure(image_grid(noise(1, 1, 4, 4)).figure, tmp_path / "new" / "impact-v0.1")
    assert paths == [tmp_path / "new" / "impact-v0.1.png", tmp_path / "new" / "impact-v0.1.pdf"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["impact-v0.1.pdf", "impact-v0.1.png"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG" and paths[1].read_bytes()[:4] == b"%PDF"


def test_another_picture_gives_other_bytes(tmp_path):
    one = save_figure(image_grid(noise(1, 1, 4, 4)).figure, tmp_path / "one")
    two = save_figure(image_grid(1 - noise(1, 1, 4, 4)).figure, tmp_path / "two")
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(one, two))


@pytest.mark.parametrize("accident", ["savefig", "replace"])
def test_a_failed_save_leaves_the_old_figure(tmp_path, monkeypatch, accident):
    fig = image_grid(noise(1, 1, 4, 4)).figure
    old = [path.read_bytes() for path in save_figure(fig, tmp_path / "f")]

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(*((fig, "savefig", fail) if accident == "savefig" else (plot.os, "replace", fail)))
    with pytest.raises(OSError, match="No space"):
        save_figure(fig, tmp_path / "f")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.pdf", "f.png"]
    assert [(tmp_path / f"f.{suffix}").read_bytes() for suffix in ("png", "pdf")] == old
