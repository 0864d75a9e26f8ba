"Labelled sets of the paper: a tiny fixture in the layout of each publisher, damage, caches, splits."
import hashlib
import json
import pickle

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


def test_a_mapped_set_cannot_change_its_file(tmp_path):
    pictures = [(Image.new("RGB", (8, 8), (9, 9, 9)), 0)] * 2
    first = read_pictures(pictures, ("grey",), 8, tmp_path / "set")
    first.images.zero_()
    assert read_pictures(pictures, ("grey",), 8, tmp_path / "set").images.eq(9).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_picture_becomes_three_channels(mode):
    assert square(Image.new(mode, (9, 5)), 4).shape == (3, 4, 4)
    assert square(Image.new(mode, (5, 9)), 4, channels=1).shape == (1, 4, 4)


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
