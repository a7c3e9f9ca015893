"""Every test gets an empty cache of its own and no local copy of the real data, unless it asks for `real_data`."""

import os
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

MIRROR = os.environ.get("FEDLORA_DATA_MIRROR")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("FEDLORA_HOME", str(home))
    monkeypatch.delenv("FEDLORA_DATA_MIRROR", raising=False)
    return home


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    if not MIRROR or not Path(MIRROR).is_dir():
        pytest.skip("FEDLORA_DATA_MIRROR does not name a folder with the real data sets")
    monkeypatch.setenv("FEDLORA_DATA_MIRROR", MIRROR)
    return Path(MIRROR)


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    """Three small clean sites of 12 numbered PNG frames (24 x 32, colour) with 0/255 discs as masks."""
    rng = np.random.default_rng(0)
    for site in ("north", "south", "east"):
        for i in range(12):
            write_pair(tmp_path / "hospitals" / site, f"{i // 3}_frame{i}", rng)
    return tmp_path / "hospitals"


def write_pair(site: Path, stem: str, rng: np.random.Generator, shape: tuple[int, int] = (24, 32)) -> None:
    (site / "images").mkdir(parents=True, exist_ok=True)
    (site / "masks").mkdir(parents=True, exist_ok=True)
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    y, x = np.indices(shape)
    disc = (y - shape[0] / 2) ** 2 + (x - rng.uniform(8, shape[1] - 8)) ** 2 < 36
    Image.fromarray(image).save(site / "images" / f"{stem}.png")
    Image.fromarray((disc * 255).astype(np.uint8)).save(site / "masks" / f"{stem}.png")


class Server:
    """A loopback web server of one body, which can drop connections, ignore Range, or fail."""

    def __init__(self) -> None:
        self.body = b""
        self.drop_after: list[int | None] = []  # bytes to send on the first, second ... connection; None = all
        self.honour_range = True
        self.status: int | None = None
        self.ranges: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/archive.zip"
        self.thread = Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.honour_range else 0
        if self.status:
            request.send_error(self.status)
            return
        if start >= len(self.body) > 0:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.body)}")
            request.end_headers()
            return
        rest = self.body[start:]
        request.send_response(206 if asked and self.honour_range else 200)
        if asked and self.honour_range:
            request.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        most = self.drop_after.pop(0) if self.drop_after else None
        request.wfile.write(rest if most is None else rest[:most])


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


@pytest.fixture
def pair_writer() -> Callable[..., None]:
    return write_pair
