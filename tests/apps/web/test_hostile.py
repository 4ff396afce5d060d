"""The page's server, asked as another site's page or a hostile client would ask it. A real server throughout."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from webserver import Server, serve

from fastdit.apps.web import uploads

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'fastdit[ui]'")
MB = 1 << 20
HEAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s.png"\r\n\r\n'
TYPE = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("hostile") / "out", "--max-upload", 2, "--max-uploads", 5) as found:
        yield found


def stored(server: Server) -> int:
    return sum(path.stat().st_size for path in (server.out / ".served").rglob("*") if path.is_file())


def upload(server: Server, name: bytes, size: int, **headers: str) -> tuple[int, bytes]:
    body = HEAD % name + name + bytes(size - len(name)) + b"\r\n--x--\r\n"
    try:
        asked = urllib.request.Request(f"{server.url}/gradio_api/upload", body, TYPE | headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def connected(server: Server) -> socket.socket:
    return socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=60)


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/openapi.json", "openapi.json", "docs", "gradio_api/proxy=http://127.0.0.1:1/", "monitoring",
        "manifest.json", "pwa_icon", "gradio_api/runs", "gradio_api/deep_link", "gradio_api/vibe-code", "gradio_api/dev/reload",
        "gradio_api/run/generate", "gradio_api/stream/a/b/c/playlist.m3u8", "custom_component/a/b/c/d",
    ],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_served(server: Server, path: str) -> None:
    for method in ("GET", "POST"):
        link = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        link.request(method, f"/{path}", b"" if method == "POST" else None)
        answer = link.getresponse()
        assert (answer.status, answer.read()) == (404, b"not found"), path
        assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_uploads_are_bounded_in_all(server: Server) -> None:
    """First what breaks off, says no length, or is another site's: none of it stays. Then what is right, until it is full."""
    before = stored(server)
    with connected(server) as line:
        length = 2 * MB
        line.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nHost: {urlsplit(server.url).netloc}\r\n".encode())
        line.sendall(f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\n\r\n".encode())
        line.sendall(HEAD % b"broken" + bytes(MB))
        time.sleep(1)
    with connected(server) as line:
        line.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nHost: {urlsplit(server.url).netloc}\r\n".encode())
        line.sendall(b"Content-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 411 ")
    assert upload(server, b"foreign", 1000, Origin="http://evil.example")[0] == 403
    assert upload(server, b"large", 3 * MB)[0] == 413
    assert stored(server) == before
    answers = [upload(server, b"%d" % i, MB) for i in range(8)]
    assert [status for status, _ in answers] == [200] * 4 + [507] * 4
    assert b"in an hour" in answers[-1][1]
    assert stored(server) - before == 4 * MB
    for path in json.loads(answers[0][1]):
        assert Path(path).is_relative_to(server.out / ".served")


def test_old_uploads_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> None: ...

    limit = uploads.Uploads(nothing, MB, 3 * MB)
    now = 10_000.0
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now)
    for age, name in ((7000, "oldest"), (4000, "old"), (10, "new")):
        (tmp_path / name).write_bytes(bytes(MB))
        limit.kept[tmp_path / name] = now - age
    assert limit._room(MB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert limit._room(2 * MB)
    assert not limit._room(2 * MB + 1)  # the new one is kept
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
