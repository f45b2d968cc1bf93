"""What a model can read: how long a block, which tokens, and no token that it should predict."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.core import candidates, metrics, packed
from zofed.data import encoding
from zofed.data.encoding import Document, Examples
from zofed.data.tokenizers import PROBE
from zofed.models import virtual_tokens
from zofed.models.classifier import PooledClassifier

SHORTEST = 2  # tokens of a block


class Unreadable(UserError):  # noqa: N818
    """Documents hold what the model cannot read; more of them would not help."""


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of an embedding that holds every id of the tokenizer; more than it counts where ids are left out."""
    return 1 + max(tokenizer.get_vocab().values())


def rows(config: Any) -> int | None:
    """Rows of a model's token embedding, by its config; None where it does not tell."""
    found = getattr(config.get_text_config(), "vocab_size", None)
    return found if isinstance(found, int) and found > 0 else None


def positions(model: nn.Module) -> int | None:
    """Tokens of the longest text that a model's config allows, virtual ones not counted; None: no limit."""
    longest = _positions(model)
    return longest if longest is None else longest - virtual_tokens.tokens(model)


def _positions(model: nn.Module) -> int | None:
    config: Any = model.config
    declared = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(declared, int) or declared <= 0:  # -1: XLNet's word for no limit
        return None
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and len(getattr(module, "weight", ())) == declared != rows(config):
            return declared - padding - 1  # a table of positions with an entry for padding counts from behind it
    return declared


def check_positions(model: nn.Module, name: str, block_size: int) -> None:
    """Raise UserError for a block longer than the positions the model's config allows."""
    longest = positions(model)
    if longest is not None and block_size > longest:
        raise _too_long(name, block_size, longest)


def check_virtual(model: nn.Module, name: str, block_size: int, *, is_fixed: bool) -> None:
    """Raise UserError where virtual tokens and a block are together more than a model's positions, or than the window
    of attention that some of its layers have.

    is_fixed: whether the tokens' number is that of a folder.
    """
    virtual, places, window = virtual_tokens.tokens(model), _positions(model), attention_window(model.config)
    room = min((limit for limit in (places, window) if limit is not None), default=None)
    if room is None or block_size + virtual <= room:
        return
    what = "positions" if room == places else "tokens of the window that layers"
    fit = room - block_size
    remedies = [f"block-size to {room - virtual} or less"] * (room - virtual >= SHORTEST)
    remedies += [f"virtual-tokens to {fit} or less"] * (fit > 0 and not is_fixed)
    raise UserError(
        f"block-size = {block_size} and {virtual} virtual tokens are more than the {room} {what} of model {name}"
        f"{'' if room == places else ' see'}: set {', or '.join(remedies) or 'adapter to lora'}"
    )


@torch.no_grad()
def check_reads(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, block_size: int, labels: int) -> None:
    """Let the model score examples of the run's length. Raises UserError naming the longest that it can, if any.

    No config tells this for every kind of model: where positions begin, what a classifier wants at a text's end.
    """
    config: Any = model.config
    limit = rows(config)

    def fails(size: int) -> Exception | None:
        try:
            examples = _examples(tokenizer, size, labels, limit)
            if isinstance(model, PooledClassifier):  # whose encoder is what reads
                model.encoder(**{name: examples[name] for name in ("input_ids", "attention_mask")})
            else:
                metrics.evaluate(model, examples, len(examples["labels"]))
        except (MemoryError, torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # whatever its layers raise
            return error
        return None

    if labels and needs_end(config):
        check_ends(_examples(tokenizer, block_size, labels, limit), tokenizer, config, name)
    if (error := fails(block_size)) is None:
        return
    if fails(SHORTEST) is not None:
        raise UserError(
            f"model {name!r} ({type(model).__name__}) does not run on token ids alone ({said_by(error)}): "
            f"give a model such as {'BERT, GPT-2 or Llama' if labels else 'GPT-2 or Llama'}"
        ) from error
    longest, failing = SHORTEST, block_size
    while failing - longest > 1:
        middle = (longest + failing) // 2
        longest, failing = (longest, middle) if fails(middle) else (middle, failing)
    raise _too_long(name, block_size, longest) from error


@torch.no_grad()
def check_causal(model: nn.Module, name: str) -> None:
    """Refuse a model that reads the future, such as BERT: it would copy each next token instead of predicting it."""
    first, second = (model(input_ids=torch.tensor([[0, token]])).logits[0, 0] for token in (0, 1))
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"model {name!r} ({type(model).__name__}) sees the tokens it should predict, so it is no language model: "
            "set task to classification, or to prompt with [MASK] in the template, or give a causal model such as "
            "GPT-2 or Llama"
        )


def check_packs(model: nn.Module, name: str) -> None:
    """Refuse a model that would let packed conversations see one another."""
    if packed.leaks(model):
        raise UserError(
            f"model {name!r} ({type(model).__name__}) lets packed conversations see one another: set packing to false"
        )


@torch.no_grad()
def check_prompts(model: nn.Module, name: str, block_size: int, *, is_masked: bool) -> None:
    """Refuse a model whose scores of several candidates in one pass are not those of a pass for each of them.

    Such are models without attention masks or positions, or with a window of attention shorter than the block.
    """
    kind = type(model).__name__
    window = None if is_masked else attention_window(model.config)
    if window is not None and block_size > window:
        raise UserError(
            f"block-size = {block_size} is longer than the window of {window} tokens that layers of model {name!r} "
            f"({kind}) see, which prompts with candidates do not keep to: set block-size to {window} or less"
        )
    ids, mask = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    words = torch.tensor([[[0, 1], [1, candidates.NO_TOKEN]]] * 2)
    batch = {"input_ids": ids, "attention_mask": mask, candidates.KEY: words}
    if is_masked:
        batch |= {
            "attention_mask": mask.flip(1),
            candidates.PLACE: torch.tensor([1, 1]),
            candidates.KEY: words[..., :1],
        }
    try:
        found = candidates.scores(model, batch)
        wanted = _one_by_one(model, batch)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever its layers raise
        raise UserError(
            f"model {name!r} ({kind}) does not score candidates of a prompt in one pass ({said_by(error)}): give a "
            "model such as GPT-2 or Llama, or BERT with [MASK] in the template"
        ) from error
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"model {name!r} ({kind}) gives candidates other scores in one pass than one by one, so it has no "
            "attention mask of its own for each: give a model such as GPT-2 or Llama"
        )


def _one_by_one(model: nn.Module, batch: Examples) -> Tensor:
    """What `candidates.scores` must give, from a plain pass for each example and candidate."""
    found = torch.empty(batch[candidates.KEY].shape[:2])
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        prompt = ids[mask > 0]
        for number, word in enumerate(batch[candidates.KEY][row]):
            word = word[word != candidates.NO_TOKEN]
            if candidates.PLACE in batch:
                logs = model(input_ids=prompt[None]).logits[0].log_softmax(-1)
                found[row, number] = logs[batch[candidates.PLACE][row], word[0]]
            else:
                logs = model(input_ids=torch.cat([prompt, word])[None]).logits[0].log_softmax(-1)
                found[row, number] = logs[len(prompt) - 1 : -1].gather(1, word[:, None]).mean()
    return found


def attention_window(config: Any) -> int | None:
    """Tokens that layers with a sliding window, or chunks, of attention see, by a model's config; None: no limit."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    slides = kinds is None or any("sliding" in kind or "chunked" in kind for kind in kinds)
    windows = [getattr(text, key, None) for key in ("sliding_window", "attention_chunk_size")]
    if not slides or getattr(text, "use_sliding_window", True) is False:
        return None
    return min((window for window in windows if isinstance(window, int) and window > 0), default=None)


def check_tokens(tokens: Examples, tokenizer: PreTrainedTokenizerBase, config: Any, name: str, *, at_end: bool) -> None:
    """Raise UserError where a model of this config cannot read these documents' tokens.

    A tokenizer may have more entries than the embedding has rows, as long as no document uses them. config: None where
    it is not known, or measured by the tokenizer. at_end: whether a class is read at the end token, where it can be.
    """
    if config is None:
        return
    if at_end and needs_end(config):
        check_ends(tokens, tokenizer, config, name)
    limit, ids = rows(config), tokens["input_ids"]
    if limit is None or int(ids.max()) < limit:
        return
    written = ids[ids != tokenizer.pad_token_id]
    highest = int(written.max()) if len(written) else -1
    is_padding = highest < limit  # then padding alone is above
    highest = int(ids.max()) if is_padding else highest
    token = tokenizer.convert_ids_to_tokens(highest)
    told = f"the tokenizer has {entries(tokenizer)} entries but model {name} only {limit}"
    if is_padding:
        raise Unreadable(
            f"{told}, and it pads with {token!r}, id {highest}: set the pad_token in its tokenizer_config.json to a "
            f"token below {limit}"
        )
    raise Unreadable(
        f"{told}: set tokenizer to the one the model was made with, or take {token!r}, id {highest}, out of the "
        "documents"
    )


def needs_end(config: Any) -> bool:
    """Whether a classifier of this config reads each document's class at its end token: encoder-decoders do."""
    return bool(config.is_encoder_decoder) and isinstance(config.eos_token_id, int)


def check_ends(examples: Examples, tokenizer: PreTrainedTokenizerBase, config: Any, name: str) -> None:
    """Raise UserError where not every document has the end token, and equally often, at which its class is read."""
    counts = (examples["input_ids"] == config.eos_token_id).sum(1)
    fewest, most = int(counts.min()), int(counts.max())
    if fewest == most > 0:
        return
    end = f"{tokenizer.convert_ids_to_tokens(config.eos_token_id)!r}, id {config.eos_token_id}"
    told = f"model {name!r} reads a document's class at the end token {end}"
    if config.eos_token_id == tokenizer.pad_token_id:
        raise Unreadable(f"{told}, with which this tokenizer also pads: give one whose pad_token is another")
    if fewest == 0:
        raise Unreadable(f"{told}, which this tokenizer does not write: set tokenizer to the model's own")
    raise Unreadable(
        f"{told}, but some documents have {fewest} of it and some {most}: take its text out of the documents"
    )


def _examples(tokenizer: PreTrainedTokenizerBase, size: int, labels: int, limit: int | None) -> Examples:
    """Two examples of a run: of documents one short, one as long as can be."""
    long = " ".join([PROBE] * size)
    if labels:
        found = encoding.classification_examples([Document(PROBE, "", 0), Document(long, "", 1)], tokenizer, size)
    else:
        found = encoding.language_model_examples([Document(long, "")] * 2, tokenizer, size)
        found = {name: tensor[:1] for name, tensor in found.items()}
    if limit:  # which tokens the run's own documents use is looked at there
        ids = found["input_ids"].clamp(max=limit - 1)
        found["input_ids"], found["labels"] = ids, found["labels"] if labels else ids
    return found


def _too_long(name: str, block_size: int, longest: int) -> UserError:
    return UserError(
        f"block-size = {block_size} is longer than the {longest} positions of model "
        f"{name}: set block-size to {longest} or less"
    )
