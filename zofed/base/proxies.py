"""Proxies that the environment names: kept out of this machine's own connections, named where one is in the way.

Flower's processes connect with httpx, which takes the proxy of http_proxy, https_proxy or all_proxy for every address
that no_proxy does not list, this machine's own among them.
"""

import ipaddress
import re
from collections.abc import Mapping

from zofed.base import shell
from zofed.base.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def exempt(environment: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """The variables to set so that connections to LOOPBACK and `hosts` use no proxy; none where no proxy is set.

    What is exempt already stays so. An entry that httpx cannot read, an IPv6 network or an address in brackets, would
    end every process that opens a connection: networks are left out, brackets are taken off.
    """
    if not any(_in_force(scheme, environment) for scheme in ("http", "https", "all", "grpc")):
        return {}
    found: dict[str, str] = {}
    for name in ("no_proxy", "no_grpc_proxy"):
        given = environment.get(name, environment.get(name.upper()))
        if given is None and name != "no_proxy":
            continue
        entries = [entry.strip().strip("[]") for entry in (given or "").split(",")]
        listed = dict.fromkeys(entry for entry in [*entries, *LOOPBACK, *hosts] if entry and _is_readable(entry))
        found |= dict.fromkeys((name, name.upper()), ",".join(listed))
    return found


def towards(host: str, environment: Mapping[str, str], *, is_here: bool = False) -> dict[str, str]:
    """The environment for processes that connect to `host` and to this machine.

    is_here: `host` is an address of this machine, so that no proxy is needed. All proxies are put out of force there
    if httpx cannot use one of them, which would end the processes; for another `host` that raises UserError.
    """
    is_here = is_here or host in LOOPBACK
    problem = unusable(environment)
    if problem and not is_here:
        raise UserError(problem)
    aside = {"no_proxy": "*", "NO_PROXY": "*"} if problem else exempt(environment, *([host] if is_here else []))
    return {**environment, **aside}


def unusable(environment: Mapping[str, str]) -> str:
    """Which variable holds a proxy that httpx cannot use, why, and what to do; empty where none does."""
    import httpx

    if "*" in _no_proxy(environment).split(","):
        return ""
    for scheme in ("http", "https", "all"):
        if not (name := _in_force(scheme, environment)):
            continue
        value = environment[name]
        try:
            httpx.HTTPTransport(proxy=value if "://" in value else f"http://{value}", verify=False).close()
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            why = "SOCKS takes the package httpx[socks]" if isinstance(error, ImportError) else "that is no proxy's URL"
            remedy = f"give an HTTP proxy as http://HOST:PORT, or do without: unset {name}"
            return f"{name} = {masked(value)!r} cannot be used ({why}): {remedy}"
    return ""


def in_the_way(scheme: str, host: str, environment: Mapping[str, str]) -> str:
    """The proxy that a connection to `host` goes through, and what to do where it fails; empty where it goes directly.

    scheme: http or https.
    """
    name, listed = _in_force(scheme, environment) or _in_force("all", environment), _no_proxy(environment)
    entries = [entry.strip().lstrip(".").lower() for entry in listed.split(",")]
    if not name or any((entry and f".{host.lower()}".endswith(f".{entry}")) or entry == "*" for entry in entries):
        return ""
    without = shell.command("export", f"no_proxy={','.join(filter(None, [listed, host]))}")
    return (
        f"the connection goes through the proxy of {name} = {masked(environment[name])!r}: correct {name}, or, if "
        f"{host} is reached without a proxy, say so: {without}"
    )


def masked(value: str) -> str:
    """A proxy's URL without the name and password that it may hold."""
    return re.sub(r"^(\w[\w+.-]*://)?.*@", r"\1***@", value, flags=re.DOTALL)


def _in_force(scheme: str, environment: Mapping[str, str]) -> str:
    """Name of the variable that decides on a scheme: the lower-case one if it is there, even empty. Empty: none."""
    lower = f"{scheme}_proxy"
    name = lower if lower in environment else lower.upper()
    return name if environment.get(name) else ""


def _no_proxy(environment: Mapping[str, str]) -> str:
    return environment.get("no_proxy", environment.get("NO_PROXY", ""))


def _is_readable(entry: str) -> bool:
    """Whether httpx can read an entry of no_proxy: of those with several colons, IPv6 addresses alone."""
    if entry.count(":") < 2 or "://" in entry:
        return True
    try:
        return bool(ipaddress.ip_address(entry))
    except ValueError:
        return False
