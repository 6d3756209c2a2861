"""Pushing: what would be sent, offline; and that it is sent, to a small Hub on this machine with its protocol."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants

import normswap
from normswap.outputs.hub import prepare, push

from ..cli.test_cli import one_object, run
from ..models import family, images, with_timm

FILES = ["README.md", "bounds.safetensors", "config.json", "model.safetensors", "normswap.json", "report.html"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder that plain timm loads, one in which a LayerNorm stays."""
    root = tmp_path_factory.mktemp("push")
    model = family("vit")
    for name, keep in (("whole", []), ("partial", ["norm"])):
        normswap.convert(
            model,
            [images(model, 8)],
            calibration=normswap.CalibrationOptions(method="channel", bound="tight"),
            plan=normswap.make_plan(model, keep=keep),
        ).save(root / name)
    return root


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a commit takes; ``status`` makes it refuse."""

    status = 200
    requests: list
    committed: dict[str, bytes]

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not body and "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while (size := int(self.rfile.readline(), 16)) > 0:
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.requests.append((self.path, self.headers.get("Authorization"), body))
        if self.status != 200:
            return self._answer({"error": "You have no right to do this"}, self.status)
        if self.path == "/api/repos/create":
            return self._answer({"url": f"{self._own()}/user/model"})
        if self.path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if "/branch/" in self.path:
            return self._answer({})
        assert "/commit/" in self.path, self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.committed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._answer({"commitUrl": f"{self._own()}/user/model/commit/1", "commitOid": "1", "success": True})

    def _own(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, record, status=200):
        text = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("OneHub", (Hub,), {"requests": [], "committed": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens


def test_dry_run(folders, no_hub):
    result = run("push", folders / "whole", "user/model", "--dry-run", "--private", "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    files = {entry["path"]: entry["bytes"] for entry in record["files"]}
    assert list(files) == FILES
    for name in set(files) - {"README.md"}:
        assert files[name] == (folders / "whole" / name).stat().st_size
    assert (record["repo_id"], record["private"], record["dry_run"], record["url"]) == ("user/model", True, True, None)
    card = record["card"]
    assert card["library_name"] == "timm"
    assert card["pipeline_tag"] == "image-classification"
    assert {"timm", "normswap"} <= set(card["tags"])
    assert card["license"] == "apache-2.0"  # timm's, of vit_tiny_patch16_224
    assert "base_model" not in card
    assert "--base-model" in result.stderr
    assert "nothing was sent" in result.stderr


def test_the_card_says_how_to_load_it_from_the_hub(folders):
    card = prepare(folders / "whole", "user/model", revision="v2", base_model="timm/vit_tiny").card
    file = 'hf_hub_download("user/model", "bounds.safetensors", revision="v2")'
    loads = f'"hf-hub:user/model@v2", pretrained=True, norm_layer=partial(TokenBound, file={file})'
    assert loads in card
    assert "from huggingface_hub import hf_hub_download\n" in card
    assert "PATH" not in card
    assert ModelCard(card).data.base_model == "timm/vit_tiny"
    partial = prepare(folders / "partial", "user/model")
    assert partial.kept == ["norm"]
    assert 'normswap.load(snapshot_download("user/model"))' in partial.card
    assert "from huggingface_hub import snapshot_download" in partial.card
    assert "PATH" not in partial.card
    # The folder's own card stays as it was.
    assert "local-dir:PATH" in (folders / "whole/README.md").read_text()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"license": "mit"}, {"license": "mit"}),
        ({"license": "dinov3-license"}, {"license": "other", "license_name": "dinov3-license"}),
        ({}, {}),
        ({"source": "hf-hub", "hf_hub_id": "timm/vit.in1k"}, {"base_model": "timm/vit.in1k"}),
        ({"hf_hub_id": "timm/vit.in1k"}, {}),  # the architecture's default; these weights may be any
    ],
)
def test_metadata(config, expected):
    from normswap.reporting.model_card import metadata

    found = metadata(config).to_dict()
    text = f"---\n{metadata(config).to_yaml()}\n---\n\n# Model\n"
    assert ModelCard(text).data.to_dict() == found
    assert {k: v for k, v in found.items() if k in ("license", "license_name", "base_model")} == expected


def test_pretrained_weights_name_their_base_model(monkeypatch):
    """timm would fetch them; here it gets random ones, and the note of where they come from is what is looked at."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda **kwargs: create(**{**kwargs, "pretrained": False}))
    model = normswap.load_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True)
    from normswap.reporting.model_card import metadata

    assert metadata(model.pretrained_cfg).base_model == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def test_one_commit_with_everything(folders, hub, tmp_path):
    result = run("push", folders / "whole", "user/model", "--revision", "v2", "--private", "--message", "Ship it")
    assert result.exit_code == 0, result.stderr
    assert "/user/model/commit/1" in result.stderr.splitlines()[-1]
    assert sorted(hub.committed) == FILES
    paths = [path for path, *_ in hub.requests]
    assert paths[0] == "/api/repos/create"
    made = json.loads(hub.requests[0][2])
    assert made.get("private") is True or made.get("visibility") == "private"  # by the version of huggingface_hub
    assert "/api/models/user/model/branch/v2" in paths
    assert sum("/commit/v2" in path for path in paths) == 1
    assert b"Ship it" in next(body for path, _, body in hub.requests if "/commit/" in path)
    assert {token for _, token, _ in hub.requests} == {"Bearer hf_secret"}
    assert "hf_secret" not in result.stderr + result.stdout
    # What arrived is a model that loads, and a card that says how.
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in hub.committed.items():
        (arrived / name).write_bytes(content)
    model = with_timm(arrived)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model(x), normswap.load(folders / "whole")(x))
    assert "hf-hub:user/model@v2" in hub.committed["README.md"].decode()


@pytest.mark.parametrize(("status", "words"), [(401, ["HF_TOKEN"]), (403, ["HF_TOKEN"]), (500, ["refused", "500"])])
def test_a_hub_that_refuses(folders, hub, status, words):
    hub.status = status
    result = run("push", folders / "whole", "user/model", "-q")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in ["user/model", str(status), *words]), result.stderr
    assert "unexpected" not in result.stderr
    assert not hub.committed


def test_a_hub_that_is_not_there(folders, no_hub):
    with pytest.raises(normswap.HubError, match="cannot be reached"):
        push(prepare(folders / "whole", "user/model"))
    result = run("push", folders / "whole", "user/model", "-q")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("repo_id", "extra", "word"),
    [
        ("no spaces/here", [], "is no repository"),
        ("model", [], "USER/model"),
        ("a/b/c", [], "is no repository"),
        ("user/model", ["--base-model", "not an id"], "'not an id'"),
    ],
)
def test_ids_that_are_none(folders, repo_id, extra, word):
    result = run("push", folders / "whole", repo_id, "--dry-run", *extra, "-q")
    assert result.exit_code == 2
    assert word in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_folders_that_are_none(folders, tmp_path):
    result = run("push", tmp_path, "user/model", "--dry-run", "-q")
    assert result.exit_code == 2
    assert "normswap did not write this folder" in result.stderr
    (tmp_path / "normswap.json").write_text("{")
    with pytest.raises(normswap.CheckpointError, match="cannot be read"):
        prepare(tmp_path, "user/model")
    (tmp_path / "normswap.json").write_bytes((folders / "whole/normswap.json").read_bytes())
    with pytest.raises(normswap.CheckpointError, match="is missing"):
        prepare(tmp_path, "user/model")
    for name in ("model.safetensors", "bounds.safetensors", "config.json", "README.md"):
        (tmp_path / name).write_bytes((folders / "whole" / name).read_bytes())
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/secret").write_text("hidden")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_text("graph")
    files = list(prepare(tmp_path, "user/model").files)
    assert files == [
        "README.md",
        "bounds.safetensors",
        "config.json",
        "model.safetensors",
        "normswap.json",
        "onnx/model.onnx",
    ]
    (tmp_path / "README.md").write_text("# no metadata\n")
    with pytest.raises(normswap.CheckpointError, match="library_name"):
        prepare(tmp_path, "user/model")
