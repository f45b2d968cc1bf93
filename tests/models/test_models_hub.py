"""Hub models: found in the cache, pinned by commit, fetched by one command, refused in one line."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import zofed
from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.digests import weights_digest
from zofed.data import encoding, hub
from zofed.models import sources, spec
from zofed.runs.run_folder import RunFolder
from zofed.training import central
from zofed.training.finalize import replay_run

ID = "some-owner/small.model-1"
FIRST, SECOND = "1" * 40, "2" * 40
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
SHAPE: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64} | TOKENS


def write_model(folder: Path, seed: int, vocabulary: int = 512) -> None:
    """A saved model with its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **SHAPE)).save_pretrained(folder)
    encoding.load_tokenizer("shipped").save_pretrained(folder)


def point(repository: Path, ref: str, commit: str) -> None:
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one model of two commits, laid out as the library does; main is the first of them."""
    root = tmp_path / "hub"
    repository = root / "models--some-owner--small.model-1"
    for seed, commit in enumerate((FIRST, SECOND)):
        write_model(repository / "snapshots" / commit, seed)
    point(repository, "main", FIRST)
    point(repository, "better", SECOND)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return repository


def settings(**values: Any) -> Settings:
    return config.resolve({"device": "cpu", "block-size": 16, "model": ID} | values)


def digest_of(folder: Path) -> str:
    return weights_digest(spec.create_model(settings(model=str(folder)), encoding.load_tokenizer("shipped")))


@pytest.mark.first(2)
@pytest.mark.parametrize(("revision", "commit"), [("", FIRST), ("better", SECOND), (SECOND, SECOND), (FIRST, FIRST)])
def test_a_revision_names_a_commit_and_its_weights(cache: Path, revision: str, commit: str) -> None:
    chosen = settings(revision=revision)
    assert sources.commit(chosen.model, chosen.revision) == commit
    model = spec.create_model(chosen, encoding.load_tokenizer(spec.tokenizer_name(chosen)))
    assert weights_digest(model) == digest_of(cache / "snapshots" / commit)
    assert spec.tokenizer_name(chosen) == str(cache / "snapshots" / commit)
    info = zofed.get_model_info(ID, revision=revision, modes=("zo",))
    assert (info.revision, info.entries, info.vocabulary, info.positions) == (commit, 512, 512, 64)


def test_a_run_records_its_commit_and_replays_after_main_moved(
    cache: Path, quick: Callable[..., Settings], tmp_path: Path
) -> None:
    summary = central.train(quick(model=ID, steps=3), tmp_path / "run", lambda row: None)
    folder = RunFolder.open(tmp_path / "run")
    assert folder.settings().revision == FIRST
    assert summary["base"] == {"model": ID, "revision": FIRST, "weights": digest_of(cache / "snapshots" / FIRST)}
    point(cache, "main", SECOND)
    assert replay_run(folder)[0].digest() == summary["digest"]
    assert central.resume(folder.path, lambda row: None)["digest"] == summary["digest"]


def test_a_run_whose_commit_holds_other_weights_now_does_not_go_on(
    cache: Path, quick: Callable[..., Settings], tmp_path: Path
) -> None:
    central.train(quick(model=ID, steps=3), tmp_path / "run", lambda row: None)
    shutil.rmtree(cache / "snapshots" / FIRST)
    write_model(cache / "snapshots" / FIRST, seed=9)
    with pytest.raises(UserError, match=r"began with another .*weights"):
        central.resume(tmp_path / "run", lambda row: None)


def test_a_folder_of_that_name_comes_before_the_hub(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / ID, seed=5)
    monkeypatch.chdir(tmp_path)
    chosen = settings()
    assert sources.commit(chosen.model, chosen.revision) == ""
    model = spec.create_model(chosen, encoding.load_tokenizer("shipped"))
    assert weights_digest(model) == digest_of(tmp_path / ID)


def without_weights(repository: Path) -> None:
    (repository / "snapshots" / FIRST / "model.safetensors").unlink()


def pickled(repository: Path) -> None:
    folder = repository / "snapshots" / FIRST
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(repository)


def with_code(repository: Path) -> None:
    folder = repository / "snapshots" / FIRST
    (folder / "own.py").write_text(f"open({str(repository / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    written = json.loads((folder / "config.json").read_text())
    written |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(written))


def of_another_model(repository: Path) -> None:
    folder = repository / "snapshots" / FIRST
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"] = torch.zeros(64, 24)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_small_vocabulary(repository: Path) -> None:
    shutil.rmtree(repository / "snapshots" / FIRST)
    write_model(repository / "snapshots" / FIRST, seed=0, vocabulary=100)


def unreferenced(repository: Path) -> None:
    shutil.rmtree(repository / "refs")


@pytest.mark.parametrize(
    ("spoil", "model", "revision", "told"),
    [
        (None, "some-owner/other", "", r"'some-owner/other' is no folder.*run zofed models download some-owner/other$"),
        (None, ID, "v2", rf"at revision 'v2' .* download {ID} --revision v2, or set revision to a commit that is: "),
        (unreferenced, ID, "", rf"download {ID}, or set revision to a commit that is: [12]{{40}}, [12]{{40}}"),
        (None, "tiny", "main", "revision = 'main': model 'tiny' is not of the hub.*leave revision out"),
        (None, "20m", "", "did you mean '20M'"),
        (
            None,
            "gpt2",
            "",
            "^model 'gpt2' is openai-community/gpt2 on the hub: zofed models download openai-comm",
        ),
        (None, "owner/name/more", "", "unknown model 'owner/name/more'"),
        (without_weights, ID, "", f"hub model '{ID}' at {FIRST} holds no weights"),
        (pickled, ID, "", f"hub model '{ID}' at {FIRST} holds only the pickle 'pytorch_model.bin'"),
        (with_code, ID, "", "code of its own, which zofed does not run"),
        (of_another_model, ID, "", r"transformer\.wpe\.weight of shape \(64, 24\), but \(64, 16\)"),
        (with_small_vocabulary, ID, "", "tokenizer has 512 entries but model .* only 100: set tokenizer"),
    ],
)
def test_a_hub_model_that_cannot_be_used_is_refused_before_anything_is_written(
    cache: Path,
    quick: Callable[..., Settings],
    tmp_path: Path,
    spoil: Callable[[Path], None] | None,
    model: str,
    revision: str,
    told: str,
) -> None:
    if spoil:
        spoil(cache)
    with pytest.raises(UserError, match=told) as caught:
        central.train(quick(model=model, revision=revision, tokenizer=""), tmp_path / "run", lambda row: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() and not (cache / "ran").exists()


def test_what_needs_no_download_is_listed(cache: Path) -> None:
    pickled_too = cache.parent / "models--some-owner--old" / "snapshots" / FIRST
    pickled_too.mkdir(parents=True)
    (pickled_too / "config.json").write_text("{}")
    (pickled_too / "pytorch_model.bin").write_bytes(b"")
    assert zofed.list_available_models() == ["tiny", "20M", "200M", "500M", "1B", "sample", ID]


# --- download, from a hub that listens on this machine alone ----------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """The three answers of the hub that a download needs: a commit's files, their tree, their bytes."""

    folder: Path
    fetched: list[str]

    def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": FIRST, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) == ID and parts[-1] in ("main", FIRST):
            if "tree" in parts:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self._answer(json.dumps(entries).encode())
            siblings = [{"rfilename": name} for name in files]
            return self._answer(json.dumps({"id": ID, "sha": FIRST, "siblings": siblings}).encode())
        if parts[:1] == ["api"]:
            code = "RevisionNotFound" if "/".join(parts[2:4]) == ID else "RepoNotFound"
            return self._answer(b"{}", 404, X_Error_Code=code)
        content = files[parts[-1]]
        if self.command == "GET":
            self.fetched.append(parts[-1])
        return self._answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815, names the server looks for

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def fake_hub(tmp_path: Path) -> Iterator[tuple[str, type[FakeHub]]]:
    """Address of a hub that has one model with a pickle, a README and code beside what zofed wants."""
    write_model(tmp_path / "served", seed=3)
    for name in ("pytorch_model.bin", "README.md", "own.py"):
        (tmp_path / "served" / name).write_bytes(b"unwanted")
    handler = type("Handler", (FakeHub,), {"folder": tmp_path / "served", "fetched": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def command(endpoint: str, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    given = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"} | environment
    code = "from zofed.commands.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=kept | given, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_download_fetches_what_is_wanted_and_nothing_else(
    fake_hub: tuple[str, type[FakeHub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, handler = fake_hub
    done = command(endpoint, tmp_path / "new", "models", "download", ID)
    assert done.returncode == 0, done.stderr
    assert f"--model {ID} --revision {FIRST}" in done.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(handler.fetched)
    assert not {"pytorch_model.bin", "README.md", "own.py"} & set(handler.fetched)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "new"))  # from here on without any hub
    model = zofed.create_model(ID)
    assert weights_digest(model) == digest_of(tmp_path / "served")
    (hub.snapshot(ID) / "model.safetensors").unlink()  # a download that was cut short
    with pytest.raises(UserError, match="not whole in the hub's cache: run zofed models download"):
        zofed.create_model(ID)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((ID, "--revision", "nowhere"), "choose another --revision"),
        (("some-owner/other",), "check its name"),
        (("gpt2",), "'gpt2' is no hub id: give OWNER/NAME"),
    ],
)
def test_a_download_that_cannot_be_is_refused_in_one_line(
    fake_hub: tuple[str, type[FakeHub]], tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    done = command(fake_hub[0], tmp_path / "new", "models", "download", *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert told in done.stderr and arguments[0] in done.stderr


@pytest.mark.slow
def test_a_model_of_pickles_is_not_downloaded(fake_hub: tuple[str, type[FakeHub]], tmp_path: Path) -> None:
    endpoint, handler = fake_hub
    (handler.folder / "model.safetensors").unlink()
    done = command(endpoint, tmp_path / "new", "models", "download", ID)
    assert done.returncode == 2
    assert "holds only the pickle 'pytorch_model.bin'" in done.stderr and "safetensors" in done.stderr
    assert handler.fetched == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "told"),
    [({}, "check the network"), ({"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE")],
)
def test_a_download_without_a_network_is_refused_in_one_line(
    tmp_path: Path, environment: dict[str, str], told: str
) -> None:
    done = command("http://127.0.0.1:9", tmp_path / "new", "models", "download", ID, **environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert told in done.stderr
