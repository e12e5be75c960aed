"""The downloader against a small hub on loopback: selection, sizes, refusals, resumed transfers."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

import pytest

from dojo import download

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_notARealTokenButSecret"


class FakeHub(ThreadingHTTPServer):
    """Serves `files` under the addresses of the hub and of GitHub's raw files.

    `breaks` holds how many bytes the next transfers send before the connection is cut; a file of
    more than `stall_after` bytes stops there, with the connection open.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []
        self.stall_after: int | None = None
        self.stall_over = threading.Event()
        self.refuse_files = 0  # an HTTP status for every file
        self.refuse_listing = 0  # and for the listing
        self.ignore_range = False
        self.redirect = False  # to storage under another host name, as the hub does
        self.tokens: set[tuple[str, str | None]] = set()
        self.gets: list[tuple[str, str | None]] = []  # path and Range of every file transfer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class FakeHubHandler(BaseHTTPRequestHandler):
    server: FakeHub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int) -> None:
        self.answer(status, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.tokens.add((path.split("/")[1], self.headers.get("Authorization")))
        if path.startswith("/storage/"):
            self.file(path.removeprefix("/storage/"))
            return
        if path.startswith("/api/"):
            self.listing(path)
            return
        name = path.split(f"/{COMMIT}/")[-1].split("/main/")[-1]
        if self.server.refuse_files:
            self.refuse(self.server.refuse_files)
        elif name not in self.server.files:
            self.answer(404)
        elif self.server.redirect:
            port = self.server.server_address[1]
            storage = f"http://localhost:{port}/storage/{name}"
            self.answer(302, headers={"Location": storage})
        else:
            self.file(name)

    def listing(self, path: str) -> None:
        files = self.server.files
        if self.server.refuse_listing:
            self.refuse(self.server.refuse_listing)
        else:
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": git_hash(data), **lfs(name, data)}
                for name, data in files.items()
            ]
            info = {"id": "some/thing", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def stall(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.answer(status, body, headers)
        self.wfile.flush()
        self.close_connection = True
        self.server.stall_over.wait(240)

    def file(self, name: str) -> None:
        data = self.server.files[name]
        wanted = self.headers.get("Range")
        start = 0
        if wanted and not self.server.ignore_range:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        headers = {
            "Content-Length": str(len(data) - start),
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        status = 206 if start else 200
        if self.command == "GET":
            self.server.gets.append((name, wanted))
            if self.server.breaks:
                body = body[: self.server.breaks.pop(0)]
                self.close_connection = True
            elif self.server.stall_after is not None and len(body) > self.server.stall_after:
                self.stall(status, body[: self.server.stall_after], headers)
                return
        self.answer(status, body, headers)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs(name: str, data: bytes) -> dict[str, object]:
    """What the hub adds for a file of weights."""
    if name.endswith(".json"):
        return {}
    return {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.stall_over.set()
    server.shutdown()
    server.server_close()


def start(hub: FakeHub, root: Path, *arguments: str) -> subprocess.Popen[str]:
    """In a process of its own: huggingface_hub reads its environment once, on import."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(root / "home"),
        "HF_TOKEN": TOKEN,
        "DOJO_GITHUB_RAW": hub.url,
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "dojo.download", "--root", str(root), *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(hub: FakeHub, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(hub, root, *arguments)
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_only_the_needed_files_of_a_model_are_selected() -> None:
    names = [
        "model_index.json",
        "sd3.5_medium.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
        "text_encoder_3/model.safetensors.index.fp16.json",
        "tokenizer_3/spiece.model",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
    ]
    entry = download.BY_NAME["sd35-medium"]
    assert download.select(names, entry.allow, entry.ignore) == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
        "tokenizer_3/spiece.model",
        "transformer/diffusion_pytorch_model.safetensors",
        # Nothing safe in its folder: the pickle stays, to be read with weights_only.
        "vae/diffusion_pytorch_model.bin",
    ]


def test_include_narrows_a_data_set() -> None:
    names = ["data/train-0.parquet", "data/validation_unique-0.parquet", "README.md"]
    chosen = download.select(names, ("*",), (), ("data/validation_unique*",))
    assert chosen == ["data/validation_unique-0.parquet"]


def test_every_entry_has_its_own_folder_below_models_or_datas() -> None:
    folders = [entry.folder for entry in download.ENTRIES]
    assert len(set(folders)) == len(folders)
    for entry in download.ENTRIES:
        assert entry.folder.startswith("datas/" if entry.kind == "dataset" else "models/")
        assert entry.licence


def test_no_name_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert download.main([]) == 0
    printed = capsys.readouterr().out
    for entry in download.ENTRIES:
        assert entry.name in printed
        assert entry.licence in printed


def test_an_unknown_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        download.main(["sd15", "nonsense"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "nonsense" in message
    assert "pick-a-pic-v2" in message


def test_modelscope_is_asked_for_what_the_folder_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> None:
        asked.update(name=name, **options)

    module = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setattr(download.importlib, "import_module", lambda name: module)

    def fetched(entry: str, *names: str) -> list[str]:
        download.fetch_modelscope(download.BY_NAME[entry], tmp_path, ())
        return [
            name
            for name in names
            if any(fnmatch(name, one) for one in asked["allow_patterns"])
            and not any(fnmatch(name, one) for one in asked["ignore_patterns"])
        ]

    shard = "text_encoder/pytorch_model-00001-of-00007.bin"
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    whole = "unet/diffusion_pytorch_model.safetensors"
    pickle = "vae/diffusion_pytorch_model.fp16.bin"
    assert fetched("kolors", shard, half, whole, pickle) == [shard, half]
    assert asked["name"] == "Kwai-Kolors/Kolors"
    pickles = ["t2i/model/pytorch_model_ema.pt", "t2i/mt5/pytorch_model.bin"]
    pickles += ["t2i/sdxl-vae-fp16-fix/diffusion_pytorch_model.bin"]
    others = ["t2i/model/pytorch_model_module.pt", "dialoggen/pytorch_model.bin"]
    assert fetched("hunyuandit", *pickles, *others) == pickles
    assert fetched("sd35-medium", "text_encoder/pytorch_model.bin", "vae/config.json") == [
        "vae/config.json"
    ]


def test_no_token_is_blamed_that_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "get_token", lambda: "hf_x")
    error = HTTPError("http://localhost", 403, "no", HTTPMessage(), None)
    homes = ("kolors", "geneval-detector")  # a hub's, and an address of the web
    said = {name: download.explain(download.BY_NAME[name], error) for name in homes}
    assert {name for name, text in said.items() if "the token that was sent" in text} == {"kolors"}


def test_modelscope_is_refused_where_no_place_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        download.main(["--source", "modelscope", "naruto"])
    assert stopped.value.code == 2
    assert "--source hf" in capsys.readouterr().err


def test_dry_run_asks_the_hub_for_the_size_and_fetches_nothing(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.files = {
        "config.json": b"{}",
        "model.safetensors": b"x" * 1998,
        "pytorch_model.bin": b"y" * 10**6,
    }
    result = run(hub, tmp_path, "--dry_run", "clip-vit-l-14")
    assert result.returncode == 0, result.stderr
    assert "2.0 kB in 2 files" in result.stdout
    assert "licence" in result.stdout
    assert not hub.gets
    assert not (tmp_path / "models").exists()


def test_a_download_that_was_killed_is_resumed_inside_the_file(
    hub: FakeHub, tmp_path: Path
) -> None:
    data = os.urandom(3_000_000)
    hub.files = {"config.json": b"{}", "model.safetensors": data, "other.h5": b"no"}
    target = tmp_path / download.BY_NAME["clip-vit-l-14"].folder
    part = target / "model.safetensors.part"

    hub.stall_after = 2_000_000
    first = start(hub, tmp_path, "clip-vit-l-14")
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    arrived = part.stat().st_size
    assert 0 < arrived <= 2_000_000
    assert not (target / "model.safetensors").exists()

    hub.stall_after = None
    hub.stall_over.set()
    hub.gets.clear()
    second = run(hub, tmp_path, "clip-vit-l-14")
    assert second.returncode == 0, second.stderr
    assert (target / "model.safetensors").read_bytes() == data
    assert (target / "config.json").read_bytes() == b"{}"
    assert not (target / "other.h5").exists()
    assert not part.exists()
    assert hub.gets == [("model.safetensors", f"bytes={arrived}-")]
    assert TOKEN not in second.stdout + second.stderr


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}"}
    hub.redirect = True
    result = run(hub, tmp_path, "clip-vit-l-14")
    assert result.returncode == 0, result.stderr
    seen = dict(hub.tokens)
    assert seen.pop("storage") is None
    assert set(seen.values()) == {f"Bearer {TOKEN}"}


def test_a_file_name_that_climbs_out_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {"../../outside.json": b"{}"}
    result = run(hub, tmp_path, "clip-vit-l-14")
    assert result.returncode == 1
    assert "leaves its folder" in result.stderr
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_how_to_get_in_and_never_prints_the_token(
    hub: FakeHub, tmp_path: Path, status: int
) -> None:
    hub.files = {"model_index.json": b"{}", "transformer/config.json": b"{}"}
    hub.refuse_files = status
    result = run(hub, tmp_path, "sd35-medium")
    assert result.returncode == 1
    assert "accept" in result.stderr
    assert "HF_TOKEN" in result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stdout + result.stderr


def test_a_repository_that_is_gone_is_one_sentence(hub: FakeHub, tmp_path: Path) -> None:
    hub.refuse_listing = 404
    result = run(hub, tmp_path, "naruto")
    assert result.returncode == 1
    assert "404" in result.stderr
    assert "Traceback" not in result.stderr


def raw(hub: FakeHub, data: bytes) -> tuple[str, download.File]:
    file = download.File("a+b.pth", len(data), f"sha256:{sha256(data)}")
    hub.files = {file.name: data}
    return f"{hub.url}/some/where/main/a%2Bb.pth", file


def test_a_broken_raw_file_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    url, file = raw(hub, data)
    target = tmp_path / "heads" / file.name
    hub.breaks = [100_000, 0]
    with pytest.raises(download.DownloadError, match="goes on from there"):
        download.fetch_file(url, target, file, attempts=1)
    assert target.with_name("a+b.pth.part").stat().st_size == 100_000
    assert not target.exists()

    download.fetch_file(url, target, file, attempts=1)
    assert target.read_bytes() == data
    assert hub.gets[-1] == ("a+b.pth", "bytes=100000-")
    assert not target.with_name("a+b.pth.part").exists()

    before = len(hub.gets)
    download.fetch_file(url, target, file, attempts=1)
    assert len(hub.gets) == before, "a whole file was fetched again"


def test_a_file_that_was_changed_here_is_kept_beside_the_hubs(hub: FakeHub, tmp_path: Path) -> None:
    url, file = raw(hub, b"the hub's")
    target = tmp_path / file.name
    target.write_text("mine")
    download.fetch_file(url, target, file, attempts=1)
    assert target.read_bytes() == b"the hub's"
    assert (tmp_path / "a+b.kept.pth").read_text() == "mine"


def test_a_server_that_ignores_the_range_sends_everything_anew(
    hub: FakeHub, tmp_path: Path
) -> None:
    data = os.urandom(200_000)
    url, file = raw(hub, data)
    target = tmp_path / file.name
    hub.ignore_range = True
    hub.breaks = [70_000]
    download.fetch_file(url, target, file, attempts=2, pause=0)
    assert target.read_bytes() == data


def test_a_raw_file_with_the_wrong_content_is_never_accepted(hub: FakeHub, tmp_path: Path) -> None:
    url, file = raw(hub, b"right" * 100)
    hub.files[file.name] = b"wrong" * 100
    target = tmp_path / file.name
    with pytest.raises(download.DownloadError, match="announced"):
        download.fetch_file(url, target, file, attempts=2, pause=0)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_raw_file_is_not_asked_for_again(hub: FakeHub, tmp_path: Path) -> None:
    url, file = raw(hub, b"data")
    hub.files = {}
    with pytest.raises(HTTPError, match="404"):
        download.fetch_file(url, tmp_path / file.name, file, attempts=5, pause=10)


def test_a_download_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    plan = download.Plan(download.BY_NAME["naruto"], (download.File("huge.parquet", 10**18),))
    with pytest.raises(download.DownloadError, match="free"):
        download.check_space(plan, tmp_path / "datas" / "huge")


def test_a_file_of_the_web_is_known_by_the_beginning_of_its_hash(tmp_path: Path) -> None:
    entry = download.BY_NAME["geneval-detector"]
    plan = download.make_plan(entry, "hf", ())
    (file,) = plan.files
    address = download.address_of(plan, file)
    assert address.startswith("https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2")
    assert address.endswith(f"/{file.name}")
    assert f"-{(file.checksum or '').removeprefix('sha256:')}.pth" in file.name
    (tmp_path / "file").write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    assert download.is_right(tmp_path / "file", f"sha256:{digest[:8]}")
    assert not download.is_right(tmp_path / "file", "sha256:743b7d99")
