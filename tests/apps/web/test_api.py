"""The page as programs meet it: clients that wait, vanish, and try what they should not. A real server throughout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from util import decode, environment
from webserver import Server, serve

from fastdit.apps.render import manifest

client = pytest.importorskip("gradio_client", reason="the page needs Gradio: pip install 'fastdit[ui]'")
DOCS = Path(__file__).parents[3] / "docs" / "web.md"
TINY = {"frames": 5, "height": 32, "width": 32, "steps": 2, "api_name": "/generate"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("api") / "out", "--max-each", 2, "--max-steps", 200) as found:
        yield found


def connect(url: str, **more: Any) -> Any:
    """A client that does not give up on a busy machine."""
    return client.Client(url, verbose=False, httpx_kwargs={"timeout": 60}, **more)


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def login(server: Server, name: str, password: str) -> int:
    form = urllib.parse.urlencode({"username": name, "password": password}).encode()
    try:
        with urllib.request.urlopen(f"{server.url}/login", form, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def raw(server: Server, *values: Any) -> str:
    """What the server answers to a call that no client library has looked at."""
    body = json.dumps({"data": list(values)}).encode()
    sent = urllib.request.Request(f"{server.url}/gradio_api/call/generate", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent, timeout=60) as answer:
            event = json.load(answer)["event_id"]
    except urllib.error.HTTPError as error:
        return f"{error.code}"
    return get(f"{server.url}/gradio_api/call/generate/{event}")[1].decode()


def test_example_of_the_documentation(server: Server, tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    assert code is not None
    script = code[1].replace("http://127.0.0.1:7860", server.url)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "step 4 of 4" in run.stdout
    path = Path(run.stdout.splitlines()[-1].split()[0])
    assert decode(path).shape == (9, 64, 64, 3)


def test_every_step_is_told_and_the_record_is_the_manifests(server: Server) -> None:
    job = connect(server.url).submit("a red circle", seed=5, **TINY)
    said = list(job)
    assert said[0]["state"] == "waiting"
    assert [one["clip"] for one in said[:-1]] == [None] * (len(said) - 1)
    record = said[-1]["record"]
    assert record == manifest.read(server.out)[record["job"]]
    assert Path(said[-1]["clip"]).read_bytes() == (server.out / record["file"]).read_bytes()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (["x" * 10_000], "10000 characters"), (["a", "", "embedded model", "balanced", -5], "frames must be positive"),
        (["a", "", "embedded model", "balanced", 8], "nearest is 9"), (["a", "", "/etc"], "no model"),
        (["a", "", "embedded model", "../../etc"], "unknown preset"), ([{"path": "/etc/passwd"}], "prompt must be text"),
        (["a", "", "embedded model", "balanced", float("nan")], "whole number"), ([None], "no prompt"),
        (["a", "", "embedded model", "balanced", 5, 32, 32, 10**9], "200 at most"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(server: Server, values: list[Any], named: str) -> None:
    usual = ["a", "", "embedded model", "balanced", 5, 32, 32, 2, 3.0, 0]
    before = manifest.read(server.out)
    answer = raw(server, *values, *usual[len(values) :])
    assert re.search(named, answer), answer
    assert manifest.read(server.out) == before


def test_files_elsewhere_are_not_served(server: Server) -> None:
    secret = server.out.parent / "secret.txt"
    secret.write_text("do not tell")
    served = server.out / ".served"
    for path in (
        secret, "/etc/passwd", served / ".." / ".." / secret.name, server.out / manifest.FILE, Path("README.md"),
        "%2e%2e/%2e%2e/etc/passwd", f"{served}/..%2f..%2f{secret.name}",
    ):  # fmt: skip
        status, content = get(f"{server.url}/gradio_api/file={path}")
        assert status in (400, 403, 404), path
        assert b"do not tell" not in content
        assert b"root:" not in content
    assert get(server.url, Host="evil.example")[0] == 400  # a name that was made to point here


def test_uploads_that_are_too_large_are_refused(server: Server) -> None:
    edge = b"--x\r\n"
    head = edge + b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    sent = urllib.request.Request(
        f"{server.url}/gradio_api/upload", head + bytes(21 * 2**20) + b"\r\n--x--\r\n",
        {"Content-Type": "multipart/form-data; boundary=x"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(sent, timeout=60)
    assert refused.value.code == 413


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}],
)
def test_another_sites_page_is_refused(server: Server, headers: dict[str, str]) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nfull\r\n--x--\r\n'
    sent = urllib.request.Request(
        f"{server.url}/gradio_api/upload", form, {"Content-Type": "multipart/form-data; boundary=x"} | headers
    )
    before = sorted((server.out / ".served").rglob("*"))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(sent, timeout=60)
    assert refused.value.code == 403
    assert sorted((server.out / ".served").rglob("*")) == before
    assert get(f"{server.url}/config", **headers)[0] == 403


def test_a_link_may_lead_here_and_no_frame_shows_the_page(server: Server) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert get(server.url, **link)[0] == 200
    assert get(server.url, **link | {"Sec-Fetch-Dest": "iframe"})[0] == 403
    assert get(f"{server.url}/config", Origin=server.url)[0] == 200
    assert get(f"{server.url}/config", **{"Sec-Fetch-Site": "same-origin", "Origin": server.url})[0] == 200
    with urllib.request.urlopen(server.url, timeout=60) as answer:
        assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_client_that_vanishes_frees_its_place(server: Server) -> None:
    code = (
        "import sys; from gradio_client import Client\n"
        f"client = Client({server.url!r}, verbose=False)\n"
        "job = client.submit('a', frames=33, height=64, width=64, steps=200, api_name='/generate')\n"
        "for said in job: print(said['step'], flush=True)"
    )
    gone = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert gone.stdout is not None
    while int(gone.stdout.readline()) < 2:
        pass
    gone.kill()
    gone.wait()
    start = time.monotonic()
    found = connect(server.url).predict("a red circle", seed=9, **TINY)
    assert found["record"]["state"] == "done"
    assert time.monotonic() - start < 60
    assert not any(record["settings"]["steps"] == 200 for record in manifest.read(server.out).values())


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_clients_at_once_are_all_served_in_order(server: Server, count: int) -> None:
    clients = [connect(server.url) for _ in range(count)]
    jobs = []
    for seed, each in enumerate(clients):
        jobs.append(each.submit("a green square", seed=1000 * count + seed, **TINY))
        assert next(iter(jobs[-1]))["state"] == "waiting"  # it has come before the next one
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda job: job.result(timeout=300), jobs))
    assert all(one["state"] == "done" for one in found)
    order = [record["seed"] for record in manifest.read(server.out).values() if record["seed"] >= 1000 * count]
    assert order == [1000 * count + seed for seed in range(count)]


def test_one_user_may_not_fill_the_queue(server: Server) -> None:
    one = connect(server.url)
    sizes = TINY | {"frames": 17, "steps": 30}
    jobs = [one.submit("a blue circle", seed=seed, **sizes) for seed in range(2)]
    next(iter(jobs[0]))
    next(iter(jobs[1]))
    with pytest.raises(client.exceptions.AppError, match="2 clips waiting already"):
        one.predict("a blue circle", seed=3, **TINY)
    assert [job.result()["state"] for job in jobs] == ["done", "done"]


def test_names_and_folders_of_their_own(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("ada:one\ncy:two\n")
    with serve(tmp_path / "out", "--auth", users) as server:
        assert get(f"{server.url}/gradio_api/file=/etc/passwd")[0] == 401
        assert get(f"{server.url}/config")[0] == 401
        with pytest.raises(Exception, match=r"(?i)auth|login|credential"):
            connect(server.url, auth=("ada", "two"))
        with ThreadPoolExecutor(4) as pool:  # guessed at once, and answered one by one; nobody else waits for it
            start = time.monotonic()
            guesses = [pool.submit(login, server, "ada", f"guess {i}") for i in range(4)]
            time.sleep(0.3)
            assert login(server, "cy", "two") == 200
            assert time.monotonic() - start < 3
            assert [guess.result() for guess in guesses] == [400] * 4
            assert time.monotonic() - start >= 4
        for name, password in (("ada", "one"), ("cy", "two")):
            made = connect(server.url, auth=(name, password)).predict("a red circle", **TINY)
            assert (server.out / name / made["record"]["file"]).is_file()
        assert not list(server.out.glob("*.mp4"))
        assert list((server.out / ".served").rglob("*.mp4"))
    assert not list((tmp_path / "out" / ".served").rglob("*.mp4"))  # nor does a copy stay when the server ends
