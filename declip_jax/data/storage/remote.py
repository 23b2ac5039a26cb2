"""URLs, read by fsspec: gs://, s3://, https://, memory:// and every other kind that it knows.

fsspec needs a package for most kinds of URL, such as gcsfs for gs://, and reports the one that is missing. Everything
here may be called from several threads and from spawned processes.
"""

from collections.abc import Iterator
import contextlib
import errno
from functools import lru_cache
import ipaddress
import re
import socket
from typing import Any
from urllib.parse import urljoin, urlsplit

import fsspec
import fsspec.core

_SCHEME = re.compile(r"((?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]*)://")


def scheme(path: str) -> str:
  """The kind of a URL in lower case, such as "https"; empty for a path."""
  match = _SCHEME.match(path)
  return match[1].lower() if match else ""


def is_url(path: str) -> bool:
  """Whether fsspec reads the path; file:// is local."""
  return scheme(path) not in ("", "file")


def without_query(path: str) -> str:
  """A path or URL without the query of a web address, such as "?download=true"."""
  return re.split(r"[?#]", path, maxsplit=1)[0] if scheme(path) in ("http", "https") else path


@lru_cache
def is_private(host: str) -> bool:
  """Whether a server may have an address that is not public: of this machine, a local network or a cloud's metadata.

  Raises:
    OSError: the name cannot be resolved.
  """
  try:
    found = {ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in socket.getaddrinfo(host, None)}
  except UnicodeError as error:  # no name of a server
    raise OSError(f"{host}: {error}") from None
  return not all((getattr(address, "ipv4_mapped", None) or address).is_global for address in found)


@lru_cache
def _filesystem(root: str) -> fsspec.AbstractFileSystem:
  """One file system for all threads; fsspec caches one per thread, each with its own connections and listings."""
  kind = scheme(root)
  try:
    return fsspec.core.url_to_fs(root, **(_web_options() if kind in ("http", "https") else {}))[0]
  except ImportError as error:
    extra = {"http": "https", "https": "https", "gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}.get(kind)
    how = f"; pip install 'declip_jax[{extra}]'" if extra else ""
    raise ValueError(f"{root}: {error}{how}") from None


def _web_options() -> dict[str, Any]:
  """Options for fsspec's web client: it follows no redirect from a public server to a private address."""
  import aiohttp  # pyrefly: ignore[missing-import]  # of the extra https; fsspec needs it for web addresses only

  async def check(session: Any, context: Any, redirect: Any) -> None:
    source, target = str(redirect.url), urljoin(str(redirect.url), redirect.response.headers.get("Location", ""))
    if is_private(urlsplit(target).hostname or "") and not is_private(urlsplit(source).hostname or ""):
      raise PermissionError(f"{source} redirects to a private address, {target}")

  tracing = aiohttp.TraceConfig()
  tracing.on_request_redirect.append(check)
  return {"client_kwargs": {"trace_configs": [tracing]}}


@contextlib.contextmanager
def filesystem(url: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
  """The file system of a URL and the file's name in it; errors peculiar to the packages below become OSError."""
  try:
    system = _filesystem("/".join(url.split("/", 3)[:3]))
    yield system, system._strip_protocol(url)
  except FileNotFoundError:
    raise FileNotFoundError(errno.ENOENT, "no such file", url) from None
  except (OSError, ValueError):
    raise
  except Exception as error:
    raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def listing(folder: str, kind: str = "file") -> set[str]:
  """Files in a remote folder, or those of another kind, as its file system names them; empty if it cannot be listed."""
  try:
    with filesystem(folder) as (system, name):
      return {info["name"] for info in system.ls(name, detail=True) if info["type"] == kind}
  except OSError:
    return set()
