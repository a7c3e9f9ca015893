"""MeshNet's weights: fetched file by file, verified, kept with their licence; on a small network made here."""

import hashlib
import json
import runpy
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora_mini.errors import FedloraError
from fedlora_mini.models import meshnet

SCRIPT = Path(__file__).parents[2] / "data_scripts" / "weights.py"


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with a MeshNet of one dilated layer, two channels and three classes, and a licence."""
    common = {"strides": [1] * 3, "padding": "same", "data_format": "channels_last", "activation": "linear"}
    layers = [{"class_name": "InputLayer", "config": {}}]
    sizes = {"conv": (3, 1, 2), "output": (1, 2, 3)}  # kernel side, channels in, out
    for name, (k, _, out) in sizes.items():
        config = {"name": name, "filters": out, "kernel_size": [k] * 3, "dilation_rate": [1] * 3, "use_bias": True}
        layers.append({"class_name": "Conv3D", "config": config | common})
    layers.insert(2, {"class_name": "Activation", "config": {"activation": "elu"}})
    shapes = {f"{n}/kernel": [k, k, k, c, out] for n, (k, c, out) in sizes.items()}
    shapes |= {f"{n}/bias": [out] for n, (_, _, out) in sizes.items()}
    entries = [{"name": name, "shape": shape, "dtype": "float32"} for name, shape in shapes.items()]
    manifest = [{"paths": ["model.bin"], "weights": entries}]
    model = {"modelTopology": {"model_config": {"config": {"layers": layers}}}, "weightsManifest": manifest}
    folder = tmp_path / "shelf" / "meshnet"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(model))
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    (folder / "model.bin").write_bytes(np.arange(numbers, dtype="<f4").tobytes())
    (folder / "LICENSE").write_text("MIT License")
    return folder


@pytest.fixture
def public(shelf: Path, server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A web server with these files in the place of their public home; returns the folder's address."""
    root = server.url.rpartition("/")[0]
    known = {f.name: (f"{root}/{f.name}", hashlib.sha256(f.read_bytes()).hexdigest()) for f in shelf.iterdir()}
    monkeypatch.setattr(meshnet, "FILES", {name: known[name] for name in meshnet.FILES})
    send: Callable[[BaseHTTPRequestHandler], None] = server.answer

    def answer(request: BaseHTTPRequestHandler) -> None:
        server.body = (shelf / request.path.lstrip("/")).read_bytes()
        send(request)

    monkeypatch.setattr(server, "answer", answer)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return root


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["weights.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def same(home: Path, shelf: Path) -> bool:
    files = sorted(f.name for f in (home / meshnet.FOLDER).iterdir())
    equal = all((home / meshnet.FOLDER / name).read_bytes() == (shelf / name).read_bytes() for name in files)
    return files == sorted(meshnet.FILES) and equal


def test_the_script_downloads_through_an_interruption_and_only_once(
    public: str,
    shelf: Path,
    server,
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.drop_after = [None, 100]  # the second file breaks off
    run(monkeypatch)
    assert same(own_home, shelf)
    assert server.ranges == [None, None, "bytes=100-", None]
    out = capsys.readouterr().out
    assert "parameters: 65" in out and "classes: background, white matter, grey matter" in out and "MIT" in out
    run(monkeypatch)
    assert len(server.ranges) == 4


@pytest.mark.parametrize("kind", ["folder", "address"])
def test_the_script_takes_a_folder_or_its_address(
    kind: str, public: str, shelf: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meshnet.FILES["model.bin"] = ("http://127.0.0.1:9/unused", meshnet.FILES["model.bin"][1])
    run(monkeypatch, "--from", str(shelf) if kind == "folder" else public + "/")
    assert same(own_home, shelf)
    tensors, _ = meshnet.read_weights()
    assert torch.equal(tensors["encoder.0.weight"].permute(2, 3, 4, 1, 0).flatten(), torch.arange(54.0))


def test_a_wrong_file_is_refused_and_not_kept(
    public: str, shelf: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (shelf / "model.bin").read_bytes()
    (shelf / "model.bin").write_bytes(b"\1" + data[1:])
    with pytest.raises(SystemExit, match=r"error: .*refused and deleted.*model\.bin"):
        run(monkeypatch)
    with pytest.raises(SystemExit, match=r"model\.bin is corrupt"):
        run(monkeypatch, "--from", str(shelf))
    assert [f.name for f in (own_home / meshnet.FOLDER).iterdir()] == ["model.json"]
    with pytest.raises(FedloraError, match=r"run `python data_scripts/weights.py`"):
        meshnet.read_weights()
    with pytest.raises(SystemExit, match="there is no file"):
        run(monkeypatch, "--from", str(shelf / "nowhere"))


def test_a_local_copy_is_read_where_it_lies(
    public: str, shelf: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FedloraError, match="not on this machine"):
        meshnet.folder()
    monkeypatch.setenv("FEDLORA_WEIGHTS_MIRROR", str(shelf.parent))
    assert meshnet.folder() == shelf and len(meshnet.read_weights()[0]) == 4
    assert not own_home.exists()
    run(monkeypatch)  # from now on the cache comes first
    assert meshnet.folder() == own_home / meshnet.FOLDER
