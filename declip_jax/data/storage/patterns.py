"""The files that a location names: paths and URLs with glob characters, ranges and alternatives."""

import glob
import itertools
import os
import re

from declip_jax.data.storage import files, remote


def expand(location: str) -> list[str]:
  """Returns the files that a location names, as absolute local paths or URLs.

  Args:
    location: a path or URL, with any mix of glob characters (`train-*.tar`), ranges (`train-{0000..0012}.tar`) and
      alternatives (`{val,test}.tar`); `::` joins several, as in webdataset. Ranges and alternatives expand in the order
      written, glob characters in alphabetical order. A local path that exists literally names that file, whatever
      characters it contains.

  Raises:
    FileNotFoundError: a pattern matches no file, or a file of a range is missing; the message lists what exists.
    ValueError: a range is empty, a part is a command (pipe:), or fsspec does not know this kind of URL or lacks the
      package for it.
  """
  found = []
  for given in location.split("::"):
    if not remote.is_url(given) and os.path.isfile(files.local_path(given)):
      found.append(files.local_path(given))
      continue
    if given.startswith("pipe:"):
      raise ValueError(f"{location}: pipe: is a command, and commands are not run; give the path or URL that it reads")
    patterns = _braces(given)
    match = _matching_urls if remote.is_url(patterns[0]) else _matching_paths
    for pattern, paths in zip(patterns, match(patterns), strict=True):
      if not paths:
        raise FileNotFoundError(f"{location}: no file matches {pattern}; {_neighbours(pattern)}")
      found += paths
  return found


def names(folder: str) -> list[str]:
  """Sorted names of the files in a folder; empty if it is not a folder or cannot be listed."""
  if remote.is_url(folder):
    with remote.filesystem(folder) as (system, _):
      system.invalidate_cache()  # of listings
    return sorted(path.rpartition("/")[2] for path in remote.listing(folder.rstrip("/")))
  return sorted(map(os.path.basename, _entries(files.local_path(folder))))


def folders(folder: str) -> list[str]:
  """Sorted names of the folders in a folder, except hidden ones; empty if it is not a folder or cannot be listed."""
  if remote.is_url(folder):
    names = [path.rstrip("/").rpartition("/")[2] for path in remote.listing(folder.rstrip("/"), "directory")]
  else:
    try:
      names = [entry.name for entry in os.scandir(files.local_path(folder)) if files.is_folder(entry)]
    except OSError:
      names = []
  return sorted(name for name in names if not name.startswith("."))


def _braces(pattern: str) -> list[str]:
  """`a-{08..10}` -> `a-08`, `a-09`, `a-10`; `{val,test}-0` -> `val-0`, `test-0`; others are literal, as in a shell."""
  for start in (place for place, character in enumerate(pattern) if character == "{"):
    depth, cuts = 0, [start]
    for stop in range(start, len(pattern)):
      depth += (pattern[stop] == "{") - (pattern[stop] == "}")
      if not depth:
        break
      if depth == 1 and pattern[stop] == ",":
        cuts.append(stop)
    else:
      continue  # never closed
    options = [pattern[first + 1 : last] for first, last in itertools.pairwise([*cuts, stop])]
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", pattern[start + 1 : stop]):
      first, last = match.groups()
      if int(first) > int(last):
        raise ValueError(f"{pattern}: the range {{{match.group()}}} is empty")
      options = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    elif len(options) == 1:
      continue
    return [path for option in options for path in _braces(pattern[:start] + option + pattern[stop + 1 :])]
  return [pattern]


def _matching_paths(patterns: list[str]) -> list[list[str]]:
  """Files that match each pattern; a range is checked against the listing of its folder, not file by file."""
  found = []
  for folder, group in itertools.groupby(map(files.local_path, patterns), os.path.dirname):
    same = list(group)
    listed = _entries(folder) if len(same) > 1 else set()
    literal = glob.escape(folder) if os.path.isdir(folder) else folder
    for path in same:
      if path in listed or (not listed and os.path.isfile(path)):
        found.append([path])
      else:
        pattern = os.path.join(literal, os.path.basename(path))
        matches = glob.glob(pattern, recursive=True) if glob.has_magic(path) else []
        found.append(sorted(filter(os.path.isfile, matches)))
  return found


def _entries(folder: str) -> set[str]:
  """Paths of the files in a local folder; empty if it cannot be listed."""
  try:
    return {os.path.join(folder, entry.name) for entry in os.scandir(folder) if entry.is_file()}
  except OSError:
    return set()


def _matching_urls(patterns: list[str]) -> list[list[str]]:
  """Files that match each pattern; a range is checked against the listing of its folder, not one request per file."""
  found = []
  for folder, group in itertools.groupby(patterns, lambda pattern: pattern.rpartition("/")[0]):
    same = list(group)
    with remote.filesystem(folder) as (system, _):
      system.invalidate_cache()
    listed = remote.listing(folder) if len(same) > 1 else set()
    for pattern in same:
      with remote.filesystem(pattern) as (system, name):
        if _has_magic(pattern):
          about = system.glob(name, detail=True).items()
          found.append(sorted(system.unstrip_protocol(path) for path, info in about if info["type"] == "file"))
        else:
          found.append([pattern] if (name in listed if listed else system.isfile(name)) else [])
  return found


def _has_magic(url: str) -> bool:
  return glob.has_magic(url.replace("?", "") if url.startswith("http") else url)  # where ? starts a query


def _neighbours(pattern: str) -> str:
  """The files near a pattern without a match, as text: files with its suffix, or all files if there are none."""
  if remote.is_url(pattern):
    names, folder = remote.listing(pattern), pattern
    while not names and (glob.has_magic(folder) or folder == pattern):
      folder = folder.rpartition("/")[0]
    names = names or remote.listing(folder)
  else:
    path = files.local_path(pattern)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    while glob.has_magic(folder):
      folder = os.path.dirname(folder)
    names = set(glob.glob("*", root_dir=folder))
  suffix = os.path.splitext(pattern)[1]
  alike = sorted(os.path.basename(name) for name in names if suffix and name.endswith(suffix))
  shown = alike or sorted(map(os.path.basename, names))
  return f"in {folder}: {', '.join(shown[:8]) or 'nothing'}" + (f" ... ({len(shown)})" if len(shown) > 8 else "")
