"""What is told of an exported run: what its LoRA holds and misses, and the lines of Python that load it."""

from collections.abc import Iterator

from zofed.config import Settings
from zofed.data import hub, prompts
from zofed.models.low_rank import SHARES, Delta
from zofed.models.sources import SIZES

# The hub's word for what a model does, and the class of transformers that loads it.
CLASSIFIER = ("text-classification", "AutoModelForSequenceClassification")
MASKED = ("fill-mask", "AutoModelForMaskedLM")
CAUSAL = ("text-generation", "AutoModelForCausalLM")


def kind_of(settings: Settings) -> tuple[str, str]:
    """What a run's model is: one of CLASSIFIER, MASKED and CAUSAL."""
    if settings.task == "classification":
        return CLASSIFIER
    return MASKED if settings.task == "prompt" and prompts.is_masked(settings.template) else CAUSAL


def percent(share: float) -> str:
    """A share in digits, 100 only where it is that to a millionth."""
    return ">99.99 %" if 0.99995 <= share < 1 - 1e-6 else f"{100 * share:.2f} %"


def sentences(delta: Delta, asked: int, bound: int | None) -> list[str]:
    """What a LoRA of at most the rank asked for holds of a run's change. bound: of that change's rank, if known."""
    found = [
        f"rank {delta.rank} holds {percent(delta.share)} of the squared norm of what changed in {len(delta.changes)} "
        "matrices",
        "; ".join(_ranks(delta)),
    ]
    if bound is not None:
        found.append(
            f"by its journal the run changed each matrix by a rank of {bound:,} at most, rounding aside"
            + (f": rank {asked:,} was asked for, {delta.rank:,} is written" if bound < asked else "")
        )
    rounding = "what it misses of these matrices is no more than the rounding of the steps"
    found.append(f"it is exact: {rounding}" if delta.is_exact else "it is not exact: a larger rank holds more")
    found += [f"held whole, apart from the LoRA: {path}" for path in delta.heads]
    for rest in delta.rest:
        found.append(
            f"not held: {rest.what} ({rest.tensors:,} tensor{'s' * (rest.tensors != 1)}, {rest.numbers:,} numbers), "
            f"whose change has the norm {rest.square**0.5:.4g}"
        )
    if delta.rest:
        found.append(f"so of all that changed it holds {percent(delta.share_of_all)}; --merged holds all")
    return found


def _ranks(delta: Delta) -> Iterator[str]:
    largest = max(len(change.squares) for change in delta.changes)
    for share in SHARES:
        rank = delta.smallest_rank(share)
        yield f"{100 * share:g} % takes rank {f'{rank:,}' if rank else f'above {largest:,}'}"


def rows(delta: Delta) -> list[list[str]]:
    """What is held by kind of matrix, the names of the columns first."""
    found = [["matrices", "changed", "norm of the change", "held"]]
    for kind, (count, norm, share) in delta.by_kind().items():
        found.append([kind, f"{count:,}", f"{norm:.4g}", percent(share)])
    return found


def load_merged(settings: Settings, classes: int) -> str:
    """Python that loads a merged model. classes: of a classifier whose encoder zofed pools; else 0."""
    if classes:
        given = f'".", labels={classes}, block_size={settings.block_size}, dtype={settings.dtype!r}'
        return (
            "import zofed\n\n"
            "# The encoder with its head, classifier.safetensors.\n"
            f"model = zofed.create_model({given})  # the folder of this file\n"
        )
    name = kind_of(settings)[1]
    return (
        f"from transformers import {name}, AutoTokenizer\n\n"
        f'model = {name}.from_pretrained(".")  # this folder, or its name on the hub\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
    )


def load_adapter(settings: Settings, base: str, revision: str, classes: int) -> str:
    """Python that loads an adapter and its base, in the type of the run's weights. classes: of a classifier, else 0."""
    name = kind_of(settings)[1]
    if base in SIZES:
        labels = f"labels={classes}, " if classes else ""
        begins = ["import zofed", "from peft import PeftModel", "from transformers import AutoTokenizer"]
        given = f'{base!r}, {labels}seed={settings.seed}, dtype={settings.dtype!r}, tokenizer="."'
        loads = f"zofed.create_model({given})"
    else:
        begins = ["from peft import PeftModel", f"from transformers import {name}, AutoTokenizer"]
        place = base if hub.is_id(base) else "BASE"
        at = f", revision={revision!r}" if revision else ""
        labels = f", num_labels={classes}" if classes else ""
        loads = f"{name}.from_pretrained({place!r}{at}, dtype={settings.dtype!r}{labels})"
    lines = [
        *begins, "", 'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder, or its name on the hub',
        f"base = {loads}",
    ]  # fmt: skip
    if classes:
        lines.append("base.config.pad_token_id = tokenizer.pad_token_id")
    return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, ".")', ""])
