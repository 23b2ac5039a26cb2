"""Paths for libraries that do not take every path literally.

Orbax searches folders by glob patterns, in which `[`, `*` and `?` are special, and treats `/gs/...` as an address;
TensorStore treats a backslash as a slash and accepts only UTF-8. File systems have none of these rules.
"""

import atexit
from functools import cache
import os
from pathlib import Path
import re
import shutil
import tempfile

_SPECIAL = re.compile(r"[\[\]*?\\]|^/(?:gs|s3|az|hf)(?:/|$)")


def plain_path(folder: Path) -> Path:
  """Returns an absolute path to a folder that these libraries take literally.

  This is the path of the folder itself, or of a symbolic link to it that exists as long as the process. The folder need
  not exist yet. Names below it must be plain themselves.

  Raises:
    OSError: no link can be made.
  """
  folder = folder.resolve()
  return folder if _is_plain(folder) else _link(folder)


def _is_plain(path: Path) -> bool:
  try:
    return not _SPECIAL.search(os.fspath(path).encode().decode())
  except UnicodeEncodeError:  # the name of a file need not be UTF-8
    return False


@cache
def _link(folder: Path) -> Path:
  # The folder of temporary files may have such a name, too.
  places = [Path(place).resolve() for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")]
  place = next(filter(_is_plain, places))
  link = Path(tempfile.mkdtemp(prefix="declip_jax-", dir=place)) / "folder"
  link.symlink_to(folder, target_is_directory=True)
  atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
  return link
