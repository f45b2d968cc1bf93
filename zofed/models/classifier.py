"""A classifier of three parts: an encoder, a way to pool its token vectors into one, a linear layer on top.

Where the encoder is frozen, what the linear layer reads never changes: `features` computes it once for each document,
and every later pass runs the linear layer alone. The model still holds its encoder, so that digests, replay and saving
are those of any other model.
"""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.devices import input_device
from zofed.core.digests import named_parameters

Pooling = Literal["mean", "pooler", "last-token"]
POOLINGS: tuple[Pooling, ...] = ("mean", "pooler", "last-token")

HEAD_FILE = "classifier.safetensors"  # beside the encoder's files: 'weight' (classes, width), 'bias' (classes,)

_DOCUMENTS_AT_ONCE = 64
_SECONDS_BETWEEN_WORDS = 5.0


@dataclass(frozen=True, slots=True)
class Output:
    """loss: mean cross-entropy in nats, float32 scalar; logits: (n, classes)."""

    loss: Tensor
    logits: Tensor


class PooledClassifier(nn.Module):
    """encoder: a Hugging Face model without a head, whose output has `last_hidden_state`.

    is_frozen: only the linear layer may train. The linear layer's weights are not set yet. Raises UserError for an
    encoder that cannot be pooled so.
    """

    def __init__(self, encoder: Any, pooling: Pooling, classes: int, is_frozen: bool) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.pooling, self.is_frozen = pooling, is_frozen
        self.classifier = nn.Linear(self._width(), classes, device="meta").to_empty(device="cpu")

    @torch.no_grad()
    def _width(self) -> int:
        kind = type(self.encoder).__name__
        ids = torch.zeros(1, 2, dtype=torch.int64)
        try:
            output = self.encoder.eval()(input_ids=ids)  # no mask, whose values an outline does not have
        except (ValueError, TypeError, RuntimeError) as error:  # of encoder-decoders, image models and the like
            raise UserError(
                f"pooling = {self.pooling!r}: {kind} does not run on token ids alone: "
                "give a model such as BERT, GPT-2 or Llama"
            ) from error
        if self.pooling == "pooler" and getattr(output, "pooler_output", None) is None:
            raise UserError(
                f"pooling = 'pooler': {kind} has no pooler (BERT, RoBERTa and ELECTRA's kin may have one): "
                "set pooling to mean or last-token"
            )
        return output.last_hidden_state.shape[-1]

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One vector a document, (n, width), from token ids and mask, int64 (n, tokens)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling == "pooler":
            return output.pooler_output
        hidden = output.last_hidden_state
        attention_mask = attention_mask.to(hidden.device)
        if self.pooling == "mean":
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * places).argmax(1)
        return hidden.gather(1, last.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)

    def get_input_embeddings(self) -> nn.Module:
        """Those of the encoder, as a model of the library says which they are."""
        return self.encoder.get_input_embeddings()

    def forward(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Output:
        """Of token ids and mask, or of `features`, float32 (n, width), that `features` computed; labels int64 (n,)."""
        if features is None:
            assert input_ids is not None and attention_mask is not None
            features = self.pool(input_ids, attention_mask)
        logits = self.classifier(features.to(self.classifier.weight.dtype))
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return Output(F.cross_entropy(exact, labels.to(exact.device)), logits)

    def may_train(self, scope: str) -> dict[str, nn.Parameter]:
        """The parameters a scope chooses from: those of the linear layer where the encoder is frozen, else all used.

        Raises UserError for a scope that asks for parts of a frozen encoder.
        """
        if self.is_frozen and re.fullmatch(r"reduced|norms|last-\d+", scope):
            raise UserError(
                f"scope = {scope!r}: of a frozen encoder only the head trains; set scope to full or head, "
                "or freeze-encoder to false"
            )
        unused = ("encoder.",) if self.is_frozen else () if self.pooling == "pooler" else ("encoder.pooler.",)
        return {name: tensor for name, tensor in named_parameters(self).items() if not name.startswith(unused)}


def check(settings: Settings) -> None:
    """Raise UserError where a setting of classifiers is given to a language model."""
    if settings.task == "classification":
        return
    if settings.freeze_encoder:
        raise UserError("freeze-encoder = true, but a language model has no encoder: set task to classification")
    if settings.pooling != "auto":
        raise UserError(
            f"pooling = {settings.pooling!r}, but a language model pools nothing: set task to classification"
        )


@torch.no_grad()
def features(model: PooledClassifier, tokens: Mapping[str, Tensor]) -> Tensor:
    """What the linear layer reads of each document: float32 (n, width), on the CPU.

    tokens: 'input_ids' and 'attention_mask', int64 (n, block), padded on the right. Documents of similar length share
    a pass, which is cut to the longest of them; long work tells how far it is.
    """
    device = input_device(model)
    lengths = tokens["attention_mask"].sum(1)
    found = torch.empty(len(lengths), model.classifier.in_features)
    for some in _with_words(lengths.argsort(stable=True)):
        longest = max(1, int(lengths[some].max()))
        ids, mask = (tokens[name][some, :longest].to(device) for name in ("input_ids", "attention_mask"))
        found[some] = model.pool(ids, mask).float().cpu()
    return found


def _with_words(order: Tensor) -> Iterator[Tensor]:
    told, done = time.monotonic(), 0
    for some in order.split(_DOCUMENTS_AT_ONCE):
        yield some
        done += len(some)
        if time.monotonic() - told > _SECONDS_BETWEEN_WORDS:
            told = time.monotonic()
            print(f"features of {done:,} of {len(order):,} documents", flush=True)


def save_head(model: PooledClassifier, folder: Path) -> None:
    """The linear layer, and how it wants the encoder pooled, beside the encoder's own files."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.classifier.named_parameters()}
    save_file(tensors, folder / HEAD_FILE, {"format": "pt", "pooling": model.pooling})


def saved_pooling(folder: Path) -> Pooling | None:
    """How a folder that `save_head` wrote to wants its encoder pooled; None where there is no such head."""
    return _read(folder)[0] if (folder / HEAD_FILE).is_file() else None


def saved_classes(folder: Path) -> int:
    """How many classes the head in a folder that `save_head` wrote to has; 0 where there is no such head."""
    return len(_read(folder)[1]["bias"]) if (folder / HEAD_FILE).is_file() else 0


@torch.no_grad()
def load_head(model: PooledClassifier, folder: Path) -> None:
    """Set the linear layer to the one `save_head` wrote. Raises UserError where it was made for something else."""
    pooling, tensors = _read(folder)
    if pooling != model.pooling:
        raise UserError(
            f"pooling = {model.pooling!r}, but the head in {str(folder / HEAD_FILE)!r} was trained for {pooling}: "
            "set pooling to auto, or take a copy of the folder without that file"
        )
    for name, parameter in model.classifier.named_parameters():
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"{str(folder / HEAD_FILE)!r} holds {name} of shape {tuple(tensors[name].shape)}, but "
                f"{tuple(parameter.shape)} is needed: give data of as many classes as it has"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise UserError(f"{str(folder / HEAD_FILE)!r} holds values that are not finite: give an undamaged copy")
        parameter.copy_(tensors[name])


def _read(folder: Path) -> tuple[Pooling, dict[str, Tensor]]:
    try:
        with safe_open(folder / HEAD_FILE, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in ("weight", "bias")}
            named = (opened.metadata() or {}).get("pooling", "")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(folder / HEAD_FILE)!r} cannot be read ({error}): give an undamaged copy") from error
    for pooling in POOLINGS:
        if pooling == named:
            return pooling, tensors
    raise UserError(f"{str(folder / HEAD_FILE)!r} names the pooling {named!r}, not {', '.join(POOLINGS)}: save anew")
