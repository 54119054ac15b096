"""A URL in, its parts out, with and without secrets; and what may come of one request for bytes.

A transport makes one request and raises one of three faults. Who asked decides whether to try again.
"""

import re
from typing import NamedTuple, Protocol
from urllib.parse import quote, urlsplit

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_BROKEN_SCHEME = re.compile(r"^(https?|s3|gs|gcs):/[^/]", re.IGNORECASE)
HTTP_SCHEMES = ("http", "https")
PRINTABLE = "/%:@!$&'()*+,;=~"  # what a URL's path may hold besides letters, digits and -._


class TransferFault(Exception):
    """What may pass: resets, timeouts, 5xx. `wait_seconds`: how long the server asks to wait."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait_seconds = reason, wait_seconds


class Refused(Exception):
    """What no second try mends: no such file, no permission, no range requests."""

    def __init__(self, reason: str, advice: str, *, absent: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.advice, self.absent = reason, advice, absent


class WrongBytes(Exception):
    """An answer that is not what was written there. `final`: asking again would give the same."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.final = reason, final


class Transport(Protocol):
    """One request each; TransferFault, Refused or WrongBytes when it fails. Any thread may call."""

    def read_range(self, path: str, offset: int, nbytes: int) -> bytes:
        """Exactly the bytes offset to offset + nbytes of the file `path` of the dataset."""
        ...

    def read_whole(self, path: str, max_bytes: int) -> bytes:
        """All bytes of a small file."""
        ...


class Location(NamedTuple):
    """The root of a remote dataset. Only `url_of` and `userinfo` hold secrets; nothing prints them."""

    scheme: str
    base: str  # scheme://host/path, without userinfo, query and trailing slash: may be shown
    userinfo: str  # "user:password", or ""
    query: str  # of a signed URL, or ""

    def url_of(self, path: str) -> str:
        """Where a file of the dataset is asked for, without userinfo."""
        url = f"{self.base}/{quote(path)}" if self.scheme in HTTP_SCHEMES else f"{self.base}/{path}"
        return f"{url}?{self.query}" if self.query else url

    def shown(self, path: str) -> str:
        """The same for people: what may be secret is left out."""
        return f"{self.base}/{path}" + ("?..." if self.query else "")

    def __repr__(self) -> str:
        return f"Location({self.shown('')})"


def is_url(root: object) -> bool:
    """Whether a dataset's root is a URL, and no folder. ValueError for a URL that lost a slash."""
    text = str(root)
    if _BROKEN_SCHEME.match(text):
        raise ValueError(
            f"{redact(text)} has one slash where a URL has two: give it as text, not as a Path"
        )
    return _SCHEME.match(text) is not None


def parse_location(url: str) -> Location:
    """ValueError where the URL cannot be the root of a dataset."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its text may hold a password
        raise ValueError(
            "a dataset's URL has a port that is no number, or brackets that do not match "
            "(in a password, write / as %2F, : as %3A, @ as %40)"
        ) from None
    userinfo, _, host = parts.netloc.rpartition("@")
    scheme, path, query = parts.scheme.lower(), parts.path, parts.query
    if scheme in HTTP_SCHEMES:  # what is quoted already stays so
        path, query = quote(path, safe=PRINTABLE), quote(query, safe=PRINTABLE + "?")
    location = Location(scheme, f"{scheme}://{host}{path}".rstrip("/"), userinfo, query)
    problem = None
    if location.scheme == "file":
        problem = "is on this machine: give its path, without file://"
    elif location.scheme in HTTP_SCHEMES and not parts.hostname:
        problem = "names no host"
    elif location.scheme not in HTTP_SCHEMES and (userinfo or parts.query):
        problem = (
            "carries a user or a query: give credentials by the store's own files and variables"
        )
    elif parts.path.rstrip("/").endswith("manifest.json"):
        problem = "names a file: give the URL of the dataset's folder"
    elif parts.fragment:
        problem = (
            "has a # after it, which is no part of an address: write it as %23, or leave it out"
        )
    if problem:
        raise ValueError(f"{location.base} {problem}")
    return location


def redact(url: str) -> str:
    """A URL or path as messages may show it: no userinfo, no query."""
    if not re.match(r"^[a-z][a-z0-9+.-]*:/", url, re.IGNORECASE):
        return url
    start, _, query = url.partition("?")
    scheme, slashes, rest = re.split(r"(:/+)", start, maxsplit=1)
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}" + ("?..." if query else "")
