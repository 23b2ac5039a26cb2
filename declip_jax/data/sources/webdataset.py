"""WebDataset tar shards with random access, read where they lie.

A sample is a run of neighbouring members whose paths agree up to the first dot of the file name, webdataset's own rule.
The index keeps one byte span per sample, `[n 3]` int64 of (shard, start, stop). Reading a sample is one `pread`, and
its tar headers are parsed again in that buffer, so names, sizes and fields take no room in the index. Members that are
not used (a .npy of features, say) are read along with it.

The index of a set of shards is a memory-mapped .npy file in `.declip_jax/` next to the first shard, or in the user's
cache folder where that is read-only. Its file name is a hash of the paths, sizes and modification times of the shards,
so it can never be older than they are, and any number of processes and hosts share it. One file for the whole set, not
one per shard, keeps a worker at one mapping and a pickle at one path, however many shards there are.

| field | members, the first that is there |
|---|---|
| image | .jpg .jpeg .png .webp |
| captions | a list in .json ("captions", "caption", "text"); else .txt; else a string in .json |
| label | .cls, a whole number |
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
import glob
import hashlib
import io
import itertools
import json
import os
from pathlib import Path
import re
import tempfile
from typing import Any, BinaryIO, NamedTuple
import weakref

from absl import logging
import numpy as np

from declip_jax.data.sources.base import Example

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("json", "txt", "cls")
_CAPTION_KEYS = ("captions", "caption", "text")  # of the .json; img2dataset writes "caption"
_INDEX_FORMAT = 1  # part of the hash: raise it when the index or the rules for usable samples change
_OPEN_SHARDS = 128  # per process and source: far below the usual limit of 1024 descriptors, for sets of any size
_BLOCK = 512
_END = bytes(_BLOCK)
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")  # "LENGTH KEY=VALUE\n", where LENGTH counts all of it


class _Member(NamedTuple):
  """A regular file of a tar: its first header is at `start`, its contents from `data` to `stop`, all in bytes."""

  key: str
  suffix: str
  start: int
  data: int
  stop: int


class _Shard:
  """An open tar. The descriptor closes when the last thread that reads from it lets go, not when a cache drops it."""

  def __init__(self, path: str):
    self._descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._descriptor)

  def read(self, start: int, size: int) -> bytes:
    return os.pread(self._descriptor, size, start)


class WebDataset:
  """Tar shards as a `Source`; make it with `open_webdataset`."""

  def __init__(self, name: str, index: Path):
    self.name = name
    self._index = index

  @cached_property
  def _spans(self) -> np.ndarray:
    return np.asarray(np.load(self._index, mmap_mode="r"))  # still mapped, without the slow indexing of np.memmap

  @cached_property
  def _about(self) -> dict[str, Any]:
    return json.loads(self._index.with_suffix(".json").read_text())

  @cached_property
  def _shard(self) -> Callable[[str], _Shard]:
    return lru_cache(_OPEN_SHARDS)(_Shard)

  @cached_property
  def classnames(self) -> tuple[str, ...]:
    """Line i of classnames.txt beside the first shard is class i; empty without that file."""
    path = Path(self._about["shards"][0]).with_name("classnames.txt")
    return tuple(map(str.strip, path.read_text("utf-8").rstrip().splitlines())) if path.is_file() else ()

  @property
  def skipped(self) -> dict[str, int]:
    return dict(self._about["skipped"])

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, index: int) -> Example:
    """Reads one sample; where all its captions are empty and it has no class, it still comes, with neither.

    Raises:
      IndexError: `index` is not in `range(len(self))`.
      ValueError: the shard changed since it was indexed, or its .json or .cls cannot be parsed.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name}: no sample {index}, there are {len(self)}")
    shard, start, stop = self._spans[index].tolist()
    path = self._about["shards"][shard]
    buffer = self._shard(path).read(start, stop - start)
    place = f"{path}, sample at byte {start}"
    members = list(_members(io.BytesIO(buffer), len(buffer), place))
    if len(buffer) < stop - start or not members:
      raise ValueError(f"{place}: the shard changed since it was indexed, open it again")
    place = f"{os.path.basename(path)}:{members[0].key}"
    return self._example({member.suffix: buffer[member.data : member.stop] for member in members}, place)

  def _example(self, fields: dict[str, bytes], place: str) -> Example:
    image = next((fields[suffix] for suffix in _IMAGES if suffix in fields), None)
    if image is None:
      raise ValueError(f"{place}: no image; the shard changed since it was indexed, open it again")
    label = _label(fields.get("cls", b"-1"), len(self.classnames), place)
    return Example(image=image, captions=_captions(fields, place), label=label, id=place)

  def __getstate__(self) -> dict[str, Any]:
    return {"name": self.name, "_index": self._index}

  def __repr__(self) -> str:
    return f"WebDataset({self.name!r})"


def open_webdataset(location: str) -> WebDataset:
  """Opens a set of shards, and indexes them first if no index of just these files is found.

  Samples without an image, or with neither caption nor class, are left out and counted in `skipped`. So is the sample
  in which a shard was cut off; those before it stay. A bucket is read through a mount, such as gcsfuse.

  Args:
    location: a path with glob characters (`train-*.tar`), ranges (`train-{0000..0012}.tar`), both or neither; `::`
      joins several of them, as in webdataset. Within a pattern the shards are in alphabetical order.

  Raises:
    FileNotFoundError: a pattern matches no file, or a shard of a range is missing.
    ValueError: a shard is not a plain tar, or no sample is usable.
  """
  shards = _expand(location)
  stats = [os.stat(shard) for shard in shards]
  stamp = [_INDEX_FORMAT, [(shard, stat.st_size, stat.st_mtime_ns) for shard, stat in zip(shards, stats, strict=True)]]
  file = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:24] + ".npy"
  user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  folders = Path(shards[0]).parent / ".declip_jax", user_cache / "declip_jax"
  index = next((folder / file for folder in folders if (folder / file).is_file()), None)
  if index is None:
    logging.info("indexing %d shards of %s, once", len(shards), location)
    spans, skipped = _build(shards)
    if not len(spans):
      raise ValueError(f"{location}: no usable sample in {len(shards)} shards, skipped {dict(skipped)}")
    index = _write(folders, file, spans, {"shards": shards, "skipped": skipped})
  return WebDataset(f"webdataset:{location}", index)


def _expand(location: str) -> list[str]:
  """Absolute paths of the shards; every pattern must match a file."""
  shards = []
  for pattern in itertools.chain(*map(_ranges, location.split("::"))):
    path = os.path.abspath(os.path.expanduser(pattern))
    found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    if not found:
      folder = path if os.path.isdir(path) else os.path.dirname(path)
      tars = sorted(glob.glob("*.tar", root_dir=folder))
      shown = ", ".join(tars[:8]) + (f" ... ({len(tars)})" if len(tars) > 8 else "")
      raise FileNotFoundError(f"{location}: no shard matches {pattern}; tars in {folder}: {shown or 'none'}")
    shards += found
  return shards


def _ranges(pattern: str) -> list[str]:
  """`a-{08..10}` -> `a-08`, `a-09`, `a-10`."""
  match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
  if not match:
    return [pattern]
  first, last = match.groups()
  if int(first) > int(last):
    raise ValueError(f"{pattern}: the range {match.group()} is empty")
  numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
  return [path for number in numbers for path in _ranges(pattern[: match.start()] + number + pattern[match.end() :])]


def _build(shards: list[str]) -> tuple[np.ndarray, Counter[str]]:
  """Spans `[n 3]` of the usable samples of all shards, and counts of the others. Threads hide the latency of disks."""
  with ThreadPoolExecutor(min(32, len(shards))) as pool:
    scans = list(pool.map(_scan, shards))
  spans = [np.insert(span, 0, shard, axis=1) for shard, (span, _) in enumerate(scans)]
  return np.concatenate(spans), sum((skipped for _, skipped in scans), Counter())


def _write(folders: Iterable[Path], file: str, spans: np.ndarray, about: dict[str, Any]) -> Path:
  """Stores the index in the first folder that takes it. The .npy goes last: where it is, the index is whole."""
  error = None
  for folder in folders:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      _write_atomic((folder / file).with_suffix(".json"), lambda out: out.write(json.dumps(about).encode()))
      _write_atomic(folder / file, lambda out: np.save(out, spans))
      return folder / file
    except OSError as failure:
      error = failure
  raise OSError(f"no place for the index of the shards: {error}; set XDG_CACHE_HOME to a folder that can be written")


def _write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as out:
    try:
      write(out)
      out.flush()
      os.chmod(out.name, 0o644)  # others may use the shards too
      os.replace(out.name, path)
    except BaseException:
      os.unlink(out.name)
      raise


def _scan(path: str) -> tuple[np.ndarray, Counter[str]]:
  """Spans `[m 2]` of the usable samples of one shard, and counts of the others by reason."""
  spans, skipped, size = [], Counter(), os.stat(path).st_size
  with open(path, "rb", buffering=8192) as file:  # several headers a read if files are small, little waste if not
    for _, group in itertools.groupby(_members(file, size, path), lambda member: member.key):
      members = list(group)
      reason = _unusable({member.suffix for member in members}, truncated=members[-1].stop > size)
      if reason:
        skipped[reason] += 1
      else:
        spans.append((members[0].start, members[-1].stop))
  return np.array(spans, np.int64).reshape(-1, 2), skipped


def _unusable(suffixes: set[str], truncated: bool) -> str | None:
  if truncated:
    return "truncated shard"
  if suffixes.isdisjoint(_IMAGES):
    return "no image"
  return "no caption or class" if suffixes.isdisjoint(_TEXTS) else None


def _captions(fields: dict[str, bytes], place: str) -> tuple[str, ...]:
  values = _json_captions(fields["json"], place) if "json" in fields else []
  many = next((value for value in values if isinstance(value, list)), [])
  one = [value for value in values if isinstance(value, str)]
  return _strip(many) or _strip([fields.get("txt", b"").decode("utf-8", "replace")]) or _strip(one)[:1]


def _json_captions(text: bytes, place: str) -> list[Any]:
  try:
    parsed = json.loads(text)
  except ValueError as error:
    raise ValueError(f"{place}: bad .json: {error}") from None
  return [parsed[key] for key in _CAPTION_KEYS if key in parsed] if isinstance(parsed, dict) else []


def _strip(captions: Iterable[Any]) -> tuple[str, ...]:
  stripped = (text.strip() for text in captions if isinstance(text, str))
  return tuple(filter(None, stripped))


def _label(text: bytes, classes: int, place: str) -> int:
  label = int(text) if re.fullmatch(rb"\s*-?\d+\s*", text) else None
  if label is None or label < -1 or (classes and label >= classes):
    legal = f"to {classes - 1}, the last line of classnames.txt" if classes else "up"
    raise ValueError(f"{place}: bad .cls {text[:40]!r}: expected a whole number from -1 {legal}")
  return label


# The tar format: POSIX.1-2024 "pax", and the GNU tar manual, "Basic Tar Format", for GNU's own header types.


def _members(file: BinaryIO, size: int, place: str) -> Iterator[_Member]:
  """Regular files of a tar, in order, except hidden ones and those without a suffix, which belong to no sample.

  A tar that ends within a member ends with that member, or one without a name, whose `stop` exceeds `size`.
  """
  start = offset = 0
  extended = {}
  while (header := _read(file, offset, _BLOCK)) not in (b"", _END):
    if len(header) < _BLOCK:
      yield _Member("", "", start, offset, size + 1)
      return
    name, kind, length = _header(header, f"{place}, byte {offset}")
    data, extension = offset + _BLOCK, kind in b"xgLK"
    length = length if extension else extended.get("size", length)
    offset = data + -(-length // _BLOCK) * _BLOCK
    if extension and data + length <= size:
      extended |= _extension(kind, _read(file, data, length))
      continue
    key, suffix = _split(extended.get("path", name))
    if extension or (kind in (b"0", b"\0", b"7") and key):
      yield _Member(key, suffix, start, data, data + length)
    start, extended = offset, {}


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
  file.seek(offset)
  return file.read(size)


def _split(path: str) -> tuple[str, str]:
  """`a/b.c.JPG` -> `a/b`, `c.jpg`; nothing for a name without a stem or a suffix."""
  folder, slash, file = path.rpartition("/")
  stem, _, suffix = file.partition(".")
  return (folder + slash + stem, suffix.lower()) if stem and suffix else ("", "")


def _header(block: bytes, place: str) -> tuple[str, bytes, int]:
  """Name, type and size in a header; links, folders and devices have no contents, whatever their size says."""
  try:
    if block[257:262] != b"ustar" and _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
      raise ValueError  # the tars of before 1988 have no magic, only a checksum, which counts itself as spaces
    kind, size = block[156:157], _number(block[124:136])
  except ValueError:
    raise ValueError(f"{place}: no tar header; is the file damaged or compressed?") from None
  name = block[:100].partition(b"\0")[0]
  if block[257:263] == b"ustar\0" and block[345]:
    name = block[345:500].partition(b"\0")[0] + b"/" + name
  return _text(name), kind, 0 if kind in b"123456" else size


def _number(field: bytes) -> int:
  """An octal number, or GNU's base 256 for those that are too long."""
  if field[0] & 0x80:
    return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
  return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _extension(kind: bytes, body: bytes) -> dict[str, Any]:
  """Path and size that a GNU long name or a PAX header gives to the member after it."""
  found = {}
  if kind == b"L":
    found["path"] = _text(body.partition(b"\0")[0])
  while kind == b"x" and (match := _PAX_RECORD.match(body)):
    size, key = int(match[1]), match[2]
    value, body = body[match.end() : size - 1], body[max(size, match.end()) :]
    if key in (b"path", b"size"):
      found[key.decode()] = _text(value) if key == b"path" else int(value)
  return found


_text = partial(str, encoding="utf-8", errors="backslashreplace")  # a name must be fit to print in an error
