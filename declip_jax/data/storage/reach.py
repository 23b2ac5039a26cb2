"""Where paths that are written in data may lead.

A spec is written by the user, and its paths and URLs are trusted: they may lead anywhere. A path or URL in a table, a
COCO file or a saved data set is written by whoever made the data, and may only lead to a file below the root of the
list; so may links in a folder of images. Everything else must be allowed in the spec. There, `root=` names another
root, and `allow=` has any of these words, joined by commas:

| word | allows |
|---|---|
| https, gs, s3 and other kinds of URL | URLs of this kind |
| private | also if the server has a private address: of this machine, a local network or a cloud's metadata |
| outside | files of this machine outside of the root: absolute paths, ".." and symbolic links that lead there |
"""

from collections.abc import Mapping
import errno
from functools import lru_cache
import os
import posixpath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import fsspec

from declip_jax.data.storage import files, remote

_WORDS = ("outside", "private")
# Kinds of URL that name a server; others name a bucket, and the user's settings name its server.
_SERVERS = {"http", "https", "ftp", "ftps", "sftp", "ssh", "smb", "hdfs", "webhdfs", "webdav", "jlab", "jupyter"}


class NotAllowedError(ValueError):
  """A path in data leads to a place that the spec does not allow."""


class Reach(NamedTuple):
  """Where the paths in a list may lead.

  Attributes:
    root: the folder or URL that paths are relative to and stay below; None for the folder of the list.
    allow: words of the table above.
  """

  root: str | None = None
  allow: frozenset[str] = frozenset()

  @classmethod
  def of(cls, wanted: Mapping[str, str]) -> "Reach":
    """Reads `root` and `allow` of a spec.

    Raises:
      ValueError: `allow` has an unknown word.
    """
    words = frozenset(filter(None, wanted.get("allow", "").split(",")))
    if unknown := sorted(words - {*_WORDS, *fsspec.available_protocols()}):
      raise ValueError(
        f"allow={unknown[0]}: expected outside, private, or a kind of URL such as https, joined by commas"
      )
    root = wanted.get("root")
    return cls(None if not root else root.rstrip("/") if remote.is_url(root) else files.local_path(root), words)

  def resolve(self, path: str, folder: str) -> str:
    """Returns the file to which a path leads, as an absolute path or a URL.

    Args:
      path: a path or URL from data.
      folder: the root if the spec has none.

    Raises:
      NotAllowedError: it leads to a place that is not allowed.
      FileNotFoundError: it leads to a place outside of the root where there is nothing.
      OSError: the name of its server cannot be resolved.
    """
    root = folder if self.root is None else self.root
    scheme = remote.scheme(path)
    if scheme == "file":
      path, scheme = path[len("file://") :], ""
    if scheme:
      return self._url(path, scheme, root)
    if not remote.is_url(root):
      return self._local(path, root)
    if path.startswith("/"):
      raise NotAllowedError(f"{path} is a path of this machine, but {root} is not")
    return self._remote(path, root)

  def _url(self, url: str, scheme: str, root: str) -> str:
    if remote.is_url(root) and url.startswith(f"{root}/"):
      return self._remote(url[len(root) + 1 :], root)
    if "::" in scheme:
      raise NotAllowedError(f"{url} joins several file systems")
    if scheme not in self.allow:
      allowed = ",".join(sorted({*self.allow, scheme}))
      raise NotAllowedError(f"{url} is not below {root}; if you trust the data, allow such URLs with allow={allowed}")
    host = urlsplit(url).hostname or ""
    if scheme in _SERVERS and "private" not in self.allow and remote.is_private(host):
      allowed = ",".join(sorted({*self.allow, "private"}))
      raise NotAllowedError(f"{url} has a private address; if you trust the data, allow such URLs with allow={allowed}")
    return url

  def _remote(self, path: str, root: str) -> str:
    if any(posixpath.normpath(form).startswith("..") for form in (path, unquote(path))):
      raise NotAllowedError(f"{path} leads outside {root}")
    return f"{root}/{path}"

  def _local(self, path: str, root: str) -> str:
    full = os.path.normpath(os.path.join(root, path))
    if "outside" in self.allow:
      return full
    folder, name = os.path.split(full)
    real = os.path.realpath(full) if os.path.islink(full) else os.path.join(_real(folder), name)
    if _is_below(full, root) and _is_below(f"{real}/", _real(root)):  # a link may lead to the root itself
      return full
    if not os.path.exists(full):
      raise FileNotFoundError(errno.ENOENT, "no such file", full)
    how = "is a link that leads outside" if _is_below(full, root) else "is not below"
    raise NotAllowedError(f"{path} {how} {root}; if you trust the data, allow such paths with allow=outside")


def _is_below(path: str, folder: str) -> bool:
  return path.startswith(f"{folder.rstrip('/')}/")


@lru_cache(2**14)
def _real(folder: str) -> str:
  return os.path.realpath(folder)
