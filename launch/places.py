"""Where this node is in the network: the address by which the others reach it, and its interface. Linux and macOS."""

import os
import socket
import struct
from contextlib import suppress

PORT = 29400
"""Where nodes meet, if nobody says otherwise (torchrun's)."""
ANYWHERE = "192.0.2.1"
"""An address of nobody (RFC 5737): the route to it is the default route."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def meeting_point(text: str) -> tuple[str, int]:
    """Host and port of ``host[:port]``. Raises ValueError."""
    host, colon, port = text.rpartition(":") if text.count(":") == 1 else (text, "", "")
    if not host or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise ValueError(f"--meet={text} must be HOST or HOST:PORT, such as gpu001:{PORT}")
    return host, int(port) if colon else PORT


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def refusal(port: int) -> str:
    """Why this process cannot listen there on this machine, such as `Address already in use`; '' where it can."""
    try:
        socket.create_server(("", port)).close()
    except OSError as reason:
        return os.strerror(reason.errno) if reason.errno else str(reason)
    return ""


def is_here(host: str) -> bool:
    """Whether ``host`` is one of this machine's own addresses. Raises OSError where the name is not known."""
    for family, kind, number, _, where in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, number) as probe, suppress(OSError):
            probe.bind(where)
            return True
    return False


def own_address(meet: str) -> str:
    """This machine's address on the way to the host ``meet``; the default route's where that is a loopback.

    Raises OSError where ``meet`` is not known or there is no way.
    """
    address = _source_towards(meet)
    if address.startswith("127.") or address == "::1":  # /etc/hosts of many machines gives their own name 127.0.1.1
        with suppress(OSError):
            return _source_towards(ANYWHERE)
    return address


def _source_towards(host: str) -> str:
    family, kind, number, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, number) as probe:
        probe.connect(where)  # sends nothing: the kernel looks up the route
        address: str = probe.getsockname()[0]
    return address


def interface_of(address: str) -> str:
    """The name of the interface that has this IPv4 address, or '' where that cannot be told."""
    try:
        import fcntl
    except ImportError:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""
