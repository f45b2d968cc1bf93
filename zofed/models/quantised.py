"""A base in 8 or 4 bits: the frozen matrices of a model's blocks rounded by bitsandbytes, everything else as it was.

Only how the weights are kept comes from bitsandbytes. Its own layers also round what flows through them: int8 layers
their inputs, 4-bit layers on processors with AVX512-BF16 the whole product, after repacking the weights in place at the
first pass. Losses then move in steps: slopes over int8 layers were off by more than their size, where those over the
same weights multiplied as here were off by a tenth (benchmarks/RESULTS.md). Here a pass makes each matrix again in the
type of the model and multiplies by that: one matrix at a time, once for all perturbed copies, a smooth function of what
trains, and no tensor ever changes.

- int8: each row by its largest entry, to 127 steps either way; Dettmers et al., "LLM.int8()", 2022.
- nf4: 64 entries together by their largest, to 16 quantiles of the normal distribution; Dettmers et al., "QLoRA", 2023.
"""

import importlib
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zofed.base.environment import give_back_freed_memory
from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.core import directions
from zofed.models.classifier import PooledClassifier

Kind = Literal["int8", "nf4"]
BYTES: dict[Kind, float] = {"int8": 1.0, "nf4": 0.5}  # of an entry, without the scales

BLOCK = 64  # entries that share a scale in nf4: what QLoRA takes
ALIGNED = 256  # bytes: where the codes begin, behind the scales


class Quantised(nn.Module):
    """x (..., in) -> x W^T + b (..., out), W (out, in) held in 8 or 4 bits.

    weight: a vector of bytes under the name that the matrix had: float32 scales, then codes. dtype: of W, when it is
    made again. Where a gradient is wanted W is made once more on the way back and not kept in between.
    """

    bias: Tensor | None

    def __init__(self, kind: Kind, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype, bias: Any) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.dtype = dtype
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_parameter("bias", bias)

    def matrix(self) -> Tensor:
        """W (out, in) in its dtype, made anew."""
        shape = self.out_features, self.in_features
        scales = self.weight[: 4 * _scales(self.kind, shape)].view(torch.float32)
        codes = self.weight[_codes_at(self.kind, shape) :]
        if self.kind == "int8":
            return codes.view(torch.int8).view(shape).to(self.dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
        made = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", _rows(shape), self.dtype)
        return made.view(-1)[: math.prod(shape)].view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """In the type of x, or autocast's."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.matrix(), self.bias)
        made: Tensor = _Product.apply(x, self)  # type: ignore[assignment]
        return made if self.bias is None else made + self.bias

    def extra_repr(self) -> str:
        """What printing a model tells of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}, dtype={self.dtype}"


class _Product(torch.autograd.Function):
    """x W^T, which keeps no W for its backward pass."""

    @staticmethod
    def forward(x: Tensor, layer: Quantised) -> Tensor:
        return F.linear(x, layer.matrix())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.layer = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (given,) = gradients
        return (given @ ctx.layer.matrix().to(given.dtype)).to(ctx.dtype), None


def names(model: nn.Module, kind: Kind, trainable: Collection[str], scope: str) -> list[str]:
    """Canonical names of the matrices that `quantise` rounds: all of linear layers within the model's blocks.

    Left as they are: embeddings, the output layer, what is tied to either, what an adapter adds, what the library keeps
    in float32, and experts that are one tensor for all. Raises UserError where one of them is among those that train
    by `scope`, and where there are none.
    """
    found = {directions.canonical_name(f"{path}.weight"): module for path, module in _layers(model)}
    if trained := [name for name in found if name in trainable]:
        raise UserError(
            f"quantisation = {kind!r} rounds matrices that scope = {scope!r} would train, such as {trained[0]}: set "
            "scope to norms or biases, train an adapter (adapter = lora), or set quantisation to none"
        )
    if not found:
        raise UserError(
            f"quantisation = {kind!r}: the model has no linear layers in blocks to round; set quantisation to none"
        )
    return list(found)


@torch.no_grad()
def quantise(
    model: nn.Module, kind: Kind, chosen: Collection[str], device: torch.device | Callable[[str], torch.device]
) -> None:
    """Round the matrices of these names, in place and onto the device, one after the other; give back what is freed.

    device: of all, or of each by its name in the model. Biases stay the tensors they were. On the meta device nothing
    is rounded: the layers have their shapes alone. Raises UserError where bitsandbytes is missing or does not know the
    device, and for values it cannot hold.
    """
    library, used = _library(kind), set[str]()
    for path, module in _layers(model):
        if directions.canonical_name(f"{path}.weight") not in chosen:
            continue
        place = device(f"{path}.weight") if callable(device) else device
        used.add(place.type)
        matrix = module.weight.T if isinstance(module, Conv1D) else module.weight
        shape = (matrix.shape[0], matrix.shape[1])
        if place.type == "meta":
            packed = torch.empty(_size(kind, shape), dtype=torch.uint8, device=place)
        else:
            packed = _packed(library, kind, matrix.detach().to(place), f"{path}.weight")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Quantised(kind, packed, shape, matrix.dtype, module.bias))
    if "cpu" in used:
        _unmap(model)
    give_back_freed_memory()


def rounded_parameters(model: nn.Module) -> int:
    """By how many the parameters that a model stands for are more than the bytes that hold them: 0 of a plain one."""
    return sum(
        layer.in_features * layer.out_features - layer.weight.numel()
        for layer in model.modules()
        if isinstance(layer, Quantised)
    )


def _unmap(model: nn.Module) -> None:
    """Copy what is left, in place: tensors read from a file are parts of its mapping, which any one of them keeps."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # what was packed is in memory of its own
            tensor.data = tensor.data.clone()


def _packed(library: ModuleType, kind: Kind, matrix: Tensor, name: str) -> Tensor:
    """The bytes of one matrix (out, in): scales, then codes."""
    shape = (matrix.shape[0], matrix.shape[1])
    try:
        if kind == "int8":
            codes, scales, _ = library.functional.int8_vectorwise_quant(matrix.to(torch.float16))
        else:
            even = _rows(shape)
            flat = F.pad(matrix.flatten(), (0, math.prod(even) - matrix.numel())).view(even)
            codes, state = library.functional.quantize_4bit(
                flat, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
            )
            scales = state.absmax
            torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", even, matrix.dtype)
    except (NotImplementedError, RuntimeError, AttributeError, OSError, ValueError) as error:  # by kernel and build
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"quantisation = {kind!r}: bitsandbytes {library.__version__} cannot round {name} on {matrix.device} "
            f"({said_by(error)}): set device to cpu or to a CUDA GPU, or quantisation to none"
        ) from error
    if not bool(torch.isfinite(scales).all()):
        raise UserError(
            f"quantisation = {kind!r}: {name} holds values that are not finite, or above 65504 in int8: give an "
            "undamaged copy of the model, or set quantisation to none"
        )
    packed = torch.zeros(_size(kind, shape), dtype=torch.uint8, device=matrix.device)
    packed[: 4 * scales.numel()] = scales.contiguous().view(-1).view(torch.uint8)
    packed[_codes_at(kind, shape) :] = codes.contiguous().view(-1).view(torch.uint8)
    return packed


def _library(kind: Kind) -> ModuleType:
    """bitsandbytes, whose operators its import registers."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here calls
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"quantisation = {kind!r}, but bitsandbytes is not installed ({said_by(error)}): pip install "
            "'zofed[quantised]', or set quantisation to none"
        ) from error


def _rows(shape: tuple[int, int]) -> list[int]:
    """The shape in which nf4 takes a matrix: two entries of a row share a byte, so rows of an odd length become one.

    With an entry more where that is odd, too; it begins no block.
    """
    return list(shape) if shape[1] % 2 == 0 else [1, math.prod(shape) + math.prod(shape) % 2]


def _scales(kind: Kind, shape: tuple[int, int]) -> int:
    return shape[0] if kind == "int8" else -(-math.prod(shape) // BLOCK)


def _codes_at(kind: Kind, shape: tuple[int, int]) -> int:
    """Bytes before the codes: kernels read them several at once."""
    return -(-4 * _scales(kind, shape) // ALIGNED) * ALIGNED


def _size(kind: Kind, shape: tuple[int, int]) -> int:
    return _codes_at(kind, shape) + (math.prod(shape) if kind == "int8" else -(-math.prod(shape) // 2))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Paths and modules of the linear layers that may be rounded, in the model's order."""
    inner = model.encoder if isinstance(model, PooledClassifier) else model
    modules = dict(model.named_modules())
    lists = tuple(f"{path}." for path, module in modules.items() if isinstance(module, nn.ModuleList))
    kept = [*(getattr(inner, "_keep_in_fp32_modules", None) or ())]
    kept += getattr(inner, "_keep_in_fp32_modules_strict", None) or ()
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for path, module in modules.items():
        is_linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if not (is_linear and path.startswith(lists)) or owners[id(module.weight)] > 1:
            continue
        if any(_within(path, pattern) for pattern in kept) or _is_adapters(modules, path.split(".")):
            continue
        yield path, module


def _within(path: str, pattern: str) -> bool:
    """Whether a pattern of the library's list of modules in float32 names this one."""
    return bool(re.search(rf"(^|\.){pattern.replace('*', '.*')}(\.|$)", path))


def _is_adapters(modules: dict[str, nn.Module], steps: Sequence[str]) -> bool:
    """Whether a module belongs to what an adapter of peft adds: beside the `base_layer` of a layer it wraps."""
    return any(
        hasattr(modules[".".join(steps[:at])], "base_layer") and steps[at] != "base_layer" for at in range(len(steps))
    )
