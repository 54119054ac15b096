"""A dataset's file and a byte range in, the bytes out: one request to s3, gs or another fsspec store.

Credentials, endpoints and regions are the store's own: s3fs and gcsfs read the usual files and
variables (AWS_PROFILE, AWS_ENDPOINT_URL, FSSPEC_S3_ANON=true, GOOGLE_APPLICATION_CREDENTIALS).
"""

from typing import Any, final

import fsspec
from fsspec.asyn import sync

from data.transfer import Location, Refused, TransferFault, WrongBytes

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # scheme -> extra of this project
ABSENT = "Check the URL: it is that of the folder with manifest.json, and all its files are needed"


@final
class ObjectStoreTransport:
    """Reads objects below `location`. ValueError when the store's package is not installed."""

    def __init__(self, location: Location, timeout_seconds: float) -> None:
        self.location, self.timeout_seconds = location, timeout_seconds
        if location.scheme not in (
            *EXTRAS,
            "memory",
        ):  # fsspec knows many more: shells, archives, this disk
            raise ValueError(
                f"{location.base}: {location.scheme}:// is not read; http, https, s3 and gs are"
            )
        try:
            fsspec.get_filesystem_class(location.scheme)
        except ImportError:
            extra = EXTRAS[location.scheme]
            raise ValueError(
                f"{location.base}: reading {location.scheme}:// needs the extra {extra!r}: "
                f"pip install 'cloze[{extra}]'"
            ) from None

    def read_range(self, path: str, offset: int, nbytes: int) -> bytes:
        data = self._cat(path, offset, offset + nbytes)
        if len(data) != nbytes:
            raise WrongBytes(f"{nbytes} bytes were asked for, {len(data)} came")
        return data

    def read_whole(self, path: str, max_bytes: int) -> bytes:
        data = self._cat(path, None, None)
        if len(data) > max_bytes:
            raise WrongBytes(f"the object is longer than the {max_bytes} bytes it may have")
        return data

    def _cat(self, path: str, start: int | None, end: int | None) -> bytes:
        url = self.location.url_of(path)
        try:
            # fsspec keeps instances by process and thread, so a forked process gets its own
            store: Any = fsspec.filesystem(self.location.scheme)
            key = store._strip_protocol(url)
            if not store.async_impl:
                return store.cat_file(key, start=start, end=end)
            window: Any = {"start": start, "end": end, "timeout": self.timeout_seconds}
            data: Any = sync(store.loop, store._cat_file, key, **window)
            return data
        except FileNotFoundError:
            raise Refused("no such object", ABSENT, absent=True) from None
        except PermissionError:
            advice = (
                "Check the credentials (a public bucket: set FSSPEC_S3_ANON=true) and their rights"
            )
            raise Refused("it may not be read", advice, absent=True) from None
        except Exception as error:
            raise self._fault_of(error) from None

    def _fault_of(self, error: Exception) -> Exception:
        """What an error of the store's library means. (The location of a store holds no secrets.)"""
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, TimeoutError):
            return TransferFault(f"no answer within {self.timeout_seconds:g} s")
        if "Credentials" in type(error).__name__:
            return Refused(told, "Give the store's credentials by its own files or variables")
        if "InvalidRange" in told or "range is not satisfiable" in told:
            return WrongBytes("the object is shorter", final=True)
        return TransferFault(told)
