"Labelled sets of the paper: a tiny fixture in the layout of each publisher, damage, caches, splits."
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as tv

from mlvgm_mi import datasets
from mlvgm_mi.data import DATASETS, DataUnavailableError, load_dataset
from mlvgm_mi.datasets import OPENERS, Parts, load_pictures, read_pictures, split_parts, square

SIZE = 16
HELD_OUT = [[3, 15, 20], [1, 5, 7, 16, 19, 24, 36, 38]]  # of 40 pictures in two classes with seed 3


def picture(path, label, number):
    "A picture whose red is its class and whose green is its number, so that a mixed-up pair shows."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), (40 * label, 10 * number, 200)).save(path, quality=100)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def caltech101(root, monkeypatch):
    base = root / "caltech101" / "101_ObjectCategories"
    (base / "BACKGROUND_Google").mkdir(parents=True)
    for label, name in enumerate(["accordion", "bonsai"]):
        for n in range(1, 11):
            picture(base / name / f"image_{n:04d}.jpg", label, n)
    return 2


def cifar(build, folder, fine, classes):
    "The pickles of CIFAR with their digests put in the place of the official ones."
    def make(root, monkeypatch):
        def put(name, content):
            packed = pickle.dumps(content)
            (root / folder).mkdir(exist_ok=True)
            (root / folder / name).write_bytes(packed)
            return hashlib.md5(packed).hexdigest()

        data = np.zeros((20, 3, 1024), np.uint8)
        labels = [k % classes for k in range(20)]
        data[:, 0] = 40 * np.array(labels)[:, None]
        data[:, 1] = 10 * np.arange(20)[:, None]
        entry = {"data": data.reshape(20, -1), fine: labels}
        monkeypatch.setattr(build, "train_list", [["train", put("train", entry)]])
        monkeypatch.setattr(build, "test_list", [["test", put("test", entry)]])
        meta = build.meta | {"md5": put(build.meta["filename"], {build.meta["key"]: [f"c{k}" for k in range(classes)]})}
        monkeypatch.setattr(build, "meta", meta)
        return classes
    return make


def dtd(root, monkeypatch):
    for part, numbers in {"train": (1, 2), "val": (3,), "test": (4, 5)}.items():
        lines = [f"{name}/{name}_{n}.jpg" for name in ("banded", "dotted") for n in numbers]
        text(root / "dtd" / "dtd" / "labels" / f"{part}1.txt", *lines)
        for label, name in enumerate(("banded", "dotted")):
            for n in numbers:
                picture(root / "dtd" / "dtd" / "images" / name / f"{name}_{n}.jpg", label, n)
    return 2


def flowers102(root, monkeypatch):
    base, labels = root / "flowers-102", [1, 2] * 6
    for n, label in enumerate(labels, 1):
        picture(base / "jpg" / f"image_{n:05d}.jpg", label - 1, n)
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", {"trnid": [1, 2, 3, 4], "valid": [5, 6], "tstid": [7, 8, 9, 10, 11, 12]})
    names = {"label": "imagelabels.mat", "setid": "setid.mat"}
    digests = {key: (name, hashlib.md5((base / name).read_bytes()).hexdigest()) for key, name in names.items()}
    monkeypatch.setattr(tv.Flowers102, "_file_dict", tv.Flowers102._file_dict | digests)
    return 102  # all have names; two of them have pictures


def food101(root, monkeypatch):
    for part, numbers in {"train": range(1, 11), "test": range(11, 14)}.items():
        names = {name: [f"{name}/{n}" for n in numbers] for name in ("apple_pie", "ramen")}
        text(root / "food-101" / "meta" / f"{part}.json", json.dumps(names))
        for label, name in enumerate(names):
            for n in numbers:
                picture(root / "food-101" / "images" / name / f"{n}.jpg", label, n)
    return 2


def pets(root, monkeypatch):
    base = root / "oxford-iiit-pet"
    for part, numbers in {"trainval": range(1, 11), "test": range(11, 14)}.items():
        text(base / "annotations" / f"{part}.txt",
             *[f"{name}_{n} {label + 1} 1 1" for label, name in enumerate(("Abyssinian", "beagle")) for n in numbers])
        for label, name in enumerate(("Abyssinian", "beagle")):
            for n in numbers:
                picture(base / "images" / f"{name}_{n}.jpg", label, n)
    return 2


def aircraft(root, monkeypatch):
    data = root / "fgvc-aircraft-2013b" / "data"
    text(data / "families.txt", "A300", "Boeing 707")
    for part, numbers in {"train": (1, 2), "val": (3,), "test": (4, 5)}.items():
        rows = [(100 * label + n, name, label, n) for label, name in enumerate(("A300", "Boeing 707")) for n in numbers]
        text(data / f"images_family_{part}.txt", *[f"{key:07d} {name}" for key, name, _, _ in rows])
        for key, _, label, n in rows:
            picture(data / "images" / f"{key:07d}.jpg", label, n)
    return 2


def stanford_cars(root, monkeypatch):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})
    kind = [("fname", object), ("class", int)]
    for folder, path, count in (("cars_train", "devkit/cars_train_annos.mat", 20),
                                ("cars_test", "cars_test_annos_withlabels.mat", 6)):
        rows = [(f"{n:05d}.jpg", n % 2 + 1) for n in range(count)]
        savemat(base / path, {"annotations": np.array(rows, dtype=kind)})
        for n, (name, label) in enumerate(rows, 0 if count == 20 else 20):
            picture(base / folder / name, label - 1, n)
    return 2


def imagenet(root, monkeypatch):
    for part in ("train", "val"):
        for label, name in enumerate(("n01440764", "n01443537", "n01484850")):
            for n in range(10):
                picture(root / part / name / f"{n}.JPEG", label, n)
    return 3


def folder(root, monkeypatch):
    for label, name in enumerate(("cat", "dog")):
        for n in range(20):
            picture(root / name / f"{n}.png", label, n)
    return 2


FIXTURES = {
    "caltech101": caltech101, "cifar10": cifar(tv.CIFAR10, "cifar-10-batches-py", "labels", 4),
    "cifar100": cifar(tv.CIFAR100, "cifar-100-python", "fine_labels", 5), "dtd": dtd, "flowers102": flowers102,
    "food101": food101, "pets": pets, "aircraft": aircraft, "stanford-cars": stanford_cars, "imagenet": imagenet,
    "folder": folder,
}


def test_every_set_has_a_fixture_and_a_place_in_the_registry():
    assert set(FIXTURES) == set(OPENERS) <= set(DATASETS)


@pytest.mark.parametrize("name", OPENERS)
def test_layouts_of_the_publishers(name, tmp_path, monkeypatch):
    classes = FIXTURES[name](tmp_path, monkeypatch)
    splits = load_dataset(name, folder=tmp_path, size=SIZE)
    for part in (splits.train, splits.val, splits.test):
        assert part.image_shape == (3, SIZE, SIZE) and len(part.class_names) == classes
        assert set(part.labels.tolist()) <= set(range(classes)) and len(part)
        red = part.images[:, 0].float().mean((1, 2)) / 40
        assert torch.equal(red.round().long(), part.labels)  # every picture has its own class
    assert set(splits.train.labels.tolist()) == set(range(min(classes, 2))) | set(splits.test.labels.tolist())
    seen = lambda part: {tuple(image.flatten()[[0, SIZE * SIZE]].tolist()) for image in part.images}
    if name not in ("cifar10", "cifar100", "imagenet"):  # their fixtures have the same pictures in train and test
        assert not seen(splits.train) & seen(splits.test)
    assert not seen(splits.train) & seen(splits.val)


@pytest.mark.parametrize("name", OPENERS)
def test_an_empty_folder_is_refused_with_advice(name, tmp_path):
    with pytest.raises(DataUnavailableError, match=f"^{name}: .*What to do"):
        load_pictures(name, tmp_path)


@pytest.mark.parametrize("name", OPENERS)
def test_a_set_without_its_folder_is_refused(name):
    with pytest.raises(ValueError, match=rf"folder=\.\.\. is needed by {name}"):
        load_dataset(name)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(KeyError, match="'birdsnap' is unknown.*caltech101"):
        load_pictures("birdsnap", "nowhere")


def test_a_damaged_picture_is_named(tmp_path):
    folder(tmp_path, None)
    (tmp_path / "dog" / "3.png").write_bytes(b"\x89PNG and then nothing")
    with pytest.raises(DataUnavailableError, match="folder/train: picture .* cannot be read"):
        load_pictures("folder", tmp_path, SIZE)


def test_splits_with_other_classes_are_refused(tmp_path):
    picture(tmp_path / "train" / "cat" / "0.png", 0, 0)
    picture(tmp_path / "test" / "dog" / "0.png", 1, 0)
    with pytest.raises(ValueError, match="different class folders"):
        load_pictures("folder", tmp_path, SIZE)


def layout(root, *folders):
    "A picture in each of the folders."
    for label, name in enumerate(folders):
        picture(root / name / "0.png", label % 2, label)


@pytest.mark.parametrize(("name", "folders", "found"), [
    ("folder", ["val/cat", "test/cat"], "test, val"), ("folder", ["training/cat", "test/cat"], "test, training"),
    ("folder", ["training/cat"], "training"), ("folder", ["Train/cat", "Test/cat"], "Test, Train"),
    ("folder", ["cat", "valid", "dog"], "valid"), ("folder", ["train/cat", "testing/cat"], "testing, train"),
    ("imagenet", ["val/cat", "val/dog"], "val"), ("imagenet", ["train/cat", "validation/cat"], "train, validation"),
])
def test_splits_are_not_taken_for_classes(name, folders, found, tmp_path):
    layout(tmp_path, *folders)
    with pytest.raises(ValueError, match=f"has the folders {found}, which are named like splits; expected train"):
        load_pictures(name, tmp_path, SIZE)


def test_imagenet_without_a_split_is_refused(tmp_path):
    layout(tmp_path, "n01440764", "n01443537")
    with pytest.raises(DataUnavailableError, match="imagenet: .*there is no folder train.*What to do"):
        load_pictures("imagenet", tmp_path, SIZE)


def test_unlabelled_test_images_beside_imagenet_are_let_be(tmp_path):
    imagenet(tmp_path, None)
    picture(tmp_path / "test" / "0.JPEG", 0, 0)
    assert len(load_pictures("imagenet", tmp_path, SIZE).test) == 30


@pytest.mark.parametrize(("counts", "train"), [
    ((20, 1, 19), (14, 1, 14)), ((22, 1, 27), (16, 1, 19)), ((20, 2, 18), (14, 1, 13)), ((20, 20, 0), (15, 15, 0)),
])
@pytest.mark.parametrize("seed", range(3))
def test_the_last_image_of_a_class_stays_in_training(counts, train, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    pictures = [(Image.new("RGB", (8, 8), (number, 0, 0)), label) for number, label in enumerate(labels)]
    splits = split_parts(Parts({"train": pictures}, ("a", "b", "c")), 8, seed=seed)
    found = [part.labels.bincount(minlength=3) for part in (splits.train, splits.val, splits.test)]
    assert sum(found).tolist() == list(counts) and (found[0].gt(0) == torch.tensor(counts).gt(0)).all()
    assert (found[0] - torch.tensor(train)).abs().max() <= 1
    reds = torch.cat([part.images[:, 0, 0, 0] for part in (splits.train, splits.val, splits.test)])
    assert reds.sort().values.tolist() == list(range(len(labels)))


def test_classes_of_one_image_each_cannot_be_split():
    pictures = [(Image.new("RGB", (8, 8)), label) for label in range(5)]
    with pytest.raises(ValueError, match=r"n=1 of 5 images .* \(classes \d\).* at least 2 images"):
        split_parts(Parts({"train": pictures}, tuple("abcde")), 8)


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_held_out_is_the_same_in_every_release(cached, tmp_path):
    pictures = [(Image.new("RGB", (8, 8), (number, 0, 0)), number % 2) for number in range(40)]
    splits = split_parts(Parts({"train": pictures}, ("a", "b")), 8, seed=3, cache=tmp_path if cached else None)
    reds = [part.images[:, 0, 0, 0].tolist() for part in (splits.train, splits.val, splits.test)]
    assert reds[1:] == HELD_OUT and reds[0] == sorted(set(range(40)) - set(reds[1]) - set(reds[2]))
    for part, found in zip((splits.train, splits.val, splits.test), reds):
        assert part.labels.tolist() == [red % 2 for red in found]


def test_what_is_held_out_depends_on_the_seed_alone(tmp_path):
    folder(tmp_path, None)
    first, again, other = (load_pictures("folder", tmp_path, SIZE, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.val.images, again.val.images) and not torch.equal(first.val.images, other.val.images)


def test_bytes_in_a_cache_are_the_same_and_survive_an_interruption(tmp_path, monkeypatch):
    folder(tmp_path / "data", None)
    plain = load_pictures("folder", tmp_path / "data", SIZE)

    def power_cut(pictures, out, title):
        out[:] = 7
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datasets, "decode", power_cut)
        load_pictures("folder", tmp_path / "data", SIZE, cache=tmp_path / "cache")
    for _ in range(2):  # written, then mapped
        kept = load_pictures("folder", tmp_path / "data", SIZE, cache=tmp_path / "cache")
        assert torch.equal(plain.train.images, kept.train.images) and torch.equal(plain.test.labels, kept.test.labels)


def repaint(root):
    for path in root.glob("*/*.png"):
        size = path.stat().st_size
        Image.new("RGB", (24, 20), (0, 0, 77)).save(path)
        os.truncate(path, size)  # as long as before: only the time tells


def relabel(root):
    os.rename(root / "cat" / "3.png", root / "dog" / "30.png")
    os.rename(root / "dog" / "4.png", root / "cat" / "40.png")


def rename_classes(root):
    os.rename(root / "cat", root / "yak")


@pytest.mark.parametrize("change", [repaint, relabel, rename_classes])
def test_a_cache_is_renewed_when_files_change(change, tmp_path):
    data = tmp_path / "data"
    folder(data, None)
    load = lambda **more: load_pictures("folder", data, SIZE, **more)
    load(cache=tmp_path / "cache")
    change(data)
    fresh, kept = load(), load(cache=tmp_path / "cache")
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(kept, part).images, getattr(fresh, part).images)
        assert torch.equal(getattr(kept, part).labels, getattr(fresh, part).labels)


@pytest.mark.parametrize("name", OPENERS)
def test_the_cache_of_every_layout_follows_its_files(name, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    FIXTURES[name](tmp_path / "data", monkeypatch)
    decoded = []
    monkeypatch.setattr(datasets, "decode", lambda *args, decode=datasets.decode: decoded.append(1) or decode(*args))
    load = lambda **more: load_pictures(name, tmp_path / "data", SIZE, cache=tmp_path / "cache", **more)
    first, count = load(), len(decoded)
    assert torch.equal(load().train.images, first.train.images) and len(decoded) == count
    load(seed=1)  # other splits of the same bytes
    assert len(decoded) == count
    touched = next(path for path in sorted(tmp_path.glob("data/**/*")) if path.is_file())
    os.utime(touched, ns=(1, 1))
    load()
    assert len(decoded) > count


def backing(tensor):
    "The file that the memory of a tensor is mapped from, or nothing."
    place = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, *_, path = line.split(maxsplit=5)
        first, last = (int(word, 16) for word in bounds.split("-"))
        if first <= place < last:
            return path if path.startswith("/") else None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not say what is mapped")
@pytest.mark.parametrize("make", [folder, imagenet])
def test_held_out_splits_stay_out_of_memory(make, tmp_path):
    make(tmp_path / "data", None)
    splits = load_pictures(make.__name__, tmp_path / "data", SIZE, cache=tmp_path / "cache")
    for part in (splits.train, splits.val, splits.test):
        assert str(backing(part.images)).startswith(str(tmp_path / "cache"))
    assert backing(load_pictures(make.__name__, tmp_path / "data", SIZE).train.images) is None


def test_a_cache_among_the_pictures_is_refused(tmp_path):
    folder(tmp_path, None)
    with pytest.raises(ValueError, match="cache=.* lies in .*put it elsewhere"):
        load_pictures("folder", tmp_path, SIZE, cache=tmp_path / "cache")


def test_a_mapped_set_cannot_change_its_file(tmp_path):
    pictures = [(Image.new("RGB", (8, 8), (9, 9, 9)), 0)] * 2
    first = read_pictures(pictures, ("grey",), 8, tmp_path / "set")
    first.images.zero_()
    assert read_pictures(pictures, ("grey",), 8, tmp_path / "set").images.eq(9).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_picture_becomes_three_channels(mode):
    assert square(Image.new(mode, (9, 5)), 4).shape == (3, 4, 4)
    assert square(Image.new(mode, (5, 9)), 4, channels=1).shape == (1, 4, 4)


def deep(dtype):
    "A picture of 16 bits that goes from black to white."
    return Image.fromarray(np.linspace(0, 65535, 64).round().astype(dtype).reshape(8, 8))


@pytest.mark.parametrize(("dtype", "mode"), [("<u2", "I;16"), (">u2", "I;16B"), ("<i4", "I")])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight(dtype, mode, channels):
    picture = deep(dtype)
    assert picture.mode == mode
    expected = np.linspace(0, 255, 64).round().reshape(8, 8)
    assert np.abs(square(picture, 8, channels).astype(float) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_folder_may_have_pictures_of_sixteen_bits(suffix, tmp_path):
    for n in range(10):
        (tmp_path / "cells").mkdir(exist_ok=True)
        deep("<u2").save(tmp_path / "cells" / f"{n}.{suffix}")
    images = load_pictures("folder", tmp_path, 8, channels=1).train.images
    assert images[0].unique().numel() == 64 and (images[0].min(), images[0].max()) == (0, 255)


@pytest.mark.parametrize("values", [np.float32([[0.0, 0.5]]), np.int32([[0, 65536]]), np.int32([[-1, 9]])])
def test_pixels_without_a_known_range_are_refused(values, tmp_path):
    with pytest.raises(ValueError, match=f"the picture has mode [FI] and values from {values.min()} to {values.max()}, expected"):
        square(Image.fromarray(values), 1)
    folder(tmp_path, None)
    Image.fromarray(values).save(tmp_path / "dog" / "deep.tif")
    with pytest.raises(ValueError, match="folder/train: picture 40: .*deep.tif has mode"):
        load_pictures("folder", tmp_path, SIZE)


def test_a_colour_set_serves_an_encoder_of_one_channel(tmp_path):
    folder(tmp_path, None)
    grey = load_pictures("folder", tmp_path, SIZE, channels=1)
    colour = load_pictures("folder", tmp_path, SIZE)
    luma = (colour.val.images.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert grey.val.image_shape == (1, SIZE, SIZE) and (grey.val.images - luma).abs().max() < 2
    with pytest.raises(ValueError, match="channels=2"):
        load_pictures("folder", tmp_path, SIZE, channels=2)


def test_a_share_that_leaves_nothing_is_refused():
    few = [(Image.new("RGB", (8, 8)), 0)] * 3
    with pytest.raises(ValueError, match="n=0 must lie between"):
        split_parts(Parts({"train": few, "test": few}, ("one",)), 8, val=0.01)


def test_hidden_folders_are_no_classes(tmp_path):
    for label, name in enumerate(["ant", "bee"]):
        for number in range(20):
            picture(tmp_path / name / f"{number}.png", label, number)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert load_pictures("folder", tmp_path, SIZE).train.class_names == ("ant", "bee")
