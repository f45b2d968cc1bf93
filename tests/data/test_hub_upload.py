"""What `--push` sends to a hub that listens on this machine alone, and what it says where the hub does not take it."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, constants

from zofed.base.errors import UserError
from zofed.data import hub_upload
from zofed.training import central

TOKEN = "hf_good"
COMMIT = "1" * 40
LARGE = ".safetensors"  # what the hub keeps apart from git


@dataclass
class Repository:
    """Of the fake hub."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"* text\n"})


class FakeHub(BaseHTTPRequestHandler):
    """What an upload asks of the hub. Its one user is `me`, with one token."""

    repositories: dict[str, Repository]
    large: dict[str, bytes]
    commits: list[str]

    def _answer(self, body: Any, status: int = 200, **headers: str) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _is_refused(self, name: str = "me/") -> bool:
        """Whether the token is not one, or may not write there; then that is answered."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "no"}, 401, X_Error_Message="Invalid credentials in Authorization header")
        elif not name.startswith("me/"):
            self._answer({"error": "no"}, 403, X_Error_Message="You have no write permission")
        else:
            return False
        return True

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if self._is_refused():
            return
        if parts == ["api", "whoami-v2"]:
            return self._answer({"name": "me", "type": "user", "orgs": [{"name": "group"}]})
        name = "/".join(parts[2:4])
        found = self.repositories.get(name)
        if not found:
            return self._answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        self._answer({"id": name, "sha": COMMIT, "private": found.private, "siblings": list(self._siblings(found))})

    def _siblings(self, found: Repository) -> Iterator[dict[str, Any]]:
        for path, content in found.files.items():
            sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            is_large = path.endswith(LARGE)
            yield {"rfilename": path, "blobId": "0" * 40 if is_large else sha1, "lfs": large if is_large else None}

    def do_POST(self) -> None:
        parts, raw = self.path.split("?")[0].strip("/").split("/"), self._read()
        if parts == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(raw)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if self._is_refused(name):
                return
            is_new = name not in self.repositories
            self.repositories.setdefault(name, Repository(asked.get("visibility") == "private"))
            return self._answer({"url": f"{self._address}/{name}", "error": ""}, 200 if is_new else 409)
        if self._is_refused():
            return
        name = "/".join(parts[2:4])
        if parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = [{"path": one["path"], "shouldIgnore": False} for one in json.loads(raw)["files"]]
            modes = [one | {"uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular"} for one in files]
            return self._answer({"files": modes})
        if parts[-2:] == ["objects", "batch"]:
            objects = [
                one | {"actions": {"upload": {"href": f"{self._address}/put/{one['oid']}"}}}
                for one in json.loads(raw)["objects"]
            ]
            return self._answer({"objects": objects, "transfer": "basic"})
        assert parts[:2] == ["api", "models"] and parts[4] == "commit"
        files = self.repositories[name].files
        for line in map(json.loads, raw.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        self.commits.append(name)
        self._answer({"commitUrl": f"{self._address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:
        self.large[self.path.rpartition("/")[2]] = self._read()
        self._answer({})

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeHub]]:
    """A hub without repositories, which this process takes for the hub, with the right token."""
    handler = type("Handler", (FakeHub,), {"repositories": {}, "large": {}, "commits": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()  # its connections are those of another environment
    yield handler
    server.shutdown()
    huggingface_hub.close_session()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags: [zofed]\n---\n\n# a model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (folder / "config.json").write_text("{}")
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("is_public", [False, True])
def test_all_files_arrive_in_one_commit(fake_hub: type[FakeHub], files: Path, is_public: bool) -> None:
    hub_upload.check("me/model", is_public=is_public)
    assert fake_hub.repositories == {}
    assert hub_upload.push(files, "me/model", is_public=is_public) == f"{constants.ENDPOINT}/me/model"
    found = fake_hub.repositories["me/model"]
    assert found.private != is_public
    assert {name: held for name, held in found.files.items() if name != ".gitattributes"} == content_of(files)
    assert fake_hub.commits == ["me/model"]


def test_files_that_are_there_are_no_mistake_and_others_are(fake_hub: type[FakeHub], files: Path) -> None:
    hub_upload.push(files, "me/model", is_public=False)
    before = dict(fake_hub.repositories["me/model"].files)
    hub_upload.push(files, "me/model", is_public=False)
    for name in ("config.json", "model.safetensors"):
        held = (files / name).read_bytes()
        (files / name).write_bytes(held + b" ")
        with pytest.raises(
            UserError, match=rf"me/model holds {name} already, which is not that of this export: choose"
        ):
            hub_upload.push(files, "me/model", is_public=False)
        (files / name).write_bytes(held)
    fake_hub.repositories["me/model"].files["other.bin"] = b"other"
    with pytest.raises(
        UserError, match=r"holds other\.bin already.* hf upload me/model \S+ --private sends them later"
    ):
        hub_upload.push(files, "me/model", is_public=False)
    assert fake_hub.repositories["me/model"].files == before | {"other.bin": b"other"}


@pytest.mark.parametrize(
    ("private", "is_public", "told"), [(True, True, "leave out --public"), (False, False, "add --p")]
)
def test_who_sees_a_repository_does_not_change_by_the_way(
    fake_hub: type[FakeHub], private: bool, is_public: bool, told: str
) -> None:
    fake_hub.repositories["me/model"] = Repository(private)
    with pytest.raises(UserError, match=told):
        hub_upload.check("me/model", is_public=is_public)
    hub_upload.check("me/model", is_public=not is_public)


def test_a_token_that_is_missing_wrong_or_anothers_is_told(
    fake_hub: type[FakeHub], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="'model' is no hub id: give OWNER/NAME"):
        hub_upload.check("model", is_public=False)
    with pytest.raises(UserError, match="--push others/model: the token writes for me, group: choose one of them"):
        hub_upload.check("others/model", is_public=False)
    hub_upload.check("Group/model", is_public=False)
    with pytest.raises(UserError, match="choose an owner in place of others for whom the token may write"):
        hub_upload.push(files, "others/model", is_public=False)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    for call in (lambda: hub_upload.check("me/model", is_public=False),
                 lambda: hub_upload.push(files, "me/model", is_public=False)):  # fmt: skip
        with pytest.raises(UserError, match="run hf auth login again, or set HF_TOKEN") as caught:
            call()
        assert "\n" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no token of the hub is here: run hf auth login, or set HF_TOKEN"):
        hub_upload.check("me/model", is_public=False)
    assert fake_hub.repositories == {}


def test_without_a_network_the_files_stay_and_the_command_for_them_is_told(
    fake_hub: type[FakeHub], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"check the network$"):
        hub_upload.check("me/model", is_public=False)
    with pytest.raises(UserError, match=f"check the network; the files lie in {files}, and hf upload me/model"):
        hub_upload.push(files, "me/model", is_public=False)
    assert content_of(files)


def test_a_hub_that_fails_half_way_is_told(
    fake_hub: type[FakeHub], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(hub: FakeHub) -> None:
        hub._read()
        hub._answer({"error": "no"}, 403)

    monkeypatch.setattr(fake_hub, "do_PUT", refuse)
    with pytest.raises(UserError, match="choose an owner in place of me") as caught:
        hub_upload.push(files, "me/model", is_public=False)
    assert "\n" not in str(caught.value) and fake_hub.commits == []


@pytest.mark.slow
def test_an_export_goes_to_the_hub_by_one_command(
    fake_hub: type[FakeHub], quick: Callable[..., Any], tmp_path: Path
) -> None:
    central.train(quick(steps=3), tmp_path / "run", lambda row: None)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    given = {"HF_ENDPOINT": constants.ENDPOINT, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "zofed", "export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *words]
        return subprocess.run(start, env=kept | given, capture_output=True, text=True, check=False)

    done = command("--delta-rank", "4", "--push", "others/adapter")
    assert done.returncode == 2 and "the token writes for me, group" in done.stderr
    assert not (tmp_path / "out").exists()
    done = command("--delta-rank", "4", "--push", "me/adapter")
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {constants.ENDPOINT}/me/adapter" in done.stdout
    found = fake_hub.repositories["me/adapter"]
    assert found.private and {".gitattributes": b"* text\n"} | content_of(tmp_path / "out") == found.files
    assert ModelCard(found.files["README.md"].decode()).data.library_name == "peft"
