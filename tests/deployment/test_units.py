"""The systemd units in deploy/: what systemd itself says of them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from zofed.base.files import ROOT

DEPLOY = ROOT / "deploy"
UNITS = sorted(path.name for path in DEPLOY.glob("*.service"))

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze on PATH")


def here(tmp_path: Path, unit: str) -> Path:
    """The unit as an instance, with programs that are on this machine."""
    text = (DEPLOY / unit).read_text()
    for program in ("/opt/zofed/.venv/bin/zofed", "/usr/bin/nvidia-modprobe"):
        text = text.replace(program, "/bin/sh")
    path = tmp_path / unit.replace("@.", "@gpu0.")
    path.write_text(text)
    return path


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_the_unit(tmp_path: Path, unit: str) -> None:
    command = ["systemd-analyze", "verify", "--recursive-errors=no", str(here(tmp_path, unit))]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0 and not told.stderr, told.stderr


@needs_systemd
@pytest.mark.parametrize(("unit", "most"), [("zofed-superlink.service", 20), ("zofed-supernode@.service", 40)])
def test_the_unit_is_as_closed_as_it_was(tmp_path: Path, unit: str, most: int) -> None:
    """By systemd's own score, in tenths: 0 is closed, 96 a unit without any restriction."""
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={most}", str(here(tmp_path, unit))]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-300:] + told.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_a_service_comes_back_however_it_ended(unit: str) -> None:
    text = (DEPLOY / unit).read_text().splitlines()
    assert {"Restart=always", "StartLimitIntervalSec=0", "NoNewPrivileges=yes", "ProtectSystem=strict"} <= set(text)


def test_the_settings_of_an_instance_are_those_its_command_reads() -> None:
    lines = [line for line in (DEPLOY / "supernode.env").read_text().splitlines() if line and line[0] != "#"]
    command = (DEPLOY / "zofed-supernode@.service").read_text()
    for name in (line.partition("=")[0] for line in lines):
        assert f"${{{name}}}" in command or f" ${name}" in command, name
