"""Hosts of a network on this machine: namespaces with addresses of their own, joined by a bridge.

Each has its own loopback, interface, address, routes and ports; files and processors are shared, as on a cluster with a
parallel file system. What leaves a host passes a token bucket, so bandwidth is limited, and a delay where the kernel
can (netem).
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """A namespace; ``cable`` is its end at the bridge."""

    name: str
    address: str
    cable: str

    def start(self, command: list[str], **options: object) -> "subprocess.Popen[str]":
        """A process on this host."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)  # type: ignore[call-overload,no-any-return]

    def cut(self) -> None:
        """Pull the cable."""
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Plug it in again."""
        ip("link", "set", self.cable, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def reason_against() -> str:
    """Why there can be no such hosts here, or ''."""
    if os.geteuid() or not shutil.which("ip"):
        return "network namespaces need root and the command ip (iproute2)"
    name = f"mc{os.getpid()}probe"
    try:
        ip("netns", "add", name)
        ip("link", "add", f"{name[:11]}b", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces or bridges here: {error.stderr.decode().strip()}"
    finally:
        for words in (("link", "del", f"{name[:11]}b"), ("netns", "del", name)):
            with suppress(subprocess.CalledProcessError):
                ip(*words)
    return ""


@contextmanager
def network(count: int, rate: str = "200mbit", delay: str = "1ms") -> Iterator[list[Host]]:
    """``count`` hosts, 10.77.x.1 and so on, which are gone afterwards, with all their processes' connections."""
    number = next(_numbers)
    tag, net = f"mc{os.getpid() % 10**6}x{number}", f"10.77.{(os.getpid() + number) % 250}"
    hosts = [Host(f"{tag}h{each}", f"{net}.{each + 1}", f"{tag}c{each}") for each in range(count)]
    bridge = f"{tag}b"
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for host in hosts:
            ip("netns", "add", host.name)
            ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", host.cable, "master", bridge, "up")
            for words in (("addr", "add", f"{host.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                ip("-n", host.name, *words)
            ip("-n", host.name, "link", "set", "lo", "up")
            shape(host, rate, delay)
        yield hosts
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", host.name)
        for device in (bridge, *(host.cable for host in hosts)):
            with suppress(subprocess.CalledProcessError):
                ip("link", "del", device)


def shape(host: Host, rate: str, delay: str) -> bool:
    """Limit what leaves the host; whether it is delayed too, which not every kernel can."""
    tc = ["tc", "-n", host.name, "qdisc", "add", "dev", "eth0"]
    bucket = ["tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]
    subprocess.run([*tc, "root", "handle", "1:", *bucket], check=True, capture_output=True)
    return not subprocess.run([*tc, "parent", "1:1", "netem", "delay", delay], capture_output=True).returncode
