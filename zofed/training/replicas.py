"""A run's replica: its model at the base weights, with the genesis that its settings give it."""

import hashlib
import json
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from zofed.base import arithmetic, log
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import trunk
from zofed.core.digests import named_parameters
from zofed.core.estimators import size_exponents
from zofed.core.genesis import make_genesis
from zofed.core.kinds import OptimizerName
from zofed.core.optimizers import Optimizer
from zofed.core.replica import Replica
from zofed.core.trunk import Trunk
from zofed.data import encoding
from zofed.models import adapters, placement, quantised, scopes, spec
from zofed.models.precision import Model
from zofed.training.modes import mode_of
from zofed.training.process import device, free_on, layer_devices


def replica_of(settings: Settings, model: Model) -> Replica:
    """A replica of a model at its base weights, with the genesis that the settings give it, on their device."""
    names = scopes.trainable_names(model, settings.scope)
    kind = settings.quantisation
    rounded = [] if kind == "none" else quantised.names(model, kind, names, settings.scope)
    if frozen := scopes.frozen_though_drawn(model, names):
        warnings.warn(
            f"scope = {settings.scope!r} leaves {', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''} as drawn: "
            "the model's folder lacks them, and they do not train; set scope to head, last-1 or full to train them",
            stacklevel=2,
        )
    replica = made(settings, model, names, spec.describe(settings.model, model), rounded)
    place_model(replica, settings)
    if settings.hidden_states_gigabytes and len(names) < len(named_parameters(model)):
        limit = int(settings.hidden_states_gigabytes * 1e9)
        folder, name = encoding.default_cache() / "hidden states", _states_name(replica, settings)
        trunk.keep(model, Trunk(replica.parameters, scopes.layers(model), folder, name, limit))
    return replica


def made(
    settings: Settings,
    model: nn.Module,
    names: Sequence[str],
    description: dict[str, Any],
    rounded: Sequence[str] = (),
) -> Replica:
    """A replica of a module where it lies, with the genesis that the settings give it.

    names: of what trains. description: what a replay can know the module by. rounded: names of what is quantised.
    """
    matrices = frozenset(scopes.inner_matrices(model, names))

    def rule(name: OptimizerName) -> Optimizer:
        orthogonal = matrices if name == "mudamw" else frozenset[str]()
        return Optimizer(name, settings.momentum, settings.weight_decay, settings.cautious, orthogonal)

    # A subspace's coefficients are trained by the optimizer; the weights then move by them as they are, or by a running
    # mean of such moves.
    outer = Optimizer("sgd", settings.server_momentum, settings.weight_decay)
    parameters = named_parameters(model)
    mode = mode_of(settings)
    has_directions = mode.measures_slopes or mode.trains_coefficients
    in_proportion = has_directions and settings.direction_scale == "rms"
    genesis = make_genesis(
        model,
        description,
        names,
        seed=settings.seed,
        kind=mode.direction_kind,
        optimizer=outer if mode.trains_coefficients else rule(settings.step_rule),
        size_exponents=size_exponents({name: parameters[name] for name in names}) if in_proportion else None,
        backprop_optimizer=(rule(settings.bp_optimizer or settings.step_rule) if mode.helps_zeroth_order else None),
        quantised=rounded,
    )
    return Replica(model, genesis)


def place_model(replica: Replica, settings: Settings) -> None:
    """Bring a replica's model to the device of the settings, what the genesis names as quantised in as few bits as they
    say.

    Whoever measures slopes does this; whoever only replays rounds nothing. Raises UserError as `place`.
    """
    place(replica.model, settings, replica.genesis.get("quantised", ()))


def place(model: nn.Module, settings: Settings, names: Collection[str] = ()) -> None:
    """Bring a model to the device of the settings, or its layers to several, the matrices of these names rounded.

    Raises UserError as `placement.over`, `quantised.quantise` and `placement.bring`, and for a model that does not run
    over rounded matrices.
    """
    kind = settings.quantisation
    rounded = frozenset(names) if kind != "none" else frozenset[str]()
    ran = bool(rounded) and scopes.runs(model)
    devices = layer_devices(settings)
    sizes = {} if kind == "none" else dict.fromkeys(rounded, quantised.BYTES[kind])
    places = placement.over(model, devices, free_on(devices), sizes)
    if kind != "none" and rounded:
        quantised.quantise(model, kind, rounded, places.device_of)
    placement.bring(model, places)
    if ran and not scopes.runs(model):
        raise UserError(
            f"quantisation = {settings.quantisation!r}: the code of {type(model).__name__} reads the weights of linear "
            "layers itself instead of calling them: set quantisation to none"
        )


def tell_placement(replica: Replica, settings: Settings) -> None:
    """Print where the layers of a model lie, if they were to be spread."""
    if settings.placement == "auto":
        log.tell(placement.described(replica.model))


def _states_name(replica: Replica, settings: Settings) -> str:
    """A digest of all that the bits of frozen layers' outputs depend on, apart from the examples."""
    genesis, adapted = replica.genesis, adapters.of(replica.model)
    # Adapters lie above the cut where all of them train: what they were drawn as changes nothing below.
    is_apart = adapted is not None and adapters.names(replica.model) <= replica.parameters.keys()
    weights = f"{adapted.base} {settings.dtype}" if adapted and is_apart else genesis["weights"]
    depends_on = (
        "hidden states 1",
        json.dumps([genesis["model"], weights, genesis["trainable"]], sort_keys=True),
        f"{device(settings)} {torch.get_num_threads()} {torch.__version__} {torch.backends.cpu.get_cpu_capability()}",
        json.dumps(arithmetic.described(), sort_keys=True),
        *((settings.quantisation,) if settings.quantisation != "none" else ()),
        *((settings.placement,) if settings.placement != "none" else ()),  # GPUs may be of two kinds
    )
    return hashlib.sha256(" ".join(depends_on).encode()).hexdigest()
