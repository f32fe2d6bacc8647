"""Downloads that go wrong: the real clients of Kaggle and torchvision against a server that plays their part.

The server is reached as a proxy, so no port is fixed and no name is resolved.
"""

import base64
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import runpy
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import DatasetError, fashion_mnist, kaggle
from datasets.images import LOCK, building
from tests.conftest import ROOT

OWNER, SET = "samuelcortinhas", "cats-and-dogs-image-classification"
SECRET = "c0ffee-5ecret"


class Answer(NamedTuple):
    """What the server says to whoever asks for the data."""

    body: bytes = b""
    status: int = 200
    content_type: str = "application/zip"
    missing: int = 0  # bytes that the length announces and that never come
    stalls: bool = False  # ... while the connection stays open
    closes: bool = False  # ... at once, without an answer
    location: str = ""  # what a redirect leads to
    waits_for: threading.Event | None = None


@dataclass
class Server:
    """A proxy that answers everything itself."""

    url: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)  # by the end of the address
    asked: list[tuple[str, str]] = field(default_factory=list)  # address and Authorization
    closing: threading.Event = field(default_factory=threading.Event)

    def environment(self, home: Path) -> dict[str, str]:
        """A user's environment, with credentials, in which Kaggle lies behind this proxy."""
        own = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        return own | {
            "HOME": str(home), "http_proxy": self.url, "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_USERNAME": "somebody", "KAGGLE_KEY": SECRET,
        }  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.asked.append((self.path, self.headers.get("Authorization", "")))
            answer = next((state.answers[end] for end in state.answers if self.path.endswith(end)), Answer(status=404))
            if answer.waits_for is not None:
                answer.waits_for.wait(60)
            if answer.closes:
                return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body) + answer.missing))
            if answer.location:
                self.send_header("Location", answer.location)
            self.end_headers()
            self.wfile.write(answer.body)
            if answer.stalls:
                state.closing.wait(60)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.url = f"http://127.0.0.1:{listening.server_port}"
        threading.Thread(target=listening.serve_forever, args=[0.02], daemon=True).start()
        yield state
        state.closing.set()
        listening.shutdown()


@pytest.fixture
def fetch(server: Server, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run `python -m datasets download` with `data/` elsewhere, in the environment of `server`."""
    program = (
        "import pathlib, runpy, sys, datasets.kaggle\n"
        "datasets.sources.DATA_DIR = pathlib.Path(sys.argv[1])\n"
        "datasets.kaggle.TIMEOUT = 1.5\n"
        "sys.argv = ['datasets', 'download', *sys.argv[2:]]\n"
        "runpy.run_module('datasets', run_name='__main__')\n"
    )

    def run(before: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", before + program, str(tmp_path / "data"), "task1"]
        own = server.environment(tmp_path / "home") | environment
        (tmp_path / "home").mkdir(exist_ok=True)
        return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=100)

    return run


@pytest.fixture
def fetch_here(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Do as `fetch` does in this process, since importing Kaggle's client takes seconds; nothing may sleep."""

    def run(**environment: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "home").mkdir(exist_ok=True)
        own = server.environment(tmp_path / "home") | environment
        for name in set(os.environ) - set(own):
            monkeypatch.delenv(name)
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        for name in [name for name in sys.modules if name.split(".")[0] == "kaggle"]:
            monkeypatch.delitem(sys.modules, name)  # it reads the environment when it is imported
        monkeypatch.setattr("datasets.sources.DATA_DIR", tmp_path / "data")
        monkeypatch.setattr(kaggle, "TIMEOUT", 1.5)
        monkeypatch.setattr(sys, "argv", ["datasets", "download", "task1"])
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept for {seconds} seconds"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_module("datasets", run_name="__main__")
        return subprocess.CompletedProcess(sys.argv, end.value.code or 0, *capfd.readouterr())

    return run


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (12, 16, 3)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    names = [f"{part}/{kind}/{n}.png" for part in ("train", "test") for kind in ("cats", "dogs") for n in range(3)]
    return {name: picture(number) for number, name in enumerate(names)}


def packed(members: dict[str, bytes] | None = None, link: str = "", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive of the published layout, with other members and a symbolic link where they are given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in (pictures() | (members or {})).items():
            archive.writestr(name, content)
        if link:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc")
    return buffer.getvalue()


def with_flipped_bit(archive: bytes, at: int) -> bytes:
    return archive[:at] + bytes([archive[at] ^ 16]) + archive[at + 1 :]


def with_a_lie(archive: bytes, size: int, claimed: int) -> bytes:
    """The archive with one member's unpacked size replaced in both of its headers."""
    assert archive.count(struct.pack("<L", size)) == 2
    return archive.replace(struct.pack("<L", size), struct.pack("<L", claimed))


def in_the_middle_of_a_member(archive: bytes) -> int:
    return archive.index(b"IDAT") + 60


BOMB_SIZE = 101 * 2**20  # bytes, of zeros: packs to 100 kB


@functools.cache
def bomb() -> bytes:
    return packed({"train/cats/bomb.png": bytes(BOMB_SIZE)})


GOOD = packed(method=zipfile.ZIP_STORED)
PAGE = b"<html>Please log in to this network</html>"
ECHO = json.dumps({"code": 401, "message": f"the token {SECRET} is not valid"}).encode()

# what the server says, and what the user then reads
FAULTS = {
    "401": (Answer(status=401), "HTTP 401, the credentials are missing or not valid; .*KAGGLE_API_TOKEN"),
    "401 with the key in it": (Answer(ECHO, 401, "application/json"), "HTTP 401, the credentials are"),
    "403": (Answer(status=403), "HTTP 403, access is refused; accept the data set's rules on its page"),
    "404": (Answer(status=404), "HTTP 404, there is no such data set any more"),
    "429": (Answer(status=429), "HTTP 429, it had too many requests from here; wait some minutes"),
    "503": (Answer(PAGE, 503, "text/html"), "HTTP 503, which says nothing more; try again later"),
    "cut off": (Answer(GOOD[:2000], missing=len(GOOD) - 2000), "the connection broke off .*; run again"),
    "stalled": (Answer(GOOD[:2000], missing=len(GOOD) - 2000, stalls=True), "the connection broke off .*; run again"),
    "web page": (Answer(PAGE, content_type="text/html; charset=utf-8"), "a web page came instead"),
    "no archive": (Answer(PAGE), "cannot be unpacked .File is not a zip file.; run again"),
    "empty": (Answer(), "cannot be unpacked .File is not a zip file.; run again"),
    "truncated": (Answer(GOOD[:-300]), "cannot be unpacked .*; run again"),
    "flipped bit": (Answer(with_flipped_bit(GOOD, in_the_middle_of_a_member(GOOD))),
                    "cannot be unpacked .Bad CRC-32 for file 'train/cats/0.png'.; run again"),
    "climbs out": (Answer(packed({"../../evil": b"x"})), "holds '../../evil', which leads out of its folder"),
    "absolute": (Answer(packed({"/tmp/evil": b"x"})), "holds '/tmp/evil', which leads out of its folder"),
    "link": (Answer(packed(link="train/cats/link")), "holds 'train/cats/link', which leads out of its folder"),
    "bomb": (bomb, r"would unpack to 105,\d{3},\d{3} bytes"),
    "bomb that lies": (lambda: with_a_lie(bomb(), BOMB_SIZE, 10),
                       "cannot be unpacked .Bad CRC-32 for file 'train/cats/bomb.png'.; run again"),
    "another set": (Answer(packed().replace(b"train/", b"trail/")), "unpacks to no train/<class>/ with images"),
}  # fmt: skip


def check_refused(result: "subprocess.CompletedProcess[str]", sentence: str, data: Path) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    message = result.stderr[result.stderr.index("Error: ") :]
    assert re.search(sentence, message), message
    assert message.count("\n") == 1 and "Traceback" not in result.stderr and result.stdout == ""
    assert SECRET not in result.stderr
    assert {path.name for path in data.rglob("*")} <= {LOCK}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_sentence_and_leaves_nothing(fault: str, server: Server, fetch_here, tmp_path: Path) -> None:
    answer, sentence = FAULTS[fault]
    server.answers["DownloadDataset"] = answer if isinstance(answer, Answer) else Answer(answer())
    result = fetch_here()
    check_refused(result, sentence, tmp_path / "data")
    assert f"{SET}" in result.stderr and "Three ways on" in result.stderr
    assert len(server.asked) == 1  # one attempt
    assert not list(tmp_path.rglob("*evil*"))


def downloaded(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_kaggle_serves_is_unpacked_and_the_key_stays_with_kaggle(server: Server, fetch, tmp_path: Path) -> None:
    # as Kaggle does it: the archive lies with another host
    server.answers["DownloadDataset"] = Answer(status=302, location="http://storage.example/archive.zip")
    server.answers["archive.zip"] = Answer(GOOD)
    result = fetch()
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"task1: {tmp_path / 'data' / SET}\n" and "downloading" in result.stderr
    assert downloaded(tmp_path / "data" / SET) == pictures()
    assert {path.name for path in (tmp_path / "data").iterdir()} == {SET, LOCK}
    basic = "Basic " + base64.b64encode(f"somebody:{SECRET}".encode()).decode()
    assert [credentials for _, credentials in server.asked] == [basic, ""]
    assert fetch().returncode == 0 and len(server.asked) == 2


@pytest.mark.parametrize("valid", [True, False])
def test_a_token_is_sent_and_never_shown(valid: bool, server: Server, fetch, tmp_path: Path) -> None:
    account = json.dumps({"active": valid, "username": "somebody"}).encode()
    server.answers["IntrospectToken"] = Answer(account, content_type="application/json")
    server.answers["DownloadDataset"] = Answer(GOOD) if valid else Answer(ECHO, 401, "application/json")
    # with VERBOSE the client prints each request with its headers
    result = fetch(KAGGLE_API_TOKEN=SECRET, KAGGLE_KEY="", KAGGLE_USERNAME="", VERBOSE="1")
    assert result.returncode == (0 if valid else 1), result.stderr
    assert server.asked[-1][1] == f"Bearer {SECRET}"
    assert SECRET not in result.stdout + result.stderr


@pytest.mark.parametrize("token", [f"{SECRET}\nand more", f"{SECRET}–"])
def test_a_token_that_no_header_can_carry(token: str, server: Server, fetch_here, tmp_path: Path) -> None:
    result = fetch_here(KAGGLE_API_TOKEN=token)
    check_refused(result, "check the proxy's address, and the credentials in KAGGLE_API_TOKEN", tmp_path / "data")


def test_no_credentials_are_needed_for_a_public_set(server: Server, fetch_here, tmp_path: Path) -> None:
    server.answers["DownloadDataset"] = Answer(GOOD)
    result = fetch_here(KAGGLE_KEY="", KAGGLE_USERNAME="")
    assert result.returncode == 0 and downloaded(tmp_path / "data" / SET) == pictures()
    assert result.stdout.count("\n") == 1  # not the client's page of advice
    assert server.asked[0][1] == ""


NO_ANSWER = r"no network, or Kaggle does not answer \(\w+\); check the connection and run again"


def test_no_network_and_a_server_that_says_nothing(server: Server, fetch_here, tmp_path: Path) -> None:
    check_refused(fetch_here(http_proxy="http://127.0.0.1:9"), NO_ANSWER, tmp_path / "data")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and that is all
        result = fetch_here(http_proxy=f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.accept()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()  # one attempt
    check_refused(result, NO_ANSWER, tmp_path / "data")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
@pytest.mark.parametrize("full_at", ["download", "unpacking"])
def test_full_disk_names_the_folder(full_at: str, server: Server, fetch, tmp_path: Path) -> None:
    large = {"train/cats/large.png": b"x" * 100_000}
    method = zipfile.ZIP_STORED if full_at == "download" else zipfile.ZIP_DEFLATED
    server.answers["DownloadDataset"] = Answer(packed(large, method=method))
    # a limit on the size of a file stands in for the full disk
    result = fetch(before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n")
    check_refused(result, f"cannot use {tmp_path / 'data'} .File too large.", tmp_path / "data")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_has_no_file_name_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(28)) as error, building(tmp_path / "data" / "set") as partial:
        (partial / "begun").touch()
        Path("/dev/full").write_bytes(b"x")
    assert error.value.filename == str(tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [LOCK]


def test_archives_with_any_bit_flipped_are_refused_or_harmless(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    archive = packed()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number in range(200):
        path, target = tmp_path / "flipped.zip", tmp_path / "deep" / "er" / str(number)
        path.write_bytes(with_flipped_bit(archive, int(rng.integers(len(archive)))))
        try:
            kaggle.unpack(path, target)
        except DatasetError as error:
            assert str(error).startswith("flipped.zip ") and "\n" not in str(error)
        else:
            assert sorted(downloaded(target).values()) == sorted(pictures().values())
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "flipped.zip"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"er"}


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "many.zip").write_bytes(packed())
    monkeypatch.setattr(kaggle, "MAX_MEMBERS", 11)
    with pytest.raises(DatasetError, match="many.zip holds 12 files, more than 11"):
        kaggle.unpack(tmp_path / "many.zip", tmp_path / "many")
    assert not (tmp_path / "many").exists()


def test_processes_that_ask_at_once_download_once(server: Server, tmp_path: Path) -> None:
    release = threading.Event()
    server.answers["DownloadDataset"] = Answer(GOOD, waits_for=release)
    program = (
        "import sys, pathlib; from datasets import images, kaggle; images.SILENT_WAIT = 0.1\n"
        f"kaggle.download({OWNER + '/' + SET!r}, pathlib.Path(sys.argv[1]))"
    )
    target = tmp_path / "data" / SET
    started = []
    for _ in range(3):
        started.append(subprocess.Popen(
            [sys.executable, "-c", program, str(target)], cwd=ROOT, env=server.environment(tmp_path),
            stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
        wait_until(lambda: len(server.asked) == 1)
    waiting = [process.stderr.readline() for process in started[1:]]
    release.set()
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], errors
    assert waiting == [f"waiting for another process that fills {target.parent}; Ctrl-C cancels\n"] * 2
    assert len(server.asked) == 1 and downloaded(target) == pictures()


def test_what_a_killed_process_leaves_is_removed_by_the_next(server: Server, fetch, tmp_path: Path) -> None:
    server.answers["DownloadDataset"] = Answer(GOOD[:2000], missing=len(GOOD) - 2000, stalls=True)
    program = f"import sys, pathlib, datasets.kaggle as k; k.download({OWNER + '/' + SET!r}, pathlib.Path(sys.argv[1]))"
    data = tmp_path / "data"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(data / SET)], cwd=ROOT, env=server.environment(tmp_path)
    )
    wait_until(lambda: any(data.glob(".partial-*/*.zip")))
    process.kill()
    process.wait()
    assert len(list(data.glob(".partial-*"))) == 2 and not (data / SET).exists()
    server.answers["DownloadDataset"] = Answer(GOOD)
    assert fetch().returncode == 0
    assert {path.name for path in data.iterdir()} == {SET, LOCK} and downloaded(data / SET) == pictures()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def garments() -> dict[str, bytes]:
    """Four files as Fashion-MNIST's, of very few images."""
    files = {}
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = np.random.default_rng(count).integers(0, 255, (count, 28, 28)).astype(np.uint8).tobytes()
        labels = bytes(range(count))
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(struct.pack(">4i", 2051, count, 28, 28) + pixels)
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(struct.pack(">2i", 2049, count) + labels)
    return files


GARMENTS = garments()
LAST = "t10k-labels-idx1-ubyte.gz"


@pytest.fixture
def mirror(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """What torchvision is served in place of the published files, and `data/` elsewhere.

    In this process, since importing torchvision takes seconds.
    """
    from torchvision.datasets import FashionMNIST

    checksums = [(name, hashlib.md5(content).hexdigest()) for name, content in GARMENTS.items()]
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://mirror.example/"])
    monkeypatch.setattr(FashionMNIST, "resources", checksums)
    monkeypatch.setattr(fashion_mnist, "TIMEOUT", 1.5)
    monkeypatch.setattr("datasets.sources.DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of its first use
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", server.url)
    server.answers |= {name: Answer(content) for name, content in GARMENTS.items()}
    return server.answers


def test_fashion_mnist_comes_whole(mirror: dict[str, Answer], tmp_path: Path) -> None:
    root = datasets.find(datasets.FashionMNIST())
    assert root == tmp_path / "data" / "FashionMNIST"
    assert {path.name for path in root.parent.iterdir()} == {root.name, LOCK}
    data = fashion_mnist.read(root, root.name)
    assert data.n_pool == 6 and data.labels.tolist() == [*range(6), *range(3)]


@pytest.mark.parametrize(("answer", "sentence"), [
    (Answer(GARMENTS[LAST][:20], missing=len(GARMENTS[LAST]) - 20), f"Error downloading {LAST}.*corrupted"),
    (Answer(with_flipped_bit(GARMENTS[LAST], 15)), f"Error downloading {LAST}.*corrupted"),
    (Answer(PAGE, content_type="text/html"), f"Error downloading {LAST}.*corrupted"),
    (Answer(status=404), "HTTP Error 404"),
    (Answer(GARMENTS[LAST][:20], missing=9, stalls=True), "timed out"),
    (Answer(closes=True), "closed connection without response"),
], ids=["cut off", "flipped bit", "web page", "404", "stalled", "closed"])  # fmt: skip
def test_fashion_mnist_in_part_is_nothing(
    answer: Answer, sentence: str, mirror: dict[str, Answer], server: Server, tmp_path: Path
) -> None:
    mirror[LAST] = answer
    with pytest.raises(DatasetError, match=f"cannot download Fashion-MNIST .*{sentence}.*; check the network") as error:
        datasets.find(datasets.FashionMNIST())
    assert "\n" not in str(error.value)
    assert sum(address.endswith(LAST) for address, _ in server.asked) <= 2  # it looks for redirects first
    assert [path.name for path in (tmp_path / "data").rglob("*")] == [LOCK]
    assert socket.getdefaulttimeout() is None


def test_fashion_mnist_without_network(mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(DatasetError, match="cannot download Fashion-MNIST .*Connection refused.*; check the network"):
        datasets.find(datasets.FashionMNIST())
    assert [path.name for path in (tmp_path / "data").rglob("*")] == [LOCK]
