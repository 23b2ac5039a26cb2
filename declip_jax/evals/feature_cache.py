"""Features on disk: a data set is encoded once by a model, whatever is evaluated later.

An entry is a folder, whose name is a hash of everything that features depend on:

  about.json                           what was encoded, for people, and its time of use
  host-00000-of-00004.npy              float32 or float16 `[rows, f + d]`: pooled features, then joint embeddings
  host-00000-of-00004.rows/00000.npz   the other fields of `Features` of the first block of rows

Features are mapped into memory, not read, unless they are float16 and asked for in float32. A block of rows is valid
once its `.npz`, which has its checksum, exists; so an entry that was interrupted is continued after its last block, by
anyone who may write it.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
from dataclasses import replace
import errno
import hashlib
import io
import json
import os
from pathlib import Path
import shutil
import stat
import tempfile
import time
from typing import Any
import zipfile
import zlib

import jax
from jaxtyping import Float
import numpy as np

from declip_jax.data.sources import Source
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import Features, Read, encode_batches, join, read_batches, surely
from declip_jax.reporting.progress import message
from declip_jax.runtime import records
from declip_jax.runtime.hosts import any_host, barrier
from declip_jax.spelling import counted

BLOCK = 4096  # rows
_IN_USE = 3600  # seconds since its last use for which an entry is not removed: another process may write or read it
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)  # errors of a folder or file that this user cannot write
LIMIT = 200 * 2**30  # bytes
_VERSION = 2  # of what features of the same model and images are


class FeatureCache:
  """`features.encode` that looks features up in a folder first, for one model.

  Args:
    folder: folder of all entries, shared by models and users, on every host the same.
    weights: hash of the model's weights, see `tree_hash`.
    model: fields of the model and its compute dtype, as JSON.
    widths: widths of pooled features and of joint embeddings, 0 without a joint space.
    limit: bytes of all entries; before a new one is begun, the ones that were not used for longest are removed, except
      those that were used within the last hour.
  """

  def __init__(self, folder: Path, weights: str, model: Mapping[str, Any], widths: tuple[int, int], limit: int = LIMIT):
    self._folder, self._widths, self._limit = folder, widths, limit
    self._model = {"version": _VERSION, "weights": weights, "model": dict(model), **numerics()}
    self._used: set[Path] = set()
    self._shards: dict[tuple[Path, range], _Shard] = {}

  def encode(
    self, source: Source | Sequence[Any], encoders: Encoders, rows: range, read: Read = read_batches
  ) -> Features:
    """Features of this host's rows of a source in float32, from disk as far as they are there.

    Raises:
      ValueError, OSError: as in `encode_mapped`.
    """
    found = self.encode_mapped(source, encoders, rows, read)
    pooled, embedding = jax.tree.map(lambda x: x.astype(np.float32, copy=False), (found.pooled, found.embedding))
    return replace(found, pooled=pooled, embedding=embedding)

  def encode_mapped(
    self, source: Source | Sequence[Any], encoders: Encoders, rows: range, read: Read = read_batches
  ) -> Features:
    """`encode` in the dtype in which features are stored, so that they stay on disk until they are used.

    A folder that this user cannot write, such as an entry that another user has begun, is left as it is.

    Raises:
      ValueError: the source has no samples.
      OSError: an image cannot be read now, see `surely`, or the disk of the folder failed or is full.
    """
    if not len(source):
      raise ValueError(f"{source.name} has no samples")
    entry = self.entry(source, encoders)
    self._used.add(entry)
    shard, read = self._shard(source, encoders, rows), surely(read)
    if any_host(not shard.is_complete()):
      self._begin(entry, source, encoders)
      if not shard.is_writable():
        message(f"{source.name}: its features are not kept, since {entry} cannot be written")
        found = join([*encode_batches(source, encoders, rows, read)])
        barrier()
        return found
      for features in encode_batches(source, encoders, rows[shard.rows_done() :], read):
        shard.add(features)
      shard.finish()
      barrier()
    _use(entry)
    return shard.read()

  def entry(self, source: Source | Sequence[Any], encoders: Encoders) -> Path:
    """The folder of the features of a source."""
    return self._folder / json_hash(self._about(source, encoders))

  def rows_left(self, source: Source | Sequence[Any], encoders: Encoders, rows: range) -> int:
    """How many of this host's rows have no features yet."""
    return len(rows) - self._shard(source, encoders, rows).rows_done()

  def num_bytes(self, source: Source | Sequence[Any], encoders: Encoders) -> int:
    """Size of the features of a source."""
    return np.dtype(encoders.features_dtype).itemsize * sum(self._widths) * len(source)

  def _shard(self, source: Source | Sequence[Any], encoders: Encoders, rows: range) -> "_Shard":
    """This host's rows of an entry, whose checksums are verified only once."""
    key = self.entry(source, encoders), rows
    if key not in self._shards or not self._shards[key].exists():
      self._shards[key] = _Shard(*key, self._widths, encoders.features_dtype)
      _use(key[0])
    return self._shards[key]

  def _about(self, source: Source | Sequence[Any], encoders: Encoders) -> dict[str, Any]:
    limits = {"max_pixels": encoders.reading.max_pixels, "max_seconds": encoders.reading.seconds}
    data = {"source": source.name, "stamp": source.stamp, "samples": len(source), **limits}
    view = {"engine": "exact", **vars(encoders.view)}
    half = {} if encoders.features_dtype == "float32" else {"dtype": encoders.features_dtype}
    return {**self._model, **data, **half, "view": view}

  def _begin(self, entry: Path, source: Source | Sequence[Any], encoders: Encoders) -> None:
    """Reports and makes room, on the first host; the others wait."""
    if jax.process_index() == 0:
      size = self.num_bytes(source, encoders)
      message(
        f"{source.name}: encoding {counted(len(source), 'image')}; features take {size / 2**20:,.1f} MiB in {entry}"
      )
      for old in remove_oldest(self._folder, self._limit - size, self._used):
        message(f"removed the features in {old}, since all together would take more than --cache_limit")
      with if_allowed():
        entry.mkdir(parents=True, exist_ok=True)
        records.write(entry / "about.json", json.dumps(self._about(source, encoders), indent=2).encode())
    barrier()


@contextlib.contextmanager
def if_allowed() -> Iterator[None]:
  """Ignores that this user cannot write a file."""
  try:
    yield
  except OSError as error:
    if error.errno not in _DENIED:
      raise


def _use(entry: Path) -> None:
  """Keeps an entry from being removed for a while."""
  with contextlib.suppress(OSError):  # it is another user's, or it has not been begun
    os.utime(entry / "about.json")


def remove_oldest(folder: Path, limit: int, used: set[Path]) -> Iterator[Path]:
  """Removes the entries that were not used for longest until the others take at most `limit` bytes.

  Args:
    folder: folder of entries.
    limit: bytes.
    used: entries to keep in any case, besides those that were used within the last hour.

  Yields:
    The entries that were removed.
  """
  entries = {about.parent: facts.st_mtime_ns for about in folder.glob("*/about.json") if (facts := _stat(about))}
  sizes = {entry: sum(facts.st_size for path in entry.rglob("*") if (facts := _stat(path))) for entry in entries}
  recent = time.time_ns() - _IN_USE * 10**9
  for entry in sorted(entries, key=lambda entry: (entries[entry], entry)):
    if sum(sizes.values()) <= limit:
      return
    if entry not in used and entries[entry] < recent:
      shutil.rmtree(entry, ignore_errors=True)
      del sizes[entry]
      yield entry


def _stat(path: Path) -> os.stat_result | None:
  """The facts on a file; None if it is none, or if another process has removed it."""
  try:
    found = path.stat()
  except OSError:
    return None
  return found if stat.S_ISREG(found.st_mode) else None


class _Shard:
  """One host's rows of an entry.

  Args:
    entry: folder of the entry.
    rows: this host's rows of the source.
    widths: see `FeatureCache`.
    dtype: of the features in the file.
  """

  def __init__(self, entry: Path, rows: range, widths: tuple[int, int], dtype: str):
    name = f"host-{jax.process_index():05}-of-{jax.process_count():05}"
    self._entry, self._path, self._blocks = entry, entry / f"{name}.npy", entry / f"{name}.rows"
    self._count, self._widths, self._dtype = len(rows), widths, np.dtype(dtype)
    self._waiting: list[Features] = []
    self._header = _header(self._dtype, (len(rows), sum(widths)))
    self._done = self._valid_blocks()

  def exists(self) -> bool:
    """Whether its file is there, and of the right size."""
    facts = _stat(self._path)
    size = len(self._header) + self._dtype.itemsize * self._count * sum(self._widths)
    return not self._count or (facts is not None and facts.st_size == size)

  def is_writable(self) -> bool:
    """Whether this user can write what is missing; makes the files."""
    if self.is_complete():
      return True
    with if_allowed():
      self._make()
      with tempfile.TemporaryFile(dir=self._blocks):
        return True
    return False

  def is_complete(self) -> bool:
    return self.rows_done() == self._count and self.exists()

  def rows_done(self) -> int:
    return min(self._done * BLOCK, self._count)

  def add(self, features: Features) -> None:
    """Adds rows, and writes those of each block that is complete."""
    self._waiting.append(features)
    while sum(len(part.label) for part in self._waiting) >= BLOCK:
      joined = join(self._waiting)
      self._write(_rows(joined, slice(BLOCK)))
      self._waiting = [_rows(joined, slice(BLOCK, None))]

  def finish(self) -> None:
    """Writes the last block, which may be shorter."""
    if self._waiting and len((last := join(self._waiting)).label):
      self._write(last)
    self._waiting = []

  def read(self) -> Features:
    """All rows, whose features stay on disk until they are used."""
    stored, split = self._features("r"), self._widths[0]
    blocks = [_load(path) for path in self._block_paths()]
    parts = [_annotations(block, len(block["label"])) for block in blocks] or [_annotations(None, 0)]
    joined = join(parts)
    return Features(
      stored[:, :split],
      stored[:, split:] if self._widths[1] else None,
      joined.label,
      joined.labels,
      joined.groups,
      joined.id,
      joined.readable,
      joined.captions,
      joined.image_hash,
    )

  def _valid_blocks(self) -> int:
    """The number of blocks from the first on that are as they were written."""
    if not self._count or not self.exists():
      return 0
    features = self._features("r")
    for number, path in enumerate(self._block_paths()):
      try:
        checksum = int(_load(path)["checksum"])
      except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # absent or damaged
        return number
      if checksum != zlib.crc32(np.ascontiguousarray(features[number * BLOCK : (number + 1) * BLOCK])):
        return number
    return -(-self._count // BLOCK)

  def _block_paths(self) -> list[Path]:
    return [self._blocks / f"{number:05}.npz" for number in range(-(-self._count // BLOCK))]

  def _features(self, mode: str) -> Float[np.ndarray, "rows columns"]:
    """The mapped file."""
    shape = self._count, sum(self._widths)
    if not self._count:  # an empty file cannot be mapped
      return np.zeros(shape, self._dtype)
    return np.memmap(self._path, self._dtype, mode, len(self._header), shape)

  def _make(self) -> None:
    """Makes the file without rows, or gives it its size; rows of another process that encodes the same remain."""
    self._blocks.mkdir(parents=True, exist_ok=True)
    with open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
      file.write(self._header)
      file.truncate(len(self._header) + self._dtype.itemsize * self._count * sum(self._widths))

  def _write(self, block: Features) -> None:
    """Writes the next block: first its features, then the file that says that they are valid."""
    features = block.pooled if block.embedding is None else np.concatenate([block.pooled, block.embedding], axis=1)
    features = np.ascontiguousarray(features, self._dtype)
    stored = self._features("r+")
    stored[self._done * BLOCK : self._done * BLOCK + len(features)] = features
    stored.flush()
    texts = {name: np.array(getattr(block, name)) for name in ("id", "image_hash")}
    captions = np.frombuffer(json.dumps([*map(list, block.captions)]).encode(), np.uint8)
    arrays = {"label": block.label, **texts, "readable": block.readable, "captions": captions}
    arrays |= {} if block.labels is None else {"labels": block.labels}
    arrays |= {f"groups/{name}": group for name, group in block.groups.items()}
    file = io.BytesIO()
    np.savez_compressed(file, checksum=np.uint32(zlib.crc32(features)), **arrays)
    records.write(self._blocks / f"{self._done:05}.npz", file.getvalue())
    self._done += 1
    _use(self._entry)


def _rows(features: Features, rows: slice) -> Features:
  embedding = None if features.embedding is None else features.embedding[rows]
  labels = None if features.labels is None else features.labels[rows]
  groups = {name: group[rows] for name, group in features.groups.items()}
  texts = [features.captions[rows], features.image_hash[rows]]
  of_rows = [features.label[rows], labels, groups, features.id[rows], features.readable[rows], *texts]
  return Features(features.pooled[rows], embedding, *of_rows)


def _header(dtype: np.dtype, shape: tuple[int, int]) -> bytes:
  """The first bytes of a file of NumPy."""
  file = io.BytesIO()
  fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(file, fields)
  return file.getvalue()


def _load(path: Path) -> dict[str, np.ndarray]:
  with np.load(path) as file:
    return dict(file)


def _annotations(block: Mapping[str, np.ndarray] | None, size: int) -> Features:
  """A block without its features."""
  nothing = np.zeros((size, 0), np.float32)
  if block is None:
    return Features(nothing, None, np.zeros(0, np.int32), None, {}, [], np.zeros(0, bool), [], [])
  groups = {name.removeprefix("groups/"): group for name, group in block.items() if name.startswith("groups/")}
  texts = [[*map(tuple, json.loads(block["captions"].tobytes()))], block["image_hash"].tolist()]
  fields = [block["label"], block.get("labels"), groups, block["id"].tolist(), block["readable"], *texts]
  return Features(nothing, None, *fields)


def numerics() -> dict[str, Any]:
  """What decides how products are rounded: the backend, and JAX's default precision of products."""
  return {"backend": jax.default_backend(), "matmul_precision": jax.config.jax_default_matmul_precision}


def json_hash(value: Any) -> str:
  """32 hexadecimal digits that depend on a value of JSON."""
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:32]


def tree_hash(tree: Any) -> str:
  """32 hexadecimal digits that depend on the names, shapes, types and values of a tree of arrays."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(tree):
    array = np.ascontiguousarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
    digest.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
  return digest.hexdigest()[:32]
