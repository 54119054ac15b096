"""A web archive in, its pages' texts out, as (number, text, metadata, reason, detail).

HTML of responses with status 200 (main text), and texts that were extracted before (WET). Records that are
neither, such as requests and images, are passed over; those that cannot be read are reported.
"""

import codecs
from collections.abc import Iterator
from typing import Any, BinaryIO

from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from data.corpus.encodings import decode
from data.corpus.html import main_text

Found = tuple[int, str | None, dict[str, str], str | None, str]
HTML_TYPES = ("text/html", "application/xhtml+xml")
FAULTS = (ArchiveLoadFailed, ValueError, KeyError, EOFError, OSError, AttributeError)


def read_warc(stream: BinaryIO) -> Iterator[Found]:
    """Every page, numbered by its record. After damage nothing can be found: one reason, then the end."""
    records: Any = ArchiveIterator(stream, arc2warc=True, check_digests=False)
    number = -1
    while True:
        number += 1
        try:
            record = next(records)
            found = _read_record(number, record)
        except StopIteration:
            return
        except FAULTS as error:
            yield number, None, {}, "damaged_archive", f"record {number}: {error}"
            return
        if found is not None:
            yield found


def _read_record(number: int, record: Any) -> Found | None:
    """None for a record that holds no page."""
    metadata = {}
    if url := record.rec_headers.get_header("WARC-Target-URI"):
        metadata["url"] = url
    if record.rec_type == "conversion":
        return _decoded(number, record, metadata, None)
    headers = record.http_headers
    if record.rec_type not in ("response", "resource") or headers is None:
        return None
    content_type = (headers.get_header("Content-Type") or "").lower()
    if headers.get_statuscode() != "200" or not content_type.startswith(HTML_TYPES):
        return None
    charset = content_type.partition("charset=")[2].strip(" \"';") or None
    number, page, metadata, reason, detail = _decoded(number, record, metadata, charset)
    if page is None:
        return number, None, metadata, reason, detail
    text = main_text(page)
    if text is None:
        return number, None, metadata, "no_main_text", f"in {len(page)} characters of HTML"
    return number, text, metadata, None, ""


def _decoded(number: int, record: Any, metadata: dict[str, str], charset: str | None) -> Found:
    data = record.content_stream().read()
    if missing := getattr(record.raw_stream, "limit", 0):
        return number, None, metadata, "cut_off_record", f"{missing} bytes of it were not there"
    try:
        codecs.lookup(charset or "utf-8")
    except LookupError:  # the server's name for it is none that is known: evidence decides
        charset = None
    decoded = decode(data, charset)
    if decoded.text is None:
        return number, None, metadata, decoded.reason, decoded.detail
    if decoded.encoding and decoded.encoding != "utf-8":
        metadata["encoding"] = decoded.encoding
    return number, decoded.text, metadata, None, ""
