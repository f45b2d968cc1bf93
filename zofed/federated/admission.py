"""Whether a node carries out what a server asks: the run's settings, then each plan against them, by its policy.

Pure functions that return where all is well and raise `Refused`, or UserError for what no run asks, where not.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from zofed.base.errors import UserError
from zofed.base.texts import one_line
from zofed.config import Settings
from zofed.config.task_files import is_file, load, names
from zofed.core import gradient_codec, sanitize
from zofed.core.journal import body_kinds
from zofed.core.records import Dense, Guided
from zofed.data import chat_templates, hub, subsets
from zofed.federated import policy as policies
from zofed.federated import protocol
from zofed.federated.policy import Policy, Refused, refusal
from zofed.federated.protocol import Plan
from zofed.models import scopes
from zofed.training import measurements
from zofed.training.modes import mode_of
from zofed.training.paths import NAMES

LONGEST_TEXT = 2**17  # characters of a setting: a chat template has a few thousand
MOST_SETTINGS = 500
TEMPLATES = ("template", "label-words", "calibration-prompt", "chat-template")  # of Jinja: they may ask for rows
OF_PASSES = ("slopes", "guided", "coefficients")  # tasks of the message train.zo
MESSAGES = {"train.zo": OF_PASSES, "train.fo": ("update",), "train.guide": ("gradient",)}
OF_GRADIENTS = {Dense.kind, Guided.kind}  # records that move the weights by what is sent beside them
AT_REST = ("none", "end")  # tasks that ask for no passes over what the node trains on


def check_given(values: Mapping[str, Any], policy: Policy) -> None:
    """What the run's configuration says, before anything of it is read: its size, and a task file's path."""
    if len(values) > MOST_SETTINGS:
        raise UserError(f"the run brings {len(values)} settings: there are fewer than {MOST_SETTINGS}")
    for key, value in values.items():
        if max(len(key), len(value) if isinstance(value, str) else 0) > LONGEST_TEXT:
            raise UserError(f"a setting of the run, {one_line(key, 40)}, is longer than {LONGEST_TEXT:,} characters")
    task = values.get("task", "")
    if task and is_file(task) and task not in names():
        _check_path("task", task, policy)
    for key in TEMPLATES:
        text = values.get(key, "")
        if not policy.templates and "{" in str(text) and text not in _known_templates():
            raise refusal(f"{key} = {_shown(str(text))}", "templates", policy, "take those of a task of zofed tasks")


@lru_cache(maxsize=1)
def _known_templates() -> frozenset[str]:
    """The templates of the tasks that ship."""
    tasks = [load(name).settings for name in names()]
    return frozenset(task[key] for task in tasks for key in TEMPLATES if key in task)


def check_settings(settings: Settings, policy: Policy) -> None:
    """What the settings of a run ask for, before data and model are touched."""
    _check_choice("mode", settings.mode, "modes", policy)
    _check_choice("objective", settings.objective, "objectives", policy)
    _check_choice("adapter", settings.adapter, "adapters", policy)
    scope = "head" if settings.freeze_encoder else settings.scope
    kind = scopes.kind(scope)
    if scope not in policy.scopes and kind not in policy.scopes:
        what = f"scope = {_shown(scope)}{' is a pattern' if kind == 'pattern' else ''}"
        raise refusal(what, "scopes", policy, "take a scope that it lists")
    smallest, key = min(_batches(settings))
    if smallest < policy.smallest_batch:
        raise refusal(f"{key} = {smallest}", "smallest-batch", policy, f"raise {key}")
    if (asked := integers(settings)) > policy.integers_per_message:
        what = f"mode = {settings.mode} asks {asked:,} slopes or coefficients in a message"
        raise refusal(what, "integers-per-message", policy, "lower queries, local-steps or steps-per-message")
    if (tokens := _examples(settings) * settings.block_size) > policy.tokens_per_message:
        what = f"a message reads {tokens:,} tokens"
        raise refusal(what, "tokens-per-message", policy, "lower batch-size, block-size or the steps of a message")
    if settings.threads > policy.threads:
        raise refusal(f"threads = {settings.threads}", "threads", policy, "lower threads")
    if (kept := settings.hidden_states_gigabytes) > policy.cache_gigabytes:
        raise refusal(f"hidden-states-gigabytes = {kept:g}", "cache-gigabytes", policy, "lower it")


def check_names(settings: Settings, policy: Policy, own: str = "") -> None:
    """The data, models and other files that a run names. own: the node's own data, which it reads instead."""
    for key in NAMES:
        if not (own and key.endswith("dataset")):
            _check_name(key, getattr(settings, key), settings.revision, policy)


def integers(settings: Settings) -> int:
    """The most slopes or coefficients that one answer of a run holds."""
    if settings.mode == "fo":
        return 0
    task = "coefficients" if mode_of(settings).trains_coefficients else "slopes"
    return protocol.integers_asked(settings, task, settings.steps_per_message)


def _batches(settings: Settings) -> list[tuple[int, str]]:
    """Examples that a slope, a gradient or an evaluation is the mean over, by the setting that says so."""
    found = [(settings.batch_size, "batch-size")]
    if settings.query_batches == "per-query" and settings.query_batch_size:
        found.append((settings.query_batch_size, "query-batch-size"))
    if mode_of(settings).helps_zeroth_order and settings.bp_batch_size:
        found.append((settings.bp_batch_size, "bp-batch-size"))
    if settings.client_held_out_fraction and not settings.losses_withheld:
        found.append((settings.eval_examples, "eval-examples"))
    return found


def _examples(settings: Settings) -> int:
    """Examples of the batches of a message, at most."""
    mode = mode_of(settings)
    if mode.trains_coefficients:
        return mode.examples_of_a_step
    backward = settings.gradient_accumulation * measurements.backprop_batch_size(settings)
    if settings.mode == "fo":
        return max(backward, settings.local_steps * settings.batch_size)
    seen = measurements.examples_seen(settings) * settings.steps_per_message
    return max(seen, backward) if mode.helps_zeroth_order else seen


def _check_choice(key: str, value: str, line: str, policy: Policy) -> None:
    if value not in getattr(policy, line):
        raise refusal(
            f"{key} = {_shown(value)}", line, policy, f"take {' or '.join(getattr(policy, line)) or 'no run'}"
        )


def _check_name(key: str, value: str, revision: str, policy: Policy) -> None:
    """What a setting names: something that zofed knows, or a file or folder that a run may name."""
    if value in ("", *NAMES[key]) or (key == "chat_template" and chat_templates.is_text(value)):
        return
    if key.endswith("dataset") and subsets.find(value):
        return
    if key == "model" and hub.is_id(value):
        is_path = os.path.exists(value)
        if not (is_path and policies.is_within(value, policy)):
            if not policy.hub_models:
                what = f"{key} = {_shown(value)} is of the hub"
                raise refusal(what, "hub-models", policy, "name a folder of the node")
            if is_path:  # which must not be told
                raise hub.missing(value, revision)
            return
    _check_path(key.replace("_", "-"), value, policy)


def _check_path(key: str, value: str, policy: Policy) -> None:
    if not policies.is_within(value, policy):
        # The same whether it is there or not: a refusal must not tell what lies on this machine.
        raise refusal(f"{key} = {_shown(value)} is in none of the folders", "folders", policy, "name data that are")


def check_plan(plan: Plan, kind: str, settings: Settings, policy: Policy) -> None:
    """A plan, before its records are read or its weights taken. kind: of the message that brings it."""
    _check_task(plan, kind, settings)
    last = settings.rounds + (plan.task in AT_REST)
    if not 1 <= plan.round <= last:
        raise Refused(
            f"a plan of round {sanitize.brief(plan.round)} in a run of rounds = {settings.rounds}: there is none"
        )
    if not 1 <= plan.steps <= min(settings.steps_per_message, max(1, last + 1 - plan.round)):
        raise Refused(
            f"a plan of {sanitize.brief(plan.steps)} rounds at once from round {plan.round} on, in a run of rounds = "
            f"{settings.rounds} with steps-per-message = {settings.steps_per_message}: there is none"
        )
    if plan.snapshot and not policy.snapshots:
        raise refusal("the server sends a snapshot", "snapshots", policy, "have the node there from the first round on")
    most = min(policy.records_per_message, plan.round - 1)
    try:
        kinds = body_kinds(plan.entries, most)
    except ValueError as error:
        raise Refused(f"the records of a plan are damaged ({error}): give all machines the same zofed") from error
    try:
        updates = gradient_codec.count(plan.updates, protocol.UPDATES_SENT)
    except ValueError:
        updates = 0  # whoever catches up by them says so, and is sent them again
    if not mode_of(settings).has_gradients and (plan.updates or plan.guide or not OF_GRADIENTS.isdisjoint(kinds)):
        raise Refused(f"the server sends gradients in a run of mode = {settings.mode}: such a run has none")
    records = len(kinds)
    what = f"the server sends more than {most:,} records before round {plan.round}"
    if records > most == policy.records_per_message:
        raise refusal(what, "records-per-message", policy, "have the node there from the first round on")
    if records > most:
        raise Refused(f"{what}: a round has one at most")
    if updates > protocol.UPDATES_SENT:
        raise Refused(f"the server sends {updates} or more updates: a plan brings {protocol.UPDATES_SENT} at most")


def _check_task(plan: Plan, kind: str, settings: Settings) -> None:
    if kind not in MESSAGES:
        allowed: tuple[str, ...] = AT_REST
    else:
        request = mode_of(settings).request(max(1, plan.round))
        wanted = {request, "gradient"} if request == "guided" else {request}
        if settings.gradient_source == "server":
            wanted -= {"gradient"}
        allowed = tuple(task for task in MESSAGES[kind] if task in wanted)
    if plan.task not in allowed:
        raise Refused(
            f"a plan that asks for {_shown(plan.task)} in a message {kind}, in round {sanitize.brief(plan.round)} of a "
            f"run of mode = {settings.mode}: such a round asks for {' or '.join(allowed) or 'nothing there'}"
        )


def check_message(megabytes: float, policy: Policy) -> None:
    """A message's size, before it is read."""
    if megabytes > policy.megabytes_per_message:
        what = f"a message of {megabytes:,.1f} MB"
        raise refusal(what, "megabytes-per-message", policy, "train a smaller scope or model")


def check_held(examples: int, policy: Policy, what_for: str = "to train on") -> None:
    """How many examples the node holds: a batch of fewer repeats them."""
    if examples < policy.smallest_batch:
        what = f"this node holds {examples} examples {what_for}"
        raise refusal(what, "smallest-batch", policy, "leave the node out")


def _shown(value: str) -> str:
    return repr(one_line(value, sanitize.LONGEST_NAME))
