"""A model as it is trained and scored: no dropout, no cache, every tensor in the type that the library gives it."""

import copy
import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from zofed.models.classifier import PooledClassifier

Model = PreTrainedModel | PooledClassifier


def ready(model: Model, dtype: str) -> Model:
    """The model as it is trained and scored: no dropout, no cache, fast activations, weights in `dtype`; in place.

    What the model itself keeps in float32 (rotary frequencies, the gates of some mixtures of experts) stays so.
    """
    model.config.use_cache = False  # keys and values of generation are of no use to a loss
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Looks at the ids only to warn of padding, by a branch that many queries' own examples cannot take.
            module.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # the same function in one pass over memory instead of eight
                setattr(module, name, nn.GELU(approximate="tanh"))
    _cast(model, getattr(torch, dtype))
    return model.eval()


@torch.no_grad()
def _cast(model: Model, dtype: torch.dtype) -> None:
    """Every tensor in the type that the library would load it in, where the weights are wanted in `dtype`."""
    if dtype == torch.float32:
        return  # what was built in it has it
    inner = model.encoder if isinstance(model, PooledClassifier) else model
    assert isinstance(inner, PreTrainedModel)
    types = _types(inner, dtype)
    for prefix, module in inner.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if tensor.is_floating_point():  # in place: a tied tensor stays one
                tensor.data = tensor.data.to(types.get(f"{prefix}.{name}" if prefix else name, dtype))
    if isinstance(model, PooledClassifier):
        nn.Module.to(model.classifier, dtype)


def _types(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Type of each parameter and buffer, by all of its names, of a model that the library builds in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as the library does: what a module makes in a type of its own keeps that type
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(before)
    tensors = (*built.named_parameters(remove_duplicate=False), *built.named_buffers(remove_duplicate=False))
    types = {name: tensor.dtype for name, tensor in tensors}
    persistent = set(built.state_dict())
    for pattern, kept in model._get_dtype_plan(dtype).items():
        expression = re.compile(pattern.replace("*", ".*"))  # how the library reads its list
        types |= {name: kept for name in types if name in persistent and expression.search(name)}
    return types
