"""The status and headers of an HTTP answer in, what they mean for reading a file out."""

import email.utils
import http.client
import re
import time
from http import HTTPStatus
from urllib.parse import urljoin, urlsplit

from data.transfer import HTTP_SCHEMES, Refused, TransferFault, WrongBytes

PASSING = (408, 425, 429)  # and every 5xx
RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+|\*)$")
ADVICE = {
    401: "It wants a user: name the host in ~/.netrc, or put user:password@ before it in the URL",
    403: "Check that it may be read from here, and whether a signed URL has expired",
    404: "Check the URL: it is that of the folder with manifest.json, and all its files are needed",
    407: "The proxy wants a user: put user:password@ into http_proxy or https_proxy",
}


def origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def redirected(url: str, target: str, headers: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The next URL and its headers: another host is told no password. Refused for what is no web URL."""
    following = urljoin(url, target)
    scheme = urlsplit(following).scheme
    if not target or scheme not in HTTP_SCHEMES or url.startswith("https") > (scheme == "https"):
        raise Refused("it redirects to what is no address, or to one without TLS", ADVICE[404])
    if origin(url) != origin(following):
        headers = {name: value for name, value in headers.items() if name != "Authorization"}
    return following, headers


def check_status(answer: http.client.HTTPResponse) -> None:
    """Return for 200 and 206; raise what every other status means."""
    status = answer.status
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise Refused(
                f"the server compresses its answers ({answer.headers['Content-Encoding']})",
                "Have it send these files as they are: ranges of compressed files are of no use",
            )
        return
    known = status in HTTPStatus.__members__.values()
    told = f"HTTP {status} {HTTPStatus(status).phrase}" if known else f"HTTP {status}"
    if status in PASSING or status >= 500:
        raise TransferFault(told, retry_after(answer.headers.get("Retry-After")))
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise WrongBytes(f"{told}: the file on the server is shorter", final=True)
    absent = status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE, HTTPStatus.FORBIDDEN)
    raise Refused(told, ADVICE.get(status, ADVICE[404]), absent=absent)


def check_content_range(value: str | None, offset: int, nbytes: int) -> None:
    """TransferFault or WrongBytes unless a 206 holds the bytes that were asked for."""
    match = RANGE.match(value or "")
    if match is None or int(match[1]) != offset or int(match[2]) >= offset + nbytes:
        raise TransferFault(
            f"bytes {offset}-{offset + nbytes - 1} were asked for, the server sends {value!r}"
        )
    if int(match[2]) < offset + nbytes - 1:
        size = match[3]
        ends_there = size != "*" and int(size) <= offset + nbytes - 1
        told = f"the file has {size} bytes only" if ends_there else f"the server sends {value!r}"
        raise WrongBytes(told, final=ends_there)


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date. None: it asks for nothing."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, until.timestamp() - time.time())
