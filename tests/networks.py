"""Small networks of every family, their losses, and what perturbed copies of their weights give."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from zofed.core import estimators, metrics, perturbed
from zofed.core.deferred_logits import DEFER_FROM
from zofed.core.digests import named_parameters
from zofed.core.estimators import Estimate, FiniteDifference, Parameters
from zofed.core.kinds import Kind
from zofed.models.scopes import trainable_names

KINDS: tuple[Kind, ...] = ("rank1", "rank4", "rademacher", "gaussian")

EPSILON = 3e-4

SEEDS = [3, 1, 4, 15, 9]

Loss = Callable[[], Tensor]


def batched_losses(
    loss: Loss, parameters: Parameters, epsilon: float, copies: int, seeds: Sequence[int] = SEEDS, kind: Kind = "rank1"
) -> Tensor:
    """Losses at both ends of each direction, many copies in one pass."""
    return perturbed.losses(loss, parameters, kind, seeds, (epsilon, -epsilon), copies)


def moved_losses(loss: Loss, parameters: Parameters, epsilon: float, kind: Kind = "rank1") -> Tensor:
    """The same with weights that are really moved, one after the other."""
    return estimators.materialised_losses(loss, parameters, kind, SEEDS, (epsilon, -epsilon))


def two_point(
    loss: Loss, parameters: Parameters, kind: Kind, seeds: Sequence[int], epsilon: float, copies: int
) -> Estimate:
    return FiniteDifference(kind, epsilon, perturbations_per_pass=copies).slopes(loss, parameters, seeds)


class Plain(nn.Module):
    """What no library interception expects: a convolution, a parameter used twice, products, sums, a scalar, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 5, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.randn(5))
        self.start = nn.Parameter(torch.randn(1, 1, 5))
        self.twice = nn.Linear(5, 5)
        self.mix = nn.Parameter(torch.randn(5, 5))
        self.head = nn.Linear(5, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2) * self.scale
        x = torch.cat([self.start.expand(len(ids), -1, -1), x], dim=1)
        x = torch.tanh(self.twice(x)) + F.linear(self.twice(x), self.twice.weight.T) + 1e-1 * x @ self.mix
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids.flatten())


def randomised(model: nn.Module, size: float = 0.2) -> nn.Module:
    """Weights of ordinary size everywhere, so that no perturbation hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if parameter.dim() == 1 else size * drawn)
    return model.eval()


def ids_of(shape: tuple[int, ...], vocabulary: int, lowest: int = 0) -> Tensor:
    return torch.randint(lowest, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def language_model(model: PreTrainedModel, shape: tuple[int, int]) -> tuple[nn.Module, Loss]:
    model.config.use_cache = False
    ids = ids_of(shape, model.config.vocab_size)
    return randomised(model), lambda: metrics.loss_of(model, {"input_ids": ids, "labels": ids})


def classifier(model: PreTrainedModel, lengths: Sequence[int], classes: int) -> tuple[nn.Module, Loss]:
    """A batch of documents of different lengths, padded on the right."""
    model.config.use_cache = False
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = ids_of((len(lengths), max(lengths)), model.config.vocab_size, lowest=1) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths)) % classes}
    return randomised(model), lambda: metrics.loss_of(model, batch)


def gpt2_config(**more: Any) -> GPT2Config:
    sizes: dict[str, Any] = {"vocab_size": 61, "n_layer": 2, "n_head": 3, "n_embd": 15, "n_positions": 16}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | more
    return GPT2Config(**sizes)


def llama_config(**more: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaConfig(**sizes | {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2} | more)


def causal_models(positions: int) -> dict[str, Callable[[], PreTrainedModel]]:
    """Language models that read the shipped tokenizer's ids."""
    return {
        "gpt2": lambda: GPT2LMHeadModel(gpt2_config(vocab_size=512, n_embd=12, n_positions=positions)),
        "llama": lambda: LlamaForCausalLM(
            llama_config(vocab_size=512, tie_word_embeddings=True, max_position_embeddings=positions)
        ),
    }


def save_bases(folder: Path, kinds: Mapping[str, Callable[[], PreTrainedModel]], tokenizer: Any) -> Path:
    """Folders of small models with their tokenizer, by their kinds."""
    for name, make in kinds.items():
        model: Any = randomised(make())
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def gpt2() -> tuple[nn.Module, Loss]:
    return language_model(GPT2LMHeadModel(gpt2_config()), (3, 7))


def gpt2_one_token_batch() -> tuple[nn.Module, Loss]:
    return language_model(GPT2LMHeadModel(gpt2_config(vocab_size=13, n_embd=3, n_layer=1)), (1, 2))


def gpt2_classifier() -> tuple[nn.Module, Loss]:
    return classifier(GPT2ForSequenceClassification(gpt2_config(num_labels=3)), [5, 9, 1, 7], 3)


def llama() -> tuple[nn.Module, Loss]:
    config = llama_config()
    return language_model(LlamaForCausalLM(config), (2, 9))


def bert() -> tuple[nn.Module, Loss]:
    classes: dict[str, Any] = {"num_labels": 2}
    config = BertConfig(
        vocab_size=47,
        hidden_size=18,
        intermediate_size=25,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        pad_token_id=0,
        **classes,
    )
    return classifier(BertForSequenceClassification(config), [6, 3, 8], 2)


def plain() -> tuple[nn.Module, Loss]:
    model, ids = randomised(Plain(), 0.5), ids_of((3, 5), 11, lowest=1)  # autograd would skip the padding row
    return model, lambda: model(ids)


MODELS = {
    "gpt2": gpt2,
    "gpt2 one token": gpt2_one_token_batch,
    "gpt2 classifier": gpt2_classifier,
    "llama": llama,
    "bert": bert,
    "plain": plain,
}


def trained(model: nn.Module, scope: str) -> Parameters:
    parameters = named_parameters(model)
    return {name: parameters[name] for name in trainable_names(model, scope)}


def bits_of(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


LARGE_VOCABULARY = DEFER_FROM + 3


def logits_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The cross-entropy of a library's model without its conversion to float32."""
    labels, inputs = batch["labels"], {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def batch_of(name: str, vocabulary: int) -> dict[str, Tensor]:
    if name in ("bert", "gpt2 classifier"):
        mask = (torch.arange(8) < torch.tensor([6, 3, 8])[:, None]).long()
        ids = ids_of((3, 8), vocabulary, lowest=1) * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0])}
    ids = ids_of((2, 7), vocabulary)
    return {"input_ids": ids, "labels": ids}


def gpt2_large_vocabulary() -> tuple[nn.Module, Loss]:
    return language_model(GPT2LMHeadModel(gpt2_config(vocab_size=LARGE_VOCABULARY, n_layer=1)), (2, 7))


SMOOTH = {name: MODELS[name] for name in ("gpt2", "llama", "bert", "gpt2 classifier", "plain")} | {
    "gpt2 large vocabulary": gpt2_large_vocabulary
}


def smooth(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Loss]:
    """A model in float64, and its loss in float64."""
    model, loss = SMOOTH[name]()
    model.to(dtype)
    if name == "plain":
        return model, loss
    assert isinstance(model, PreTrainedModel)
    batch = batch_of(name, model.config.vocab_size)
    return model, lambda: logits_loss(model, batch)


def relative(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).abs() / wanted.abs()).max())


class Pooled(nn.Module):
    """A classifier of padded documents that looks at the mask by arithmetic alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        heads = (x.unsqueeze(1), self.inner(x).unsqueeze(1), x.unsqueeze(1))
        x = F.scaled_dot_product_attention(*heads, attn_mask=attention_mask[:, None, None, :].bool()).squeeze(1)
        weights = attention_mask.unsqueeze(-1).to(x)
        return self.head((x * weights).sum(1) / weights.sum(1))


def padded_documents(queries: int, vocabulary: int) -> dict[str, Tensor]:
    """Three documents for each query, of different lengths; the masks differ from query to query."""
    lengths = torch.arange(queries * 3).reshape(queries, 3) % 6 + 2
    mask = (torch.arange(7) < lengths[..., None]).long()
    ids = ids_of((queries, 3, 7), vocabulary, lowest=1) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": (lengths + ids[..., 0]) % 2}


VOCABULARY = 512

GPT2 = GPT2Config(vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=16, n_positions=32, bos_token_id=0, eos_token_id=0)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}

LLAMA, BERT = LlamaConfig(**_SHAPE), BertConfig(**_SHAPE)
