"""Weights in several files with an index are those of the one file; what is missing is named whole."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import normswap
from normswap.inputs.checkpoint import _hub_index

from ..models import family


@pytest.fixture
def folder(tmp_path):
    save_for_hf(family("vit"), str(tmp_path))
    return tmp_path


def _shard(folder, suffix: str) -> dict[str, torch.Tensor]:
    """Replace the weights of a folder by three shards and their index."""
    state = normswap.load_model(f"local-dir:{folder}").state_dict()
    for file in ("model.safetensors", "pytorch_model.bin"):
        (folder / file).unlink(missing_ok=True)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    files = [f"{stem}-0000{i + 1}-of-00003{suffix}" for i in range(3)]
    where = {name: files[i % 3] for i, name in enumerate(state)}
    for file in files:
        part = {name: state[name].contiguous() for name in state if where[name] == file}
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_the_one_file(folder, suffix):
    state = _shard(folder, suffix)
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    index = next(folder.glob("*.index.json"))
    for loaded in (
        normswap.load_model(f"local-dir:{folder}"),
        normswap.load_model("vit_tiny_patch16_224", checkpoint=index, **arguments),
        normswap.load_model("vit_tiny_patch16_224", checkpoint=folder, **arguments),
    ):
        found = loaded.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_model_can_be_saved_and_loaded_again(folder):
    _shard(folder, ".safetensors")
    loaded = normswap.load_model(f"local-dir:{folder}")
    assert "state_dict" not in loaded.pretrained_cfg
    assert loaded.pretrained_cfg["source"] == "local-dir"
    save_for_hf(loaded, str(folder / "again"))
    again = normswap.load_model(f"local-dir:{folder}/again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.state_dict().items())


def test_hub_shards_are_downloaded_with_their_index(folder, monkeypatch):
    _shard(folder, ".safetensors")
    asked = {}
    monkeypatch.setattr(
        "normswap.inputs.checkpoint.list_repo_files", lambda *_, **__: [p.name for p in folder.iterdir()]
    )
    monkeypatch.setattr(
        "normswap.inputs.checkpoint.snapshot_download", lambda repo, **how: asked.update(how, repo=repo) or str(folder)
    )
    assert _hub_index("user/vit@main") == folder / "model.safetensors.index.json"
    assert (asked["repo"], asked["revision"]) == ("user/vit", "main")
    assert asked["allow_patterns"] == ["model.safetensors.index.json", "model-*-of-*"]


def _lost(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def _cut(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _garbled(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def _outside(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"norm.weight": "../other.safetensors"}}')


def _empty(folder):
    save_file({"x": torch.zeros(1)}, folder / "model-00002-of-00003.safetensors")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_lost, "model-00002-of-00003.safetensors: named in the index of the shards, but not there"),
        (_cut, "model-00002-of-00003.safetensors: cannot be read"),
        (_garbled, "is no index of shards"),
        (_outside, "names ../other.safetensors, which does not lie beside it"),
        (_empty, "tensors are not in their files, as pos_embed"),
    ],
)
def test_broken_shards_are_named(folder, spoil, says):
    _shard(folder, ".safetensors")
    spoil(folder)
    with pytest.raises(normswap.CheckpointError, match=re.escape(says)) as caught:
        normswap.load_model(f"local-dir:{folder}")
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_cut_between_words(folder):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=2, num_classes=7)
    save_file(
        {f"{'x' * 40}.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
    )
    with pytest.raises(normswap.CheckpointError, match="do not fit the model") as caught:
        normswap.load_model(f"local-dir:{folder}")
    names = [word.strip('",.') for word in str(caught.value).partition("state_dict:")[2].split()]
    known = {*model.state_dict(), ""}
    told = [name for name in names if "." in name or "_" in name]
    assert told
    assert {name.removeprefix(f"{'x' * 40}.") for name in told} <= known
