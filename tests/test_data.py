"Image sets that say no, splits in proportion, ways to the data: order, damage, half-written caches, what was tried."
import gzip
import hashlib
import http.server
import os
import shutil
import socket
import struct
import threading
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.datasets import FashionMNIST

from mlvgm_mi import data
from mlvgm_mi.data import (
    DATA_VARIABLE, DATASETS, FASHION_MNIST_CLASSES, FASHION_MNIST_FILES, DataUnavailableError, DebianPackage, Download,
    ImageSet, NamedFolder, NotHere, PackedFile, RouteError, Splits, UsualFolder, cache_folder, fashion_mnist_routes,
    load_dataset, load_digits, load_fashion_mnist, obtain, read_idx, split_off, stratified_split,
)
from mlvgm_mi.latents import rng_for

CONTENTS = {"a.gz": b"first " * 100, "b.gz": b"second " * 100}
FILES = tuple(PackedFile(name, hashlib.sha256(content).hexdigest()) for name, content in CONTENTS.items())


def packed(content):
    "The same gzip bytes at any hour, so that every process that collects the tests gives them the same names."
    return gzip.compress(content, mtime=0)


def fill(folder, **instead):
    "Puts the two files into `folder`; `a=b'...'` replaces the packed bytes of a.gz."
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(instead.get(name[0], packed(content)))
    return folder


class Fake:
    "A route that counts how often it is asked, and does what it is told."

    def __init__(self, name, act):
        self.name, self.act, self.asked = name, act, 0

    def find(self, files, scratch):
        self.asked += 1
        return self.act(scratch)


def failing(name, reason, error=RouteError):
    def act(scratch):
        raise error(reason)
    return Fake(name, act)


# image sets

PIXELS, LABELS = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("images, labels, names, error, message", [
    (PIXELS.float(), LABELS, "ab", TypeError, "images has dtype torch.float32, expected torch.uint8; scale"),
    (PIXELS[:, 0], LABELS, "ab", ValueError, r"images has shape \(4, 8, 8\), expected \(N, C, H, W\)"),
    (PIXELS.permute(0, 2, 3, 1), LABELS, "ab", ValueError, "images has 8 channels at axis 1, expected 1 or 3"),
    (PIXELS, LABELS.int(), "ab", TypeError, "labels has dtype torch.int32, expected torch.int64"),
    (PIXELS, LABELS[:3], "ab", ValueError, r"labels has shape \(3,\), expected \(4,\)"),
    (PIXELS, LABELS[:, None], "ab", ValueError, r"labels has shape \(4, 1\), expected \(4,\)"),
    (PIXELS, LABELS + 1, "ab", ValueError, r"labels span 1..2, but 2 class names allow 0..1"),
    (PIXELS, LABELS - 1, "ab", ValueError, r"labels span -1..0"),
])
def test_what_is_no_image_set_is_refused(images, labels, names, error, message):
    with pytest.raises(error, match=message):
        ImageSet(images, labels, tuple(names))


def test_an_empty_image_set_is_one():
    empty = ImageSet(PIXELS[:0], LABELS[:0], ("a",))
    assert len(empty) == 0 and empty.floats().shape == (0, 1, 8, 8)


def test_floats_and_subsets():
    images = torch.arange(4 * 3 * 4, dtype=torch.uint8).view(4, 3, 2, 2) * 5
    full = ImageSet(images, LABELS, ("a", "b"))
    assert full.image_shape == (3, 2, 2) and full.floats().dtype == torch.float32
    torch.testing.assert_close(full.floats() * 255, images.float())
    assert ImageSet(torch.full_like(images, 255), LABELS, ("a", "b")).floats().unique().tolist() == [1.0]
    for index in ([2, 0], torch.tensor([2, 0]), slice(1, 3), LABELS == 1):
        part = full.subset(index)
        assert torch.equal(part.images, images[index]) and torch.equal(part.labels, LABELS[index])
        torch.testing.assert_close(full.floats(index), part.floats())


# splits

@pytest.mark.parametrize("counts", [[600] * 10, [70, 20, 10], [997, 2, 1], [5], [333, 333, 334]])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_every_class_gives_its_share(counts, share):
    labels = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=rng_for(0, "mix"))]
    n = max(1, round(share * len(labels)))
    held, rest = stratified_split(labels, n, rng_for(0, "split"))
    assert len(held) == n and torch.equal(torch.cat([held, rest]).sort().values, torch.arange(len(labels)))
    expected = torch.tensor(counts) * n / len(labels)
    assert (labels[held].bincount(minlength=len(counts)) - expected).abs().max() <= 1


def test_every_image_has_the_same_chance_to_be_held_out():
    labels = torch.tensor([0] * 12 + [1] * 8)
    times = torch.zeros(20)
    for seed in range(2000):
        times[stratified_split(labels, 5, rng_for(seed, "chance"))[0]] += 1
    assert (times / 2000 - 0.25).abs().max() < 0.05  # five standard errors of 0.0097


def test_splits_are_repeatable_and_differ_by_seed():
    labels = torch.arange(1000) % 10
    one, again, other = (stratified_split(labels, 100, rng_for(seed, "x"))[0] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("n", [-1, 0, 4, 5])
def test_a_split_needs_two_parts(n):
    with pytest.raises(ValueError, match=f"n={n} must lie between 1 and 3"):
        stratified_split(LABELS, n, rng_for(0, "x"))


@pytest.mark.parametrize("counts", [[600] * 10, [70, 20, 10], [333, 333, 334]])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_classes_of_many_images_are_split_off_alike(counts, share):
    labels = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    plain, careful = (split(labels, round(share * len(labels)), rng_for(0, "split")) for split in (stratified_split, split_off))
    assert all(map(torch.equal, plain, careful))


@pytest.mark.parametrize(("counts", "n"), [([22, 1, 27], 10), ([1, 1, 1, 9], 6), ([5, 2], 6), ([1] * 9 + [20], 25)])
@pytest.mark.parametrize("seed", range(3))
def test_no_class_loses_its_last_image(counts, n, seed):
    labels = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=rng_for(seed, "mix"))]
    taken = stratified_split(labels, n, rng_for(seed, "split"))[0]
    held, rest = split_off(labels, n, rng_for(seed, "split"))
    assert labels[rest].unique().tolist() == list(range(len(counts)))
    back = sorted(set(taken.tolist()) - set(held.tolist()))
    assert set(held.tolist()) <= set(taken.tolist()) and held.tolist() == sorted(held.tolist())
    assert labels[back].unique().numel() == len(back)  # no more than one of each class
    assert torch.equal(torch.cat([held, rest]).sort().values, torch.arange(len(labels)))
    assert rest.tolist() == sorted(rest.tolist())


def test_single_images_cannot_be_split_off():
    with pytest.raises(ValueError, match=r"n=2 of 4 images leaves nothing .*\(classes \d, \d\).*at least 2 images"):
        split_off(torch.arange(4), 2, rng_for(0, "x"))


@pytest.fixture
def three_parts():
    "Splits whose images say where they come from."
    whole = ImageSet(torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1), torch.arange(12) % 2, ("a", "b"))
    return Splits(*(whole.subset(slice(start, start + 4)) for start in (0, 4, 8)))


def pixels(part):
    return part.images.flatten().tolist()


def test_settings_are_chosen_without_the_test_images(three_parts):
    tuning = three_parts.for_tuning()
    assert [pixels(part) for part in (tuning.train, tuning.val, tuning.test)] == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    assert pixels(three_parts.test) == [8, 9, 10, 11]


@pytest.mark.parametrize(("count", "left"), [(2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (50, [0, 1, 2, 3])])
def test_few_labels_are_the_first_of_training_if_those_show_every_class(three_parts, count, left):
    few = three_parts.labelled(count)
    assert pixels(few.train) == left and few.train.labels.tolist() == [pixel % 2 for pixel in left]
    assert (few.val, few.test) == (three_parts.val, three_parts.test)


@pytest.mark.parametrize("count", [30, 50, 79])
def test_few_labels_of_a_set_that_is_stored_class_by_class_are_of_all_classes(three_parts, count):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    whole = ImageSet(torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1), labels, ("a", "b", "c"))
    few, again = (Splits(whole, three_parts.val, three_parts.test).labelled(count).train for _ in range(2))
    assert len(few) == count and pixels(few) == sorted(set(pixels(few))) and pixels(few) == pixels(again)
    assert few.labels.tolist() == labels[pixels(few)].tolist()
    assert (few.labels.bincount(minlength=3) - count * torch.tensor([0.5, 0.3, 0.2])).abs().max() <= 1


def test_the_labels_of_the_experiments_are_still_the_first():
    digits = load_digits()
    assert torch.equal(digits.labelled(1000).train.images, digits.train.images[:1000])


@pytest.mark.parametrize("count", [0, -1])
def test_no_labels_at_all_are_refused(three_parts, count):
    with pytest.raises(ValueError, match=f"count={count} must be positive"):
        three_parts.labelled(count)


# files

@pytest.mark.parametrize("spoiled, message", [
    (b"", "b.gz has the wrong content"),  # an empty stream is valid gzip
    (b"<html>log in first</html>", "b.gz cannot be unpacked"),
    (packed(CONTENTS["b.gz"])[:-9], "b.gz cannot be unpacked"),
    (packed(CONTENTS["b.gz"])[:-1] + b"\xff", "b.gz cannot be unpacked"),
    (packed(CONTENTS["b.gz"] + b"!"), "b.gz has the wrong content .sha256 .* expected"),
], ids=["empty", "a web page", "cut short", "wrong length", "other content"])
def test_a_damaged_file_is_refused(tmp_path, spoiled, message):
    fill(tmp_path, b=spoiled)
    with pytest.raises(RouteError, match=message):
        FILES[1].unpack(tmp_path)


def test_every_turned_bit_of_a_packed_file_is_refused_or_harmless(tmp_path):
    good = packed(CONTENTS["a.gz"])
    for at in range(len(good)):
        spoiled = bytearray(good)
        spoiled[at] ^= 1 << at % 8
        (tmp_path / "a.gz").write_bytes(spoiled)
        try:
            assert FILES[0].unpack(tmp_path) == CONTENTS["a.gz"]  # date and system in gzip's header do not matter
        except RouteError:
            pass


def test_other_wrappings_of_the_same_content_are_accepted(tmp_path):
    fill(tmp_path, a=gzip.compress(CONTENTS["a.gz"], compresslevel=1, mtime=1))
    assert FILES[0].unpack(tmp_path) == CONTENTS["a.gz"]


# routes in order

def test_the_first_route_that_works_wins_and_later_ones_are_not_asked(tmp_path):
    good, other = fill(tmp_path / "good"), fill(tmp_path / "other")
    routes = [failing("one", "nothing", NotHere), Fake("two", lambda s: good), Fake("three", lambda s: other)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was wrong with the first: no warning
        assert obtain("Toys", FILES, routes, tmp_path / "cache") == CONTENTS
    assert [route.asked for route in routes] == [1, 1, 0]
    assert not (tmp_path / "cache").exists()  # it lies in a folder already


@pytest.mark.parametrize("bad", [
    {"a": b"half", "b": b""},  # both broken
    {"b": packed(CONTENTS["b.gz"])[:10]},  # writing stopped in the second
    {"a": packed(b"another data set")},
])
def test_a_damaged_cache_is_never_used_and_gets_replaced(tmp_path, bad):
    cache = fill(tmp_path / "cache", **bad)
    routes = [UsualFolder("the cache", cache), Fake("the net", fill)]
    with pytest.warns(UserWarning, match="Toys: the cache: .*gz .*; took it from the net instead"):
        assert obtain("Toys", FILES, routes, cache) == CONTENTS
    assert obtain("Toys", FILES, routes, cache) == CONTENTS and routes[1].asked == 1
    assert sorted(path.name for path in cache.iterdir()) == ["a.gz", "b.gz"]


def test_a_half_filled_cache_is_never_used(tmp_path):
    cache = fill(tmp_path / "cache")
    (cache / "b.gz").unlink()
    routes = [UsualFolder("the cache", cache), Fake("the net", fill)]
    with pytest.warns(UserWarning, match="b.gz is not there"):
        assert obtain("Toys", FILES, routes, cache) == CONTENTS
    assert (cache / "b.gz").exists()


def test_what_was_fetched_damaged_is_not_kept(tmp_path):
    routes = [Fake("the net", lambda scratch: fill(scratch, b=b"<html>")), failing("apt", "no apt")]
    with pytest.raises(DataUnavailableError):
        obtain("Toys", FILES, routes, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_keeping_is_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def power_cut(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:7])
        raise OSError("No space left on device")

    monkeypatch.setattr(data.shutil, "copyfile", power_cut)
    with pytest.warns(UserWarning, match="files cannot be kept .No space left"):
        assert obtain("Toys", FILES, [Fake("the net", fill)], cache) == CONTENTS
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_not_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="files cannot be kept"):
        assert obtain("Toys", FILES, [Fake("the net", fill)], tmp_path / "file" / "cache") == CONTENTS


def test_the_error_lists_every_route_with_its_reason_and_the_advice(tmp_path):
    routes = [
        NamedFolder("the folder argument", None), NamedFolder("the variable", tmp_path / "typo"),
        UsualFolder("the cache", tmp_path / "gone"), Fake("the mirror", lambda scratch: fill(scratch, a=b"<html>")),
        failing("apt", "apt-get is not on this machine"),
    ]
    with pytest.raises(DataUnavailableError) as caught:
        obtain("Toys", FILES, routes, tmp_path / "cache", "What to do: pack your own.")
    title, *lines, advice = str(caught.value).splitlines()
    assert title == "Toys: no way to the data worked:" and advice == "What to do: pack your own."
    for line, route, reason in zip(lines, routes, ["not given", "typo/a.gz is not there", "gone does not exist",
                                                   "a.gz cannot be unpacked", "not on this machine"], strict=True):
        assert line.startswith(f"  {route.name}: ") and reason in line


def test_an_error_of_the_program_is_not_swallowed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        obtain("Toys", FILES, [Fake("broken", lambda scratch: 1 / 0), Fake("fine", fill)], tmp_path)


def test_a_named_folder_may_be_the_root_of_several_data_sets(tmp_path):
    fill(tmp_path / "FashionMNIST" / "raw")
    route = NamedFolder("root", tmp_path, ("fashion-mnist", "FashionMNIST/raw"))
    assert route.find(FILES, tmp_path) == tmp_path / "FashionMNIST" / "raw"
    fill(tmp_path)
    assert route.find(FILES, tmp_path) == tmp_path


# a download

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{listener.server_port}/"
        listener.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_download_is_checked_and_kept(tmp_path, server):
    folder, url = server
    fill(folder)
    route = Download("the net", url)
    assert obtain("Toys", FILES, [route], tmp_path / "cache") == CONTENTS
    assert obtain("Toys", FILES, [UsualFolder("the cache", tmp_path / "cache")], tmp_path) == CONTENTS
    (folder / "b.gz").unlink()
    with pytest.raises(RouteError, match=f"{url}b.gz cannot be fetched .*404"):
        route.find(FILES, tmp_path)


def test_a_download_gives_up_on_servers_that_are_gone_or_silent(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(RouteError, match="a.gz cannot be fetched .*timed out"):
            Download("silent", f"http://127.0.0.1:{port}/", timeout=0.2).find(FILES, tmp_path)
    with pytest.raises(RouteError, match="a.gz cannot be fetched .*refused"):
        Download("gone", f"http://127.0.0.1:{port}/").find(FILES, tmp_path)


# Debian's package

APT = """#!/bin/sh
case "$*" in
  *update) echo "W: Failed to fetch the index" >&2 ;;
  *download*toys) test -n "$TOYS" || { echo "E: Unable to locate package toys" >&2; exit 100; }; cp "$TOYS" . ;;
esac
"""


@pytest.fixture
def apt(tmp_path, monkeypatch):
    "An apt-get that finds the package in $TOYS or not at all."
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text(APT)
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("TOYS", raising=False)
    return DebianPackage("Debian", "toys", "/usr/share/toys")


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is needed to pack the example")
def test_a_package_is_unpacked_without_installing_it(tmp_path, monkeypatch, apt):
    fill(tmp_path / "package" / "usr" / "share" / "toys")
    (tmp_path / "package" / "DEBIAN").mkdir(mode=0o755)
    (tmp_path / "package" / "DEBIAN" / "control").write_text(
        "Package: toys\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: toys\n")
    deb = tmp_path / "toys_1_all.deb"
    data.subprocess.run(["dpkg-deb", "--build", tmp_path / "package", deb], check=True, capture_output=True)
    monkeypatch.setenv("TOYS", str(deb))
    assert obtain("Toys", FILES, [apt], tmp_path / "cache") == CONTENTS
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["a.gz", "b.gz"]


def test_what_apt_says_is_reported(tmp_path, apt):
    with pytest.raises(RouteError, match="apt-get download toys failed .E: Unable to locate package toys.;"
                                         " the update before it said: W: Failed to fetch the index"):
        apt.find(FILES, tmp_path)


def test_a_machine_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RouteError, match="apt-get is not on this machine"):
        DebianPackage("Debian", "toys", "/usr").find(FILES, tmp_path)


def test_an_apt_that_hangs_is_given_up(tmp_path, apt):
    (tmp_path / "bin" / "apt-get").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(RouteError, match="apt-get update failed .*timed out"):
        DebianPackage("Debian", "toys", "/usr", patience=0.2).find(FILES, tmp_path)


# idx

@pytest.mark.parametrize("content, message", [
    (b"", "content starts with , expected 00 00 08"),
    (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "content starts with 00 00 0d 01"),
    (b"\0\0\x08\1\0\0\0\3\1\2", r"content has 2 values, its header promises \[3\]"),
    (b"\0\0\x08\1\0\0\0\3\1\2\3\4", r"content has 4 values, its header promises \[3\]"),
])
def test_what_is_no_idx_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_idx(content)


# Fashion-MNIST

def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.numpy().tobytes()


@pytest.fixture
def small_fashion(tmp_path, monkeypatch):
    "Fashion-MNIST's four files with 200 + 50 images of noise."
    rng = rng_for(0, "small fashion")
    folder, files = tmp_path / "small", []
    folder.mkdir()
    for file, n in zip(FASHION_MNIST_FILES, (200, 200, 50, 50)):
        images = torch.randint(256, (n, 28, 28), generator=rng, dtype=torch.uint8)
        content = idx(images if "images" in file.name else (torch.arange(n) % 10).byte())
        (folder / file.name).write_bytes(packed(content))
        files.append(PackedFile(file.name, hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(data, "FASHION_MNIST_FILES", tuple(files))
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    return folder


@pytest.mark.parametrize("below", [".", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("how", ["argument", "variable"])
def test_fashion_mnist_from_a_named_folder(tmp_path, monkeypatch, small_fashion, below, how):
    root = tmp_path / "root"
    shutil.copytree(small_fashion, root / below)
    if how == "variable":
        monkeypatch.setenv(DATA_VARIABLE, str(root))
    splits = load_fashion_mnist(root if how == "argument" else None, val=40)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [160, 40, 50]
    assert splits.val.labels.bincount().tolist() == [4] * 10


def test_fashion_mnist_by_name_takes_a_folder_and_no_size(small_fashion):
    assert len(load_dataset("fashion-mnist", folder=small_fashion, val=40).val) == 40
    with pytest.raises(ValueError, match="size=32 is not taken by fashion-mnist; it takes folder, val, seed"):
        load_dataset("fashion-mnist", folder=small_fashion, size=32)


def test_the_rim_is_black_and_the_middle_untouched(small_fashion):
    test = load_fashion_mnist(small_fashion, val=40).test
    raw = read_idx(gzip.decompress((small_fashion / FASHION_MNIST_FILES[2].name).read_bytes()))
    assert torch.equal(test.images[:, 0, 2:-2, 2:-2], raw) and test.images.sum() == raw.sum()
    assert test.images.shape == (50, 1, 32, 32) and test.images.dtype == torch.uint8


def test_validation_comes_out_of_training_and_depends_on_the_seed(small_fashion):
    def rows(*parts):
        return sorted(bytes(image.flatten().tolist()) for part in parts for image in part.images)

    one, two = (load_fashion_mnist(small_fashion, val=40, seed=seed) for seed in (0, 1))
    assert rows(one.train, one.val) == rows(two.train, two.val) and rows(one.val) != rows(two.val)
    assert torch.equal(one.test.images, two.test.images)


def test_the_order_of_the_ways_to_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "variable"))
    routes = fashion_mnist_routes(tmp_path / "argument")
    assert [type(route) for route in routes] == [NamedFolder] * 2 + [UsualFolder] * 2 + [Download, DebianPackage]
    assert [route.path for route in routes[:3]] == [
        tmp_path / "argument", tmp_path / "variable", cache_folder("fashion-mnist")]
    assert [Path(routes[3].path), Path(routes[5].folder)] == [Path("/usr/share/datasets/fashion-mnist")] * 2
    assert routes[4].url in FashionMNIST.mirrors
    monkeypatch.delenv(DATA_VARIABLE)
    for route in fashion_mnist_routes()[:2]:
        with pytest.raises(NotHere):
            route.find(FASHION_MNIST_FILES, tmp_path)


def test_when_fashion_mnist_cannot_be_had_the_user_learns_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fashion_mnist_routes", lambda folder: [NamedFolder("the folder argument", Path(folder))])
    with pytest.raises(DataUnavailableError) as caught:
        load_fashion_mnist(tmp_path)
    for words in ("train-images-idx3-ubyte.gz is not there", "MLVGM_MI_DATA", "folder=", "dataset-fashion-mnist"):
        assert words in str(caught.value)


def test_classes_and_files_are_those_of_torchvision():
    assert list(FASHION_MNIST_CLASSES) == FashionMNIST.classes
    assert {file.name for file in FASHION_MNIST_FILES} == {name for name, _ in FashionMNIST.resources}


@pytest.fixture(scope="module")
def fashion_folder(tmp_path_factory):
    "Fashion-MNIST's own files if this machine has them already."
    scratch = tmp_path_factory.mktemp("scratch")
    for route in fashion_mnist_routes()[1:4]:
        try:
            folder = route.find(FASHION_MNIST_FILES, scratch)
            for file in FASHION_MNIST_FILES:
                file.unpack(folder)
        except RouteError:
            continue
        return folder
    pytest.skip("Fashion-MNIST is not on this machine; load_fashion_mnist() fetches it")


STAMPS = {  # seconds since 1970 at which the publisher packed each file, as in the gzip header of the original
    "train-images-idx3-ubyte.gz": 1504176606, "train-labels-idx1-ubyte.gz": 1504176606,
    "t10k-images-idx3-ubyte.gz": 1504176627, "t10k-labels-idx1-ubyte.gz": 1504176627,
}


def original_wrapping(packed, name):
    "The gzip file with the name and date that the publisher's has and Debian's lacks; the compressed body stays."
    if packed[3] & 8:  # the name is there: not stripped
        return packed
    head = packed[:3] + b"\x08" + struct.pack("<I", STAMPS[name]) + packed[8:10]
    return head + name.removesuffix(".gz").encode() + b"\0" + packed[10:]


@pytest.mark.parametrize("name, md5", FashionMNIST.resources)
def test_our_digests_and_torchvisions_name_the_same_files(fashion_folder, name, md5):
    packed = original_wrapping((fashion_folder / name).read_bytes(), name)
    assert hashlib.md5(packed).hexdigest() == md5
    content = hashlib.sha256(gzip.decompress(packed)).hexdigest()
    assert content == {file.name: file.sha256 for file in FASHION_MNIST_FILES}[name]


@pytest.mark.slow
def test_torchvision_reads_the_same_images(fashion_folder, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in FASHION_MNIST_FILES:
        (raw / file.name.removesuffix(".gz")).write_bytes(file.unpack(fashion_folder))
    theirs = FashionMNIST(tmp_path, train=False)
    ours = load_fashion_mnist(fashion_folder).test
    assert torch.equal(ours.images[:, 0, 2:-2, 2:-2], theirs.data) and torch.equal(ours.labels, theirs.targets)


# digits

def test_digits_are_split_in_proportion_and_without_overlap():
    from sklearn.datasets import load_digits as sklearn_digits

    splits = load_digits()
    parts = (splits.train, splits.val, splits.test)
    assert [len(part) for part in parts] == [1097, 300, 400]
    counts = sum(part.labels.bincount() for part in parts)
    assert counts.tolist() == torch.from_numpy(sklearn_digits().target).bincount().tolist()
    for part in parts:
        assert (part.labels.bincount() - counts * len(part) / 1797).abs().max() < 2
        assert part.image_shape == (1, 32, 32) and part.images.max() == 255
    assert load_digits(val=100, test=100).train.images.shape[0] == 1597


def test_digits_shrunk_again_are_the_originals():
    from sklearn.datasets import load_digits as sklearn_digits

    splits, raw = load_digits(), sklearn_digits()
    small = torch.from_numpy(raw.images).float().flatten(1) / 16
    for part in (splits.train, splits.val, splits.test):
        shrunk = torch.nn.functional.avg_pool2d(part.floats(), 4).flatten(1)
        nearest = torch.cdist(shrunk, small).argmin(1)
        assert nearest.unique().numel() > 0.99 * len(part)
        assert (torch.from_numpy(raw.target)[nearest] == part.labels).all()


def test_digits_depend_on_the_seed_alone():
    one, again, other = load_digits(0), load_digits(0), load_digits(1)
    assert torch.equal(one.test.images, again.test.images) and not torch.equal(one.test.images, other.test.images)


# the registry

def test_load_dataset(monkeypatch):
    with pytest.raises(KeyError, match="name='mnist' is no known data set; choose one of .*digits.*, fashion-mnist"):
        load_dataset("mnist")
    monkeypatch.setitem(DATASETS, "mine", lambda size=1: size)
    assert load_dataset("mine", size=7) == 7


def test_an_unknown_name_says_where_more_are_registered():
    with pytest.raises(KeyError, match="'cifar10000' is no known .*import mlvgm_mi.datasets"):
        load_dataset("cifar10000")


@pytest.mark.parametrize(("options", "message"), [
    ({}, r"folder=\.\.\. is needed by mine"), ({"folder": None}, r"folder=\.\.\. is needed by mine"),
    ({"folder": "here", "colour": 3}, "colour=3 is not taken by mine; it takes folder, size"),
])
def test_arguments_that_do_not_fit_are_named(options, message, monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", partial(lambda name, folder, *, size=1: (name, folder, size), "mine"))
    with pytest.raises(ValueError, match=message):
        load_dataset("mine", **options)
    assert load_dataset("mine", folder="here") == ("mine", "here", 1)


@pytest.mark.parametrize("name", ["digits", "none"])
def test_a_folder_given_in_vain_is_named(name, monkeypatch):
    monkeypatch.setitem(DATASETS, "none", lambda: None)
    takes = {"digits": "seed, val, test", "none": "nothing"}[name]
    with pytest.raises(ValueError, match=f"folder='here' is not taken by {name}; it takes {takes}"):
        load_dataset(name, folder="here")


def test_a_loader_may_take_whatever_is_given(monkeypatch):
    monkeypatch.setitem(DATASETS, "greedy", lambda **options: options)
    assert load_dataset("greedy", folder="here") == {"folder": "here"}
