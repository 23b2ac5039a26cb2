"""URLs, by fsspec: gs://, s3://, https://, memory:// and every other kind it knows.

fsspec needs a package for most kinds of URL, such as gcsfs for gs://, and reports the one that is missing. Everything
here may be called from several threads and from spawned processes.
"""

from collections.abc import Iterator
import contextlib
import errno
from functools import lru_cache

import fsspec
import fsspec.core


def is_url(path: str) -> bool:
  """Whether fsspec reads the path; file:// is local."""
  return "://" in path and not path.startswith("file://")


@lru_cache
def _filesystem(root: str) -> fsspec.AbstractFileSystem:
  """One file system for all threads; fsspec caches one per thread, each with its own connections and listings."""
  try:
    return fsspec.core.url_to_fs(root)[0]
  except ImportError as error:
    raise ValueError(f"{root}: {error}") from None


@contextlib.contextmanager
def filesystem(url: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
  """The file system of a URL and the file's name in it; errors peculiar to the packages below become OSError."""
  system = _filesystem("/".join(url.split("/", 3)[:3]))
  try:
    yield system, system._strip_protocol(url)
  except FileNotFoundError:
    raise FileNotFoundError(errno.ENOENT, "no such file", url) from None
  except (OSError, ValueError):
    raise
  except Exception as error:
    raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def listing(folder: str) -> set[str]:
  """Files in a remote folder, as its file system names them; empty if it cannot be listed."""
  try:
    with filesystem(folder) as (system, name):
      return {info["name"] for info in system.ls(name, detail=True) if info["type"] == "file"}
  except OSError:
    return set()
