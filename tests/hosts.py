"""Machines of their own, as far as a network can tell: namespaces with an address, a name and a cable each.

Needs root and iproute2; `hosts` skips where they are missing.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NET = "10.213.7"


class Hosts:
    """host 0 ... count - 1, with addresses NET.1 and up, on one switch."""

    def __init__(self, count: int) -> None:
        mark = f"cloze{os.getpid()}"
        self.switch = f"{mark}-switch"
        self.spaces = [f"{mark}-h{number}" for number in range(count)]

    def address(self, number: int) -> str:
        return f"{NET}.{number + 1}"

    def command(self, number: int, command: list[str]) -> list[str]:
        """`command`, as run on that host."""
        script = f'hostname host{number}; exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", script, "sh", *command]
        return ["ip", "netns", "exec", self.spaces[number], *inside]

    def unplug(self, number: int) -> None:
        """Pull the host's cable."""
        ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def deafen(self, number: int) -> None:
        """What the host sends arrives; nothing reaches it."""
        port = ("dev", f"port{number}")
        off = [
            word
            for name in ("learning", "flood", "mcast_flood", "bcast_flood")
            for word in (name, "off")
        ]
        run("bridge", "-n", self.switch, "link", "set", *port, *off)
        ip("-n", self.switch, "link", "set", *port, "type", "bridge_slave", "fdb_flush")

    def mend(self, number: int) -> None:
        """Whatever was done to the host's cable."""
        port = ("dev", f"port{number}")
        on = [
            word
            for name in ("learning", "flood", "mcast_flood", "bcast_flood")
            for word in (name, "on")
        ]
        run("bridge", "-n", self.switch, "link", "set", *port, *on)
        ip("-n", self.switch, "link", "set", *port, "up")

    def up(self) -> None:
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge0", "up")
        names = "".join(f"{self.address(n)} host{n}\n" for n in range(len(self.spaces)))
        for number, space in enumerate(self.spaces):
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            port = f"port{number}"
            ip(
                "-n",
                self.switch,
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            ip("-n", self.switch, "link", "set", port, "master", "bridge0", "up")
            ip("-n", space, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            etc = Path("/etc/netns", space)  # seen as /etc by what runs there
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="ascii")

    def down(self) -> None:
        for space in (*self.spaces, self.switch):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)


def ip(*words: str) -> None:
    run("ip", *words)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Up within the block. Skips the test where this machine does not allow it."""
    made = Hosts(count)
    try:
        try:
            made.up()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or b""
            pytest.skip(f"hosts need root and iproute2: {error} {said.decode()}")
        yield made
    finally:
        made.down()
