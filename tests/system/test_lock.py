"""requirements.lock holds what requirements.txt asks for and all that this needs in turn, each with its hashes."""

import re
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from zofed.base.files import ROOT

LOCK = (ROOT / "requirements.lock").read_text()


def locked() -> dict[str, str]:
    """Versions by name."""
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ ;]+)", LOCK, re.MULTILINE))


def asked() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]


def test_every_requirement_is_locked_within_its_bounds() -> None:
    versions = locked()
    for requirement in asked():
        version = versions[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement}: make lock"


def test_every_version_has_hashes_and_no_address() -> None:
    parts = re.split(r"\n(?=[a-z0-9])", LOCK.strip())
    assert len(parts) == len(locked()) > 100
    for part in parts:
        head, *hashes = part.split(" \\\n")
        assert hashes and all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", line) for line in hashes), head
    assert "://" not in LOCK and "+" not in "".join(locked().values()), "builds of another index than PyPI's"


def test_what_the_requirements_need_in_turn_is_locked_too() -> None:
    """As far as the packages installed here say, on this system."""
    versions, seen = locked(), set[tuple[str, frozenset[str]]]()
    ahead = asked()
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        if (name, extras := frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, extras))
        assert name in versions, f"{requirement}: make lock"
        if metadata.version(name).partition("+")[0] != versions[name]:
            continue  # it may need other things in this version
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                assert versions.get(canonicalize_name(needed.name), "0") in SpecifierSet(
                    str(needed.specifier), prereleases=True
                ), f"{name} needs {needed}: make lock"
                ahead.append(needed)
    assert len({name for name, _ in seen}) > 90
