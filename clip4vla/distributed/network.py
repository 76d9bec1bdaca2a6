"""Choose for gloo, before the ranks join, the network interface and how many connections it makes."""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
MANY = 64  # ranks; each would open a connection to every other one in each of the two groups


def prepare_gloo(address: str, ranks: int, several_hosts: bool) -> None:
    """Set GLOO_SOCKET_IFNAME and TORCH_GLOO_LAZY_INIT in the environment where they help and the user has not set them.

    address: MASTER_ADDR. Left to itself, gloo listens where the host's own name leads, which may be 127.0.1.1 or a network
    that the other hosts do not reach.
    """
    if several_hosts and "GLOO_SOCKET_IFNAME" not in os.environ:
        own = route_to(address)
        name = interface_of(own) if own and not ipaddress.ip_address(own).is_loopback else ""
        if name:
            os.environ["GLOO_SOCKET_IFNAME"] = name
    if ranks >= MANY:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connect two ranks when they first have something to send


def route_to(host: str) -> str:
    """Find this machine's own address on the route to a host, without sending anything; "" if there is no route."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:  # say without IPv6
                probe.connect(address)
                return probe.getsockname()[0].partition("%")[0]
    return ""


def interface_of(own: str) -> str:
    """Name the network interface that has this address, IPv4 or IPv6; "" if none has it as its first."""
    if ":" in own:
        wanted = ipaddress.ip_address(own).packed.hex()
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
        return next((line.split()[-1] for line in lines if line.split()[0] == wanted), "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return ""
