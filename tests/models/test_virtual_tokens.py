"""Virtual tokens: prompt and prefix tuning as peft's, in every mode, saved and gone on with, padding without effect."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from federations import federate, ignore, records_of
from networks import causal_models, randomised, save_bases
from torch import Tensor, nn
from trainings import WAYS
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import candidates, packed, perturbed
from zofed.core.digests import named_parameters, weights_digest
from zofed.core.estimators import materialised_losses
from zofed.data import encoding
from zofed.models import adapter_files, adapters, spec
from zofed.models.spec import ModelSpec
from zofed.models.virtual_tokens import Virtual
from zofed.runs.run_folder import RunFolder
from zofed.training import asking, central, export, scoring
from zofed.training.finalize import replay_run

Quick = Callable[..., Settings]
pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ("prefix", "prompt")
COUNT = 3
SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16}
KINDS: dict[str, Callable[[], PreTrainedModel]] = causal_models(positions=128) | {
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24, max_position_embeddings=128,
                  word_embed_proj_dim=16)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=4)),
}  # fmt: skip
IDS = torch.arange(3, 19).view(2, 8)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return encoding.load_tokenizer("shipped")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    return save_bases(tmp_path_factory.mktemp("bases"), KINDS, tokenizer)


def built(model: Path | str, tokenizer: PreTrainedTokenizerBase, adapter: str, **values: Any) -> Any:
    given = {"adapter": adapter, "virtual-tokens": COUNT, "model": str(model)}
    return ModelSpec.of(config.resolve(given | values)).build(tokenizer)


@torch.no_grad()
def acting(model: Any) -> Any:
    """The model with virtual tokens that matter."""
    for name, tensor in named_parameters(model).items():
        if name in adapters.names(model):
            tensor.normal_(generator=torch.Generator().manual_seed(7))
    return model


@torch.no_grad()
def logits(model: nn.Module, **given: Any) -> Tensor:
    return model(**({"input_ids": IDS} | given)).logits


@pytest.mark.first(2)
@pytest.mark.parametrize("adapter", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_peft_whatever_stands_before_a_text(
    bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str, adapter: str
) -> None:
    ours = acting(built(bases / kind, tokenizer, adapter))
    spec.save(ours, tokenizer, tmp_path, base=(str(bases / kind), ""))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / kind), tmp_path).eval()
    alike = {"rtol": 0.0, "atol": 1e-5 if kind == "gpt2" else 0.0}  # whose activation zofed exchanges for a faster one
    assert torch.allclose(logits(ours), logits(theirs)[:, -8:], **alike)
    assert (logits(ours) - logits(AutoModelForCausalLM.from_pretrained(bases / kind))).abs().max() > 0.1
    again = built(tmp_path, tokenizer, adapter)
    assert torch.equal(logits(again), logits(ours)) and weights_digest(again) == weights_digest(ours)
    with pytest.raises(UserError, match=f"cannot be added to the weights of a model: set adapter to {adapter}"):
        built(tmp_path, tokenizer, "none")
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    how: Any = GenerationConfig(do_sample=False, max_new_tokens=4, pad_token_id=0)
    written = ours.generate(IDS, attention_mask=mask, generation_config=how)
    alone = ours.generate(IDS[1:, 3:], attention_mask=mask[1:, 3:], generation_config=how)
    assert torch.equal(written[1, 3:], alone[0])
    stepwise = IDS[:1]
    for _ in range(4):
        stepwise = torch.cat([stepwise, logits(ours, input_ids=stepwise)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written[:1], stepwise)


def test_a_foreign_prompt_of_peft_is_read(bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for adapter, made in {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }.items():
        theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases / "llama"), made).eval()
        theirs.save_pretrained(tmp_path / adapter)
        ours = built(tmp_path / adapter, tokenizer, adapter, **{"virtual-tokens": 8})  # the default, which gives way
        assert torch.allclose(logits(ours), logits(theirs)[:, -8:], atol=1e-6)
    with pytest.raises(UserError, match=r"adapter = 'lora' is given, but .* type PREFIX_TUNING: set adapter to prefix"):
        built(tmp_path / "prefix", tokenizer, "lora")
    with pytest.raises(UserError, match=r"virtual-tokens is given, but adapter folder .* has 4"):
        built(tmp_path / "prefix", tokenizer, "prefix", **{"virtual-tokens": 5})


@pytest.mark.parametrize("adapter", BOTH)
def test_candidates_and_packed_texts_are_read_as_alone(
    bases: Path, tokenizer: PreTrainedTokenizerBase, adapter: str
) -> None:
    model = acting(built(bases / "llama", tokenizer, adapter))
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    words = torch.tensor([[[7, 9], [8, candidates.NO_TOKEN]]] * 2)
    found = candidates.scores(model, {"input_ids": IDS, "attention_mask": mask, candidates.KEY: words})
    for row, start in ((0, 0), (1, 3)):
        prompt = IDS[row, start:].tolist()
        logs = logits(model, input_ids=torch.tensor([[*prompt, 7, 9]]))[0].log_softmax(-1)
        assert float(found[row, 0]) == pytest.approx(float(logs[-3, 7] + logs[-2, 9]) / 2, rel=1e-4)
        assert float(found[row, 1]) == pytest.approx(float(logs[-3, 8]), rel=1e-4)
    assert not packed.leaks(model)


@pytest.mark.parametrize("adapter", BOTH)
def test_perturbed_copies_give_what_moved_weights_give(
    bases: Path, tokenizer: PreTrainedTokenizerBase, adapter: str
) -> None:
    model = acting(built(bases / "llama", tokenizer, adapter)).double()
    own = {name: tensor for name, tensor in named_parameters(model).items() if name in adapters.names(model)}

    def loss() -> Tensor:
        return F.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    steps = (1e-2, -1e-2)
    wanted = materialised_losses(loss, own, "rank1", [3, 1, 4], steps)
    assert torch.allclose(perturbed.losses(loss, own, "rank1", [3, 1, 4], steps, 4), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["zo", *(way for way in WAYS if way not in ("raw", "guide-only"))])
@pytest.mark.parametrize("adapter", BOTH)
def test_every_mode_trains_them_and_a_federation_of_one_gives_the_same(
    quick: Quick, bases: Path, tmp_path: Path, way: str, adapter: str
) -> None:
    settings = quick(model=str(bases / "llama"), adapter=adapter, virtual_tokens=COUNT, **{"zo": {}, **WAYS}[way])
    alone = central.train(settings, tmp_path / "alone", ignore)
    assert alone["replay_digest"] in (alone["digest"], None)
    assert alone["parameters"]["trainable"] == COUNT * (24 if adapter == "prompt" else 2 * 2 * 8)
    assert replay_run(RunFolder(tmp_path / "alone"))[0].digest() == alone["digest"]
    if way == "zo":
        ours = asking.of_run(tmp_path / "alone", compare=True).models
        assert (logits(ours[asking.TUNED]) - logits(ours[asking.BASE])).abs().max() > 1e-4
        written = export.adapter(RunFolder(tmp_path / "alone"), tmp_path / "exported")
        assert written.digest == alone["digest"] and f"A {adapter} of" in (tmp_path / "exported/README.md").read_text()
        with pytest.raises(UserError, match="--adapter writes them"):
            export.merged(RunFolder(tmp_path / "alone"), tmp_path / "merged")
    if settings.mode in ("fo", "instruct", "calibrate"):  # whose updates and guides are not the same on their way
        return
    together = federate(settings, tmp_path / "together", 1)
    assert together["digest"] == alone["digest"]
    assert records_of(tmp_path / "together") == records_of(tmp_path / "alone")


def test_they_begin_as_a_function_of_the_seed(bases: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for adapter in BOTH:
        first, again, other = (built(bases / "llama", tokenizer, adapter, seed=seed) for seed in (0, 0, 1))
        assert weights_digest(first) == weights_digest(again) != weights_digest(other)
        half = built(bases / "llama", tokenizer, adapter, dtype="bfloat16")
        own = [tensor for name, tensor in named_parameters(half).items() if name in adapters.names(half)]
        assert [tensor.dtype for tensor in own] == [torch.float32] and logits(half).dtype == torch.bfloat16
    prompt = built(bases / "llama", tokenizer, "prompt")
    table = prompt.get_input_embeddings().weight
    own = next(tensor for name, tensor in named_parameters(prompt).items() if name in adapters.names(prompt))
    assert all(any(torch.equal(row, token) for token in table) for row in own)


@pytest.mark.slow
@pytest.mark.skipif("ZOFED_REAL_MODELS" not in os.environ, reason="ZOFED_REAL_MODELS names no folder with smollm2")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", BOTH)
def test_a_real_model_has_them(adapter: str, dtype: str) -> None:
    """Thirty layers round more than the small models above."""
    folder = Path(os.environ["ZOFED_REAL_MODELS"]) / "smollm2"
    model = built(folder, encoding.load_tokenizer(str(folder)), adapter, dtype=dtype)
    assert logits(model).shape == (2, 8, 49152)


OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(**SMALL, num_hidden_layers=2, state_size=4)),
        "do not keep keys and values of earlier tokens",
    ),
    "mpt": (
        lambda: MptForCausalLM(MptConfig(vocab_size=512, d_model=16, n_layers=2, n_heads=4)),
        "how it reads them depends on the padding",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", BOTH)
@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_cannot_have_them_are_named(kind: str, adapter: str, dtype: torch.dtype) -> None:
    make, message = OTHERS[kind]
    model: Any = randomised(make()).eval().to(dtype)
    with pytest.raises(UserError, match=f"adapter = '{adapter}' does not fit a .*: .*{message}.*set adapter to"):
        adapters.inject(model, Virtual(adapter, COUNT), 0, "base")  # type: ignore[arg-type]


def test_a_block_beyond_the_window_of_attention_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, quick: Quick
) -> None:
    model: Any = MistralForCausalLM(
        MistralConfig(
            **SMALL,
            num_hidden_layers=2,
            intermediate_size=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=20,
        )
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = quick(model=str(tmp_path / "base"), adapter="prefix", virtual_tokens=COUNT, block_size=18)
    with pytest.raises(
        UserError, match=r"the 20 tokens of the window .* see: set block-size to 17 or less, or virtual"
    ):
        central.train(settings, tmp_path / "run", ignore)


def test_what_a_folder_holds_is_asked_and_scored_as_it_is(
    bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    ours = acting(built(bases / "llama", tokenizer, "prefix"))
    spec.save(ours, tokenizer, tmp_path, base=(str(bases / "llama"), ""))
    assert torch.equal(logits(asking.of_model(str(tmp_path)).models[asking.TUNED]), logits(ours))
    found = scoring.score(tmp_path, {"dataset": "sample-dclm", "eval-examples": 4, "block-size": 16})
    plain = scoring.score(bases / "llama", {"dataset": "sample-dclm", "eval-examples": 4, "block-size": 16})
    assert abs(found.scores.whole.loss - plain.scores.whole.loss) > 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "tiny"}, "model = 'tiny' begins with random weights: give a pretrained model"),
        ({"block_size": 126}, "set block-size to 125 or less, or virtual-tokens to 2 or less"),
        ({"virtual_tokens": 0}, "virtual-tokens = 0"),
        (
            {"virtual_tokens": 128},
            "128 virtual tokens are more than the 128 positions of .*: set virtual-tokens to 112 or less",
        ),
        ({"scope": "last-1"}, "trains as a whole: leave scope = 'last-1' out"),
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", BOTH)
def test_what_cannot_be_is_refused(
    quick: Quick, bases: Path, tmp_path: Path, adapter: str, values: dict[str, Any], message: str
) -> None:
    given = {"model": str(bases / "llama"), "adapter": adapter, "virtual_tokens": COUNT}
    with pytest.raises(UserError, match=message):
        central.train(quick(**(given | values)), tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()


def test_a_classifier_has_none(quick: Quick, bases: Path, tmp_path: Path) -> None:
    data = tmp_path / "films.jsonl"
    data.write_text("".join(json.dumps({"text": f"film {n} is fine", "label": n % 3}) + "\n" for n in range(30)))
    settings = quick(model=str(bases / "llama"), dataset=str(data), task="classification", adapter="prompt")
    with pytest.raises(UserError, match=r"are for causal language models: set task to .*, or adapter to lora"):
        central.train(settings, tmp_path / "run", ignore)


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "projection": ({"prefix_projection": True}, "has prefix_projection = True, which zofed does not train"),
    "count of text": ({"num_virtual_tokens": "three"}, "has num_virtual_tokens = 'three'"),
    "other count": ({"num_virtual_tokens": 4}, r"of shape \(3, 32\), but \(4, 32\) is needed"),
    "other type": ({"peft_type": "PROMPT_TUNING"}, r"of shape \(3, 32\), but \(3, 24\) is needed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_used_is_named(
    bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, damage: str
) -> None:
    spec.save(built(bases / "llama", tokenizer, "prefix"), tokenizer, tmp_path, base=(str(bases / "llama"), ""))
    changes, message = DAMAGES[damage]
    file = tmp_path / adapter_files.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        built(tmp_path, tokenizer, "prompt" if damage == "other type" else "prefix", **{"virtual-tokens": 8})
