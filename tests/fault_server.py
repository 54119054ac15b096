"""A folder in, a web server that fails as told out: faults by path and by request, every request logged."""

import email.utils
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

Kind = Literal[
    "status", "reset", "short", "drip", "hang", "no_range", "wrong_range", "flip", "longer", "redirect",
    "gzip", "silent_close",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer."""

    kind: Kind
    status: int = 503
    retry_after: str | None = None  # header of a status
    location: str = ""  # header of a redirect


@dataclass
class Request:
    path: str
    byte_range: str | None
    authorization: str | None
    connection: tuple[str, int]  # of the client
    at: float  # time.monotonic()
    num_bytes: int = 0  # of the body that were sent


@dataclass
class FaultServer:
    """Serves `root`. `script[path]` holds the faults of its first requests, `always[path]` of all others."""

    root: Path
    script: dict[str, list[Fault | None]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    scheme: str = "http"
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def num_bytes(self) -> int:
        return sum(request.num_bytes for request in self.requests)

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def next_fault(self, path: str) -> Fault | None:
        with self.lock:
            if self.script.get(path):
                return self.script[path].pop(0)
            return self.always.get(path)

    @classmethod
    @contextmanager
    def serving(cls, root: Path, certificate: Path | None = None) -> Iterator["FaultServer"]:
        """certificate: a PEM file with key and certificate, to serve https."""
        state = cls(root, scheme="https" if certificate else "http")
        handler = type("BoundHandler", (Handler,), {"state": state})
        server = Server(("127.0.0.1", 0), handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        state.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            state.stopping.set()
            server.shutdown()
            server.server_close()
            thread.join(10)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    """Plain file serving with Range, and the faults."""

    protocol_version = "HTTP/1.1"
    timeout = 20
    disable_nagle_algorithm = True
    state: FaultServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        request = Request(
            path,
            self.headers["Range"],
            self.headers["Authorization"],
            self.client_address,
            time.monotonic(),
        )
        self.state.requests.append(request)
        fault = self.state.next_fault(path)
        if fault is not None and fault.kind in ("status", "redirect", "hang", "silent_close"):
            self.refuse(fault)
            return
        file = self.state.root / path
        if not file.is_file():
            self.refuse(Fault("status", 404))
            return
        self.give(file.read_bytes(), request, fault.kind if fault else None)

    def do_CONNECT(self) -> None:
        """Be a proxy: pass bytes to and fro until one side ends."""
        self.state.requests.append(
            Request(
                self.path,
                None,
                self.headers["Proxy-Authorization"],
                self.client_address,
                time.monotonic(),
            )
        )
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as target:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=pipe, args=(target, self.connection), daemon=True)
            back.start()
            pipe(self.connection, target)
            back.join(10)
        self.close_connection = True

    def refuse(self, fault: Fault) -> None:
        if fault.kind == "hang":
            self.state.stopping.wait(15)
            self.close_connection = True
            return
        if fault.kind == "silent_close":
            self.close_connection = True
            return
        self.send_response(302 if fault.kind == "redirect" else fault.status)
        if fault.retry_after:
            self.send_header("Retry-After", fault.retry_after)
        if fault.location:
            self.send_header("Location", fault.location)
        body = b"an error page with SECRET words"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def give(self, whole: bytes, request: Request, kind: Kind | None) -> None:
        body, start = whole, 0
        ranged = request.byte_range is not None and kind != "no_range"
        if ranged:
            assert request.byte_range is not None
            first, _, last = request.byte_range.removeprefix("bytes=").partition("-")
            start = int(first)
            if start >= len(whole):
                self.refuse(Fault("status", 416))
                return
            body = whole[start : int(last) + 1]
        if kind == "flip":
            body = (
                body[: len(body) // 2]
                + bytes([body[len(body) // 2] ^ 4])
                + body[len(body) // 2 + 1 :]
            )
        self.send_response(206 if ranged else 200)
        if ranged:
            shift = 512 if kind == "wrong_range" else 0
            end = start + len(body) - 1
            self.send_header("Content-Range", f"bytes {start + shift}-{end + shift}/{len(whole)}")
        if kind == "longer":
            body += b"more"
        if kind == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send_body(body, request, kind)

    def send_body(self, body: bytes, request: Request, kind: Kind | None) -> None:
        if kind == "drip":
            for number in range(min(len(body), 200)):
                self.wfile.write(body[number : number + 1])
                request.num_bytes += 1
                if self.state.stopping.wait(0.05):
                    return
            self.close_connection = True
            return
        if kind in ("short", "reset"):
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
        request.num_bytes += len(body)
        if kind == "reset":
            self.wfile.flush()
            time.sleep(0.02)  # the half arrives before the reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def pipe(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def http_date(seconds_from_now: float) -> str:
    return email.utils.formatdate(time.time() + seconds_from_now, usegmt=True)
