"""The image in a row of a table: bytes, a path in the set's own folder, or a URL. Nothing else is read."""

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, build_opener

from detailflow.data.decode import first_line
from detailflow.errors import DetailFlowError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?=/)|[a-z]+::", re.IGNORECASE)
_HUB_URL = re.compile(r"(?:zip://[^:]+::)?hf://[^:]+(?::[^:]+)?")  # a file on the hub, or one in an archive there
_LARGEST = 512 * 2**20  # bytes that are fetched as one image
_TIMEOUT = 60  # seconds


def stored_image(value: Any, name: str, folders: Sequence[str], urls: bool) -> str | bytes:
    """Return the bytes in one row of an image column, or the path that it names.

    Args:
        name: the row, for messages.
        folders: those with the set's own files: a path must lead into one of them, links resolved.
        urls: whether a row may name a file on the web or the hub, which is then fetched.
    """
    content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if not content:
        raise DetailFlowError(f"{name} has no image: its row is empty")
    if isinstance(content, bytes):
        return content
    if not isinstance(content, str):
        raise DetailFlowError(f"{name} has no image: its row holds {type(content).__name__}")
    if _URL.match(content):
        if urls and (_HUB_URL.fullmatch(content) or content.lower().startswith("https://")):
            return _fetch(content, name)
        kinds = "only https:// and hf:// are read" if urls else "URLs are read only from hub data sets and streams"
        raise DetailFlowError(f"{name} names {_short(content)}, which is not fetched: {kinds}")
    for folder in () if "\0" in content else map(os.path.realpath, folders):
        path = os.path.realpath(os.path.join(folder, content))
        if path.startswith(os.path.join(folder, "")):
            return path
    raise DetailFlowError(
        f"{name} names {_short(content)}, which is not in the folder of its set: no other file is read"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}…")


def _fetch(url: str, name: str) -> bytes:
    try:
        content = _download(url)
    except Exception as error:  # every kind of file system has errors of its own
        raise DetailFlowError(f"{name} cannot be fetched from {_short(url)} ({first_line(error)})") from error
    if len(content) > _LARGEST:
        raise DetailFlowError(f"{name} cannot be fetched: {_short(url)} has more than {_LARGEST >> 20} MiB")
    return content


def _download(url: str) -> bytes:
    """Return the file at a URL, or the first `_LARGEST` + 1 bytes of it."""
    if url.lower().startswith("https://"):
        _check_public(url)
        with build_opener(_HttpsRedirects()).open(url, timeout=_TIMEOUT) as response:
            return bytes(response.read(_LARGEST + 1))
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(url, "rb") as file:
        return bytes(file.read(_LARGEST + 1))


class _HttpsRedirects(HTTPRedirectHandler):
    """Follow redirects to other public https servers, and to nothing else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_public(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_public(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme.lower() != "https" or not parts.hostname or _is_local(parts.hostname, parts.port or 443):
        raise DetailFlowError(f"{_short(url)} is not an https:// address on the public web")


@lru_cache(4096)
def _is_local(host: str, port: int) -> bool:
    """Return whether a name leads to this machine or its own network, where a data set must not look."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:  # only the proxy may know the name
        return host == "localhost"
    return not all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found)
