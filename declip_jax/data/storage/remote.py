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
from urllib.parse import urlsplit

import fsspec
import fsspec.asyn
import fsspec.core

from declip_jax.extras import install_command

_SCHEME = re.compile(r"((?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]*)://")
_PIECE = 2**18  # bytes
_UNICAST = ipaddress.ip_network("2000::/3")  # all addresses of IPv6 for servers on the internet
# IPv6 addresses that end with one of IPv4: those of NAT64 (RFC 6052), IPv4-mapped and IPv4-compatible ones (RFC 4291).
_CARRIERS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "::ffff:0:0/96", "::/96")))


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
    return not all(_is_public(address[0]) for *_, address in socket.getaddrinfo(host, None))
  except UnicodeError as error:  # no name of a server
    raise OSError(f"{host}: {error}") from None


def _is_public(text: str | int) -> bool:
  """Whether an address is that of one server on the internet; an IPv6 address may carry one of IPv4."""
  address = ipaddress.ip_address(str(text).partition("%")[0])
  if isinstance(address, ipaddress.IPv6Address):
    if any(address in network for network in _CARRIERS):
      return _is_public(str(ipaddress.IPv4Address(int(address) % 2**32)))
    if address.sixtofour is not None:
      return _is_public(str(address.sixtofour))
    if address not in _UNICAST:
      return False
  return address.is_global and not address.is_multicast


@lru_cache
def _filesystem(root: str) -> fsspec.AbstractFileSystem:
  """One file system for all threads; fsspec caches one per thread, each with its own connections and listings."""
  kind = scheme(root)
  try:
    return fsspec.core.url_to_fs(root, **(_web_options(root) if kind in ("http", "https") else {}))[0]
  except ImportError as error:
    extra = {"http": "https", "https": "https", "gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}.get(kind)
    how = f"; {install_command(extra)}" if extra else ""
    raise ValueError(f"{root}: {error}{how}") from None


def _web_options(root: str) -> dict[str, Any]:
  """Options for fsspec's web client: a public server leads to no private address.

  Addresses are checked when the client connects to them, so that neither a redirect of any form nor a name that now has
  another address avoids the check.
  """
  import aiohttp  # pyrefly: ignore[missing-import]  # of the extra https; fsspec needs it for web addresses only

  if is_private(urlsplit(root).hostname or ""):  # the user allowed it
    return {}

  async def client(**options: Any) -> Any:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=_public_socket), **options)

  return {"get_client": client}


def _public_socket(address: tuple[Any, ...]) -> socket.socket:
  """A socket for an address as `socket.getaddrinfo` describes it.

  Raises:
    PermissionError: the address is private.
  """
  family, kind, protocol, _, (host, *_) = address
  if not _is_public(host):
    raise PermissionError(errno.EACCES, f"leads to a private address, {host}")
  return socket.socket(family, kind, protocol)


@contextlib.contextmanager
def filesystem(url: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
  """The file system of a URL and the file's name in it; errors peculiar to the packages below become OSError."""
  try:
    system = _filesystem("/".join(url.split("/", 3)[:3]))
    yield system, system._strip_protocol(url)
  except FileNotFoundError:
    raise FileNotFoundError(errno.ENOENT, "no such file", url) from None
  except (OSError, ValueError) as error:
    if isinstance(error.__cause__, PermissionError):  # the web client wraps that of `_public_socket`
      raise PermissionError(errno.EACCES, error.__cause__.strerror, url) from None
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


def read_range(url: str, start: int, stop: int) -> bytes:
  """Bytes `start` to `stop` of a file, fewer if it ends before, or slightly more if the server sends more than that.

  Raises:
    OSError: the file cannot be read, or a web server ignores ranges and sends it from its start.
  """
  if start == stop:
    return b""
  with filesystem(url) as (system, name):
    if scheme(url) in ("http", "https"):
      return fsspec.asyn.sync(system.loop, _fetch, system, name, start, stop)
    return system.cat_file(name, start=start or None, end=stop)


async def _fetch(system: Any, url: str, start: int, stop: int) -> bytes:
  """`read_range` of a web address; fsspec's own `cat_file` keeps all that a server sends, which may have no end."""
  options = {**system.kwargs, "headers": {**system.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}"}}
  session, found = await system.set_session(), bytearray()
  async with session.get(system.encode_url(url), **options) as response:
    if response.status == 404:
      raise FileNotFoundError(url)
    response.raise_for_status()
    if start and response.status != 206:
      raise OSError(f"{url}: the server ignores ranges; download the file first")
    async for piece in response.content.iter_chunked(_PIECE):
      found += piece
      if len(found) > stop - start:
        break
  return bytes(found)
