"""Images from WebDataset shards and from Hugging Face's datasets, through timm's own readers."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from normswap import ArgumentError, DataError, load_images, load_model
from normswap.demo import MODEL
from normswap.inputs.dataset import load_splits

from ..cli.test_cli import one_object, run

COUNT, SHARDS = 21, 3


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


def _png(place: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (16, 16), 10 * place).save(file, "PNG")  # the grey tells the place
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = tmp_path_factory.mktemp("shards")
    splits = {}
    for split in ("train", "validation"):
        names = [f"{split}-{shard:04d}.tar" for shard in range(SHARDS)]
        for shard, name in enumerate(names):
            with webdataset.TarWriter(str(root / name)) as writer:
                for place in range(shard * COUNT // SHARDS, (shard + 1) * COUNT // SHARDS):
                    writer.write({"__key__": f"{place:05d}", "png": _png(place), "cls": str(place % 10)})
        lengths = [COUNT // SHARDS] * SHARDS
        splits[split] = {"name": split, "num_samples": COUNT, "filenames": names, "shard_lengths": lengths}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def _labels(images) -> list[int]:
    return [int(label) for _, labels in images for label in labels]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_once(shards, model, workers):
    images = load_images(model, shards, "train", "wds/digits", batch_size=4, workers=workers)
    assert (len(images), images.num_classes) == (COUNT, 10)
    assert _labels(images) == [place % 10 for place in range(COUNT)]


def test_a_draw_takes_the_places_that_it_takes_from_a_folder(shards, model):
    images = load_images(model, shards, "train", "wds/digits", batch_size=4)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(5)).tolist()
    assert _labels(images.draw(8, 5)) == [place % 10 for place in sorted(order[:8])]
    assert _labels(images.draw(6, 5, skip=8)) == [place % 10 for place in sorted(order[8:14])]
    twice = images.draw(8, 5).draw(3, 1)
    assert len(twice) == 3
    assert set(_labels(twice)) <= set(_labels(images.draw(8, 5)))
    pixels, everything = (torch.cat([x for x, _ in found]) for found in (images.draw(8, 5), images))
    assert torch.equal(pixels, everything[sorted(order[:8])])


def test_a_stream_must_say_how_long_it_is(shards, model):
    pattern = "train-{0000..0002}.tar"
    with pytest.raises(DataError, match="does not say how many images it has"):
        load_images(model, shards, pattern, "wds/digits")
    assert len(load_images(model, shards, f"{pattern}|{COUNT}", "wds/digits")) == COUNT
    with pytest.raises(DataError, match="split nowhere not found"):
        load_images(model, shards, "nowhere", "wds/digits")
    with pytest.raises(ArgumentError, match="needs `data_dir`"):
        load_images(model, None, "train", "wds/digits")


def test_labels_of_a_stream_are_checked_as_they_come(shards):
    few = load_model("test_vit", pretrained=False, checkpoint=None, num_classes=4, weights=False)
    with pytest.raises(DataError, match=r"label \d, and the model has 4 classes"):
        list(load_images(few, shards, "train", "wds/digits"))
    assert len(list(load_images(few, shards, "train", "wds/digits", labels=False))) == 1


def test_convert_from_shards(shards, tmp_path):
    result = run(
        "convert", "-m", MODEL, "--dataset", "wds/digits", "--data-dir", shards, "-j", 0, "--method", "channel",
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert (record["calib_samples"], record["before"]["n"]) == (COUNT, COUNT)


def test_hugging_faces_datasets(model, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = {"image": [{"bytes": _png(i), "path": None} for i in range(20)], "label": [i % 10 for i in range(20)]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    folder = Path(tmp_path / "digits")
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        table.to_parquet(folder / f"{split}.parquet")
    calibration, evaluation = load_splits(model, tmp_path / "cache", "train", "validation", f"hfds/{folder}")
    assert (len(calibration), len(evaluation), evaluation.num_classes) == (20, 20, 10)
    assert _labels(evaluation) == [i % 10 for i in range(20)]
