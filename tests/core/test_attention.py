"""Perturbed copies attend to themselves alone."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import relative
from torch import Tensor, nn

from zofed.core import estimators, perturbed

pytestmark = pytest.mark.usefixtures("one_thread")


ATTENTION_X = torch.linspace(-1, 1, 2 * 3 * 6 * 4, dtype=torch.float64).mul(9).sin().reshape(2, 3, 6, 4)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
ATTENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "four dimensions": lambda w: attend(ATTENTION_X, w),
    "a mask for all": lambda w: attend(ATTENTION_X, w, attn_mask=CAUSAL[None, None]),
    "a mask for each example": lambda w: attend(ATTENTION_X, w, attn_mask=torch.stack([CAUSAL, CAUSAL.T])[:, None]),
    "a mask for each head": lambda w: attend(ATTENTION_X, w, attn_mask=torch.stack([CAUSAL, CAUSAL.T, CAUSAL])[None]),
    "a mask to be added": lambda w: attend(ATTENTION_X, w, attn_mask=ATTENTION_X[:, :1] @ ATTENTION_X[:, 1:2].mT),
    "a perturbed mask": lambda w: attend(ATTENTION_X, w, attn_mask=ATTENTION_X @ w @ ATTENTION_X.mT),
    "causal": lambda w: attend(ATTENTION_X, w, is_causal=True),
    "shared heads": lambda w: F.scaled_dot_product_attention(
        ATTENTION_X.flatten(0, 1)[None] @ w, ATTENTION_X[:1] @ w, ATTENTION_X[:1] @ w, enable_gqa=True
    ),
    "unperturbed keys": lambda w: F.scaled_dot_product_attention(ATTENTION_X @ w, ATTENTION_X, ATTENTION_X),
    "unperturbed queries": lambda w: F.scaled_dot_product_attention(ATTENTION_X, ATTENTION_X, ATTENTION_X @ w),
    "three dimensions": lambda w: attend(ATTENTION_X[0], w, is_causal=True),
}
ATTENTIONS_OF_FEWER_DIMENSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "two dimensions": lambda w: attend(ATTENTION_X[0, 0], w),
    "two dimensions, causal": lambda w: attend(ATTENTION_X[0, 0], w, is_causal=True),
    "a mask of two dimensions": lambda w: attend(ATTENTION_X, w, attn_mask=CAUSAL),
    "a mask of three dimensions": lambda w: attend(ATTENTION_X, w, attn_mask=CAUSAL[None]),
    "three dimensions, a mask of two": lambda w: attend(ATTENTION_X[0], w, attn_mask=CAUSAL),
}


def attend(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x @ weight, x @ weight.T, x @ weight, **options)


def assert_attends(call: Callable[[Tensor], Tensor]) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 16, dtype=torch.float64).mul(5).cos().reshape(4, 4))

    def loss() -> Tensor:
        output = call(weight)
        return (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).square().sum()

    for copies in (1, 2, 4, 6):
        got = perturbed.losses(loss, {"w": weight}, "rank1", [1, 2, 3], (0.125, -0.125), copies)
        wanted = estimators.materialised_losses(loss, {"w": weight}, "rank1", [1, 2, 3], (0.125, -0.125))
        assert relative(got, wanted) < 1e-12


@pytest.mark.parametrize("name", ATTENTIONS)
def test_copies_attend_to_themselves_alone(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it runs the copies one by one
        assert_attends(ATTENTIONS[name])


@pytest.mark.parametrize("name", ATTENTIONS_OF_FEWER_DIMENSIONS)
def test_copies_attend_to_themselves_alone_in_fewer_dimensions(name: str) -> None:
    assert_attends(ATTENTIONS_OF_FEWER_DIMENSIONS[name])
