"""What to say of a loss that draws, writes, changes buffers or leaves weights unused, each with the remedy."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zofed.base.errors import UserError
from zofed.core import directions


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of random numbers: by which operation, from which generator, in which module."""

    operation: str
    source: Any  # key of the generator in `observed_pass.random_state`
    generator: torch.Generator | None  # that it was handed
    name: str  # of the module around it
    module: nn.Module | None
    is_loader: bool


def draws(model: nn.Module, drawn: Sequence[Draw], values: str) -> UserError:
    """What to say of random numbers in a loss. values: where, or what it gave."""
    what = f"the loss draws random numbers at each pass ({values}), so that slopes of it would be noise: "
    inside = {draw.name: draw.module for draw in drawn if draw.module is not None}
    if not inside:
        who = " and ".join(dict.fromkeys(draw.operation for draw in drawn))
        layer = "call model.eval() if one of its layers does that, else " if model.training else ""
        return UserError(
            f"{what}it calls {who}; {layer}draw before asking, so that all passes of a step see the same, "
            "seed it within the loss, or hand each query its own with examples"
        )
    named = [f"{name or 'the model'} ({type(module).__name__})" for name, module in inside.items()]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    if all(module.training for module in inside.values()):
        remedy = "call model.eval(), or set their rates (p, dropout) to 0"
    else:
        operations = ", ".join(dict.fromkeys(draw.operation for draw in drawn))
        remedy = (
            f"they draw ({operations}) in eval mode too, so pass training=self.training to what they call, set its "
            "rate to 0, or seed it in the module's forward"
        )
    return UserError(f"{what}{', '.join(named[:3])}{more}; {remedy}")


def written(model: nn.Module, name: str, how: str, first: str = "") -> UserError:
    """What to say of a parameter that a pass wrote into. how: it did. first: what to do before the remedy."""
    path, _, _ = name.rpartition(".")
    module = model.get_submodule(path)
    limit = getattr(module, "max_norm", None)
    if limit is not None:
        remedy = f"set max_norm = None instead of {limit:g}, which rescales weights while they are read"
    else:
        remedy = "move that out of the forward pass, and use a changed copy of the parameter there"
    return UserError(
        f"a forward pass {how} the parameter {name!r} of {type(module).__name__}, but only a record may move weights, "
        f"or no replay gives them again: {first}{remedy}"
    )


def moved(model: nn.Module, names: Sequence[str], *, is_once: bool) -> UserError:
    """What to say of buffers that a pass changed. is_once: only the first pass did, as when a cache is filled."""
    path, _, _ = names[0].rpartition(".")
    module = model.get_submodule(path)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    if is_once:
        remedy = "run the loss once before, so that the buffer is part of what the journal starts from"
    elif module.training:
        remedy = (
            "put that module into eval mode (model.eval() does all), where it reads its buffers and leaves them, or "
            "take one without buffers (a norm without running statistics)"
        )
    else:
        remedy = "move that out of the forward pass, and do it once a step, after apply, outside the module"
    return UserError(
        f"a forward pass changes the buffer {names[0]!r} of {type(module).__name__}{more}: every perturbed pass would, "
        f"and no record tells, so that no replay gives it again; {remedy}"
    )


def never_used(model: nn.Module, parameters: Collection[str], idle: Collection[str]) -> UserError:
    """What to say of trainable parameters that the loss never used, with the pattern that leaves out just these."""
    names = list(idle)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    what = f"the loss never used the trainable parameters {', '.join(names[:3])}{more}"
    rest = [name for name in parameters if name not in set(names)]
    if not rest:
        return UserError(f"{what}, which are all that train: compute the loss with the model that is trained")
    every = [directions.canonical_name(name) for name, _ in model.named_parameters()]
    return UserError(f"{what}: set scope (trainable, in a script) to '{pattern_of(rest, every)}'")


def pattern_of(names: Collection[str], every: Collection[str]) -> str:
    """A regular expression that is found in just these of all names: in the fewer prefixes of them or of the others."""
    chosen = set(names)
    others = [name for name in every if name not in chosen]
    wanted = [name for name in every if name in chosen]
    yes, no = _prefixes(wanted, others), _prefixes(others, wanted)
    return f"^(?!{'|'.join(no)})" if len(no) < len(yes) else f"^({'|'.join(yes)})"


def _prefixes(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The shortest dotted prefixes of the names that none of the others begins with, as regular expressions."""
    found = dict[str, None]()
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
        head = next((head for head in heads if not any(other.startswith(head) for other in others)), None)
        found[re.escape(head) if head else f"{re.escape(name)}$"] = None
    return list(found)
