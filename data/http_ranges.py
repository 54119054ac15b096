"""A dataset's file and a byte range in, the bytes out: one request over http or https.

The standard library's client: kept-alive connections, one per thread and host; proxies as
`http_proxy`, `https_proxy` and `no_proxy` say; passwords of the URL or of netrc; certificates checked
by the system's authorities.
"""

import base64
import http.client
import netrc
import os
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import NamedTuple, final
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from data.http_answers import ADVICE, check_content_range, check_status, origin, redirected
from data.transfer import Location, Refused, TransferFault, WrongBytes

WHOLE_FILE_BYTES = 8 << 20  # a server without range requests may send this much, and no more
READ_BYTES = 1 << 20
IDLE_SECONDS = (
    30.0  # a connection unused for longer is opened anew: what is between may have dropped it
)
ERROR_PAGE_BYTES = 1 << 14  # read to keep the connection; with more, a new one is cheaper
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)


class _Connection(NamedTuple):
    client: http.client.HTTPConnection
    prefix: str  # what comes before the path in the request line: for a plain proxy, the origin
    headers: dict[str, str]  # for the proxy
    used_at: float  # time.monotonic()


class _Kept:
    """Origin -> connection, of one thread; closed when the thread or the transport ends."""

    def __init__(self) -> None:
        self.connections: dict[str, _Connection] = {}
        weakref.finalize(self, close_all, self.connections)  # __del__ comes too late in a cycle


@final
class HttpTransport:
    """Reads files below `location`. No request lasts longer than `timeout_seconds`, redirects included."""

    def __init__(self, location: Location, timeout_seconds: float) -> None:
        self.location, self.timeout_seconds = location, timeout_seconds
        self._userinfo = location.userinfo or userinfo_of(location)
        self._local = threading.local()

    def __reduce__(self) -> tuple[type, tuple[Location, float]]:
        return HttpTransport, (self.location, self.timeout_seconds)

    def read_range(self, path: str, offset: int, nbytes: int) -> bytes:
        deadline = time.monotonic() + self.timeout_seconds
        wanted = {"Range": f"bytes={offset}-{offset + nbytes - 1}"}
        with self._answer(path, wanted, deadline) as (answer, sock):
            if answer.status == HTTPStatus.PARTIAL_CONTENT:
                check_content_range(answer.headers.get("Content-Range"), offset, nbytes)
                return self._body(answer, sock, nbytes, deadline)
            refusal = Refused(
                "the server ignores range requests (it answers 200 with the whole file)",
                "Serve the dataset by a server that knows them, or copy it to this machine",
            )
            if (answer.length or 0) > WHOLE_FILE_BYTES:
                raise refusal
            try:
                data = self._body(answer, sock, WHOLE_FILE_BYTES, deadline)
            except WrongBytes:
                raise refusal from None
        if len(data) < offset + nbytes:
            raise WrongBytes(f"the file has {len(data)} bytes only", final=True)
        return data[offset : offset + nbytes]

    def read_whole(self, path: str, max_bytes: int) -> bytes:
        deadline = time.monotonic() + self.timeout_seconds
        with self._answer(path, {}, deadline) as (answer, sock):
            if answer.status != HTTPStatus.OK:
                raise TransferFault("the server answers 206 where no range was asked for")
            return self._body(answer, sock, max_bytes, deadline)

    def _body(
        self, answer: http.client.HTTPResponse, sock: socket.socket, max_bytes: int, deadline: float
    ) -> bytes:
        """The answer's body. WrongBytes when it is longer than `max_bytes`."""
        parts, nbytes = [], 0
        while nbytes <= max_bytes:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TransferFault(
                    f"the answer is not complete after {self.timeout_seconds:g} s: {nbytes} bytes came"
                )
            sock.settimeout(remaining)
            part = answer.read1(min(READ_BYTES, max_bytes + 1 - nbytes))
            if not part:
                break
            parts.append(part)
            nbytes += len(part)
        if nbytes > max_bytes:
            raise WrongBytes(f"the answer is longer than the {max_bytes} bytes that may come")
        if answer.length:
            raise TransferFault(
                f"the connection ended after {nbytes} of {nbytes + answer.length} bytes"
            )
        return b"".join(parts)

    @contextmanager
    def _answer(
        self, path: str, headers: dict[str, str], deadline: float
    ) -> Iterator[tuple[http.client.HTTPResponse, socket.socket]]:
        """An answer with status 200 or 206, redirects followed; its connection is kept if all was read."""
        url, headers = (
            self.location.url_of(path),
            {"Accept-Encoding": "identity", "User-Agent": "cloze", **headers},
        )
        if self._userinfo:
            headers["Authorization"] = basic(self._userinfo)
        with translated(self.timeout_seconds):
            for _ in range(MAX_REDIRECTS + 1):
                answer, sock = self._ask(url, headers, deadline)
                if answer.status not in REDIRECTS:
                    break
                self._finish(url, answer)
                url, headers = redirected(url, answer.headers.get("Location", ""), headers)
            else:
                raise Refused(f"it redirects more than {MAX_REDIRECTS} times", ADVICE[404])
            try:
                check_status(answer)
                yield answer, sock
            finally:
                self._finish(url, answer)

    def _ask(
        self, url: str, headers: dict[str, str], deadline: float
    ) -> tuple[http.client.HTTPResponse, socket.socket]:
        """Send a request; a connection that was kept and has ended meanwhile is replaced at once."""
        connection = self._kept(url)
        if connection is not None:
            try:
                return self._send(connection, url, headers, deadline)
            except (ConnectionError, ssl.SSLEOFError):
                connection.client.close()
        return self._send(connect(url), url, headers, deadline)

    def _send(
        self, connection: _Connection, url: str, headers: dict[str, str], deadline: float
    ) -> tuple[http.client.HTTPResponse, socket.socket]:
        client = connection.client
        parts = urlsplit(url)
        path = connection.prefix + (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        remaining = max(deadline - time.monotonic(), 0.001)
        try:
            client.timeout = remaining
            if client.sock is not None:
                client.sock.settimeout(remaining)
            client.request("GET", path, headers={**headers, **connection.headers})
            sock = client.sock
            assert sock is not None
            answer = client.getresponse()
        except BaseException:
            client.close()
            raise
        self._connections()[origin(url)] = connection._replace(used_at=time.monotonic())
        return answer, sock

    def _connections(self) -> dict[str, _Connection]:
        """This thread's connections; a forked process opens its own."""
        if getattr(self._local, "process", None) != os.getpid():
            self._local.process, self._local.kept = os.getpid(), _Kept()
        return self._local.kept.connections

    def _kept(self, url: str) -> _Connection | None:
        connection = self._connections().pop(origin(url), None)
        if connection is None or connection.client.sock is None:
            return None
        if time.monotonic() - connection.used_at > IDLE_SECONDS:
            connection.client.close()
            return None
        return connection

    def _finish(self, url: str, answer: http.client.HTTPResponse) -> None:
        """Keep the connection when its answer was read to the end, or is a short error page."""
        if answer.length and answer.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            with suppress(OSError, http.client.HTTPException):
                answer.read1(ERROR_PAGE_BYTES)
        whole = answer.isclosed() or answer.length == 0
        answer.close()
        if not whole and (connection := self._connections().pop(origin(url), None)):
            connection.client.close()


@contextmanager
def translated(timeout_seconds: float) -> Iterator[None]:
    """Errors of sockets, TLS and HTTP become faults of a transfer; nothing of the URL is told."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise Refused(
            f"its certificate is not valid: {error.verify_message}",
            "Set SSL_CERT_FILE to the authority that signed it, if you trust that",
        ) from None
    except http.client.InvalidURL:
        raise Refused("the URL is not valid", "Write spaces and the like as %20") from None
    except TimeoutError:
        raise TransferFault(f"no complete answer within {timeout_seconds:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        told = error.strerror if isinstance(error, OSError) else None
        raise TransferFault(f"{type(error).__name__}: {told or 'connection lost'}") from None


def close_all(connections: dict[str, _Connection]) -> None:
    for connection in connections.values():
        connection.client.close()


def basic(userinfo: str) -> str:
    return "Basic " + base64.b64encode(unquote(userinfo).encode()).decode()


def userinfo_of(location: Location) -> str:
    """ "user:password" of the host in the file that $NETRC names, else ~/.netrc; "" where there is none.

    So that no preset needs to hold a password. ValueError for a file that is no netrc.
    """
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        found = netrc.netrc(path).hosts.get(urlsplit(location.base).hostname or "")
    except FileNotFoundError:
        return ""
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no netrc file: {type(error).__name__}") from None
    return f"{quote(found[0])}:{quote(found[2] or '')}" if found else ""


def connect(url: str) -> _Connection:
    """A client for the URL's host, not yet connected, through the environment's proxy if there is one."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    address = getproxies().get(parts.scheme)
    if not address or proxy_bypass(parts.hostname):
        return _Connection(kind(parts.hostname, parts.port), "", {}, 0.0)
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    userinfo = proxy.netloc.rpartition("@")[0]
    headers = {"Proxy-Authorization": basic(userinfo)} if userinfo else {}
    client = kind(proxy.hostname or "", proxy.port)
    if not secure:
        return _Connection(client, origin(url), {"Host": parts.netloc, **headers}, 0.0)
    client.set_tunnel(parts.hostname, parts.port, headers)
    return _Connection(client, "", {}, 0.0)
