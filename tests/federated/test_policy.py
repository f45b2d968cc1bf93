"""A node's policy: what its file may say, and what a person reads where it says something else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zofed import config
from zofed.base.files import ROOT
from zofed.federated import admission, policy

Zofed = Callable[..., tuple[int, str, str]]

WRONG = [
    ('queries = "many"', "unknown line of a policy 'queries'"),
    ('folders = [""]', "'' is no absolute path: begin it with /"),
    ('folders = ["data"]', "'data' is no absolute path: begin it with /"),
    ("smallest-batch = 0", "smallest-batch = 0: should be greater than or equal to 1"),
    ('snapshots = "perhaps"', "snapshots = 'perhaps'"),
    ("seconds-per-message = nan", "seconds-per-message = nan"),
    ('modes = "zo"', "modes = 'zo'"),
    ('modes = ["forward"]', "forward"),
    ("folders = [", "policy file"),
]


def test_the_strict_one_that_ships_is_a_policy() -> None:
    found = policy.read(ROOT / "deploy" / "policy.toml")
    assert found.modes == ("zo",) and not found.snapshots and not found.details and found.ledger == "slopes.json"


def test_an_encoder_that_is_frozen_trains_its_head_whatever_the_scope() -> None:
    own = policy.DEFAULT.model_copy(update={"scopes": ("full",)})
    whole = config.resolve({"task": "classification"})
    admission.check_settings(whole, own)
    with pytest.raises(policy.Refused, match="scope = 'head', but this node's policy has scopes"):
        admission.check_settings(whole.model_copy(update={"freeze_encoder": True}), own)


@pytest.mark.parametrize(("line", "told"), WRONG)
def test_a_wrong_line_is_named_with_the_file_and_what_is_allowed(
    zofed_command: Zofed, tmp_path: Path, line: str, told: str
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(line)
    status, out, errors = zofed_command("policy", path)
    assert (status, out) == (2, "") and errors.count("\n") == 1
    assert str(path) in errors and told in errors


def test_what_is_printed_is_a_policy_that_prints_the_same(zofed_command: Zofed, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("smallest-batch = 8\nmodes = ['zo']\n")
    printed = zofed_command("policy", path)[1]
    assert "smallest-batch = 8" in printed and 'modes = ["zo"]' in printed and "idle-seconds = 600.0" in printed
    path.write_text(printed)
    assert zofed_command("policy", path) == (0, printed, "")
