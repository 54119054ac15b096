"""Named JSON values in, the same out on any machine: what tasks of `cloze doctor --cluster` tell each other.

Every task has a board, which listens on a port of its own. Values are put on the first task's; the other boards
are there to be reached. A value is waited for on the board's side. All waits end.
"""

import json
import socket
import socketserver
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

MAX_BYTES = 1 << 24  # of one request or answer
CONNECT_SECONDS = 5.0
SPARE_SECONDS = 5.0  # for an answer to arrive, beyond the time that it was to be waited for
RETRY_SECONDS = 0.2


class Address(NamedTuple):
    host: str
    port: int


class _Values:
    """What has been put on a board; any thread may wait for it."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._changed = threading.Condition()

    def put(self, name: str, value: Any) -> None:
        with self._changed:
            self._values[name] = value
            self._changed.notify_all()

    def wait(self, name: str, seconds: float) -> tuple[bool, Any]:
        """(whether it is there, its value)."""
        with self._changed:
            is_there = self._changed.wait_for(lambda: name in self._values, seconds)
            return is_there, self._values.get(name)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True  # of a board that was closed a moment ago; never of one that is open
    request_queue_size = 1024
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def __init__(self, port: int) -> None:
        self.values = _Values()
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever does not speak as we do, or leaves early, is no concern of ours."""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        request = json.loads(self.rfile.readline(MAX_BYTES))
        assert isinstance(self.server, _Server)
        values, name = self.server.values, request["name"]
        if "value" in request:
            values.put(name, request["value"])
            is_there, value = True, None
        else:
            is_there, value = values.wait(name, request["seconds"])
        answer = {"time": time.time(), "is_there": is_there, "value": value}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


class Board:
    """Open within the block. OSError where the port is taken; port 0: any that is free."""

    def __init__(self, port: int) -> None:
        self._server = _Server(port)
        self.values = self._server.values
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def put(place: "Address | Board", name: str, value: Any, seconds: float = CONNECT_SECONDS) -> None:
    """Put a value on the board at `place`. OSError where that is not possible within `seconds`."""
    if isinstance(place, Board):
        return place.values.put(name, value)
    deadline = time.monotonic() + seconds
    while True:
        try:
            _ask(place, {"name": name, "value": value}, 0)
            return
        except OSError:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise
        time.sleep(RETRY_SECONDS)


def get(place: "Address | Board", name: str, seconds: float) -> Any:
    """Wait for a value. TimeoutError where it does not come within `seconds`, another OSError without board."""
    if isinstance(place, Board):
        is_there, value = place.values.wait(name, seconds)
    else:
        answer = _ask(place, {"name": name, "seconds": seconds}, seconds)
        is_there, value = answer["is_there"], answer["value"]
    if not is_there:
        raise TimeoutError(f"{name} was not told within {seconds:.0f} s")
    return value


def clock_offset(place: Address, exchanges: int = 5) -> float:
    """Seconds that our clock is ahead of the board's machine's, as the quickest exchange tells. OSError."""
    offsets = []
    for _ in range(exchanges):
        before, began = time.time(), time.monotonic()
        there = _ask(place, {"name": "time", "seconds": 0}, 0)["time"]
        took = time.monotonic() - began
        offsets.append((took, before + took / 2 - there))
    return min(offsets)[1]


def why_not_reached(place: Address, seconds: float = CONNECT_SECONDS) -> str | None:
    """None where something listens there; else what a connection has come to."""
    try:
        socket.create_connection(place, timeout=seconds).close()
    except OSError as error:
        return reason_of(error)
    return None


def reason_of(error: OSError) -> str:
    """In words, with what it may mean."""
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, TimeoutError):
        return "no answer (a firewall that drops packets, or the machine is down)"
    if isinstance(error, ConnectionRefusedError):
        return "refused (nothing listens there, or a firewall rejects it)"
    return error.strerror or str(error)


def own_address(towards: str) -> str:
    """The address that this machine has in the network of the host `towards`. OSError: its name is unknown."""
    family, _, _, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect(address)
        return probe.getsockname()[0]


def _ask(place: Address, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    with socket.create_connection(place, timeout=CONNECT_SECONDS) as line:
        line.settimeout(seconds + SPARE_SECONDS)
        line.sendall(json.dumps(request).encode() + b"\n")
        raw = line.makefile("rb").readline(MAX_BYTES)
    with suppress(ValueError):
        answer = json.loads(raw)
        if isinstance(answer, dict) and {"time", "is_there", "value"} <= answer.keys():
            return answer
    raise OSError(f"something else answers at {place.host}:{place.port}: {raw[:40]!r}")
