"""The files of the page, read once."""

import importlib.resources
import os
from dataclasses import dataclass
from hashlib import sha256

_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    content: bytes
    content_type: str
    etag: str


def load_page() -> dict[str, PageFile]:
    """The page's files by their paths: nothing a client sends ever becomes a file's name."""
    files = {}
    for entry in importlib.resources.files("tpilite.serving").joinpath("web").iterdir():
        kind = _CONTENT_TYPES.get(os.path.splitext(entry.name)[1])
        if kind is not None:
            content = entry.read_bytes()
            files["/" + entry.name] = PageFile(content, kind, f'"{sha256(content).hexdigest()[:20]}"')
    files["/"] = files.pop("/index.html")
    return files
