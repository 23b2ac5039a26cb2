"""Embeddings of texts on disk: prompts and captions are encoded once by a model, whatever is evaluated later.

The texts of a model are a folder beside those of the features of images (`feature_cache`), whose name is a hash of all
that embeddings depend on:

  about.json    what encoded them, for people, and the time of their use
  HASH.npz      some texts: `text`, uint8 `[n 16]`, the hash of each, and `embedding`, float32 `[n d]`
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any
import zipfile

import jax
from jaxtyping import Float, UInt8
import numpy as np

from declip_jax.evals.encoders import Encoders, encode_texts
from declip_jax.evals.feature_cache import if_allowed, json_hash, numerics
from declip_jax.runtime import records
from declip_jax.runtime.hosts import gather_rows

_VERSION = 2  # of what embeddings of the same model and texts are
_BYTES = 16  # of the hash of a text


class TextCache:
  """`encoders.encode_texts` that looks embeddings up in a folder first, for one model that does not compare tokens.

  Args:
    folder: folder of all entries, shared by models and users, on every host the same.
    weights: hash of the model's weights, see `feature_cache.tree_hash`.
    model: fields of the text tower, with its tokenizer, and the compute dtype, as JSON.
  """

  def __init__(self, folder: Path, weights: str, model: Mapping[str, Any]):
    self._about = {"version": _VERSION, "weights": weights, "texts": dict(model), **numerics()}
    self.entry = folder / json_hash(self._about)

  def encode(self, texts: Sequence[str], encoders: Encoders) -> Float[np.ndarray, "n d"]:
    """Embeddings of different texts, on every host; all hosts have to make the same calls.

    Raises:
      OSError: the disk failed or is full.
    """
    hashes = [_hash(text) for text in texts]
    known = dict(self._read(set(hashes)))
    absent = gather_rows(np.array([[one not in known for one in hashes]])).any(axis=0)  # on any host
    if new := [text for text, is_new in zip(texts, absent, strict=True) if is_new]:
      embeddings = encode_texts(new, encoders)
      self._write(new, embeddings)
      known |= zip(map(_hash, new), embeddings, strict=True)
    with contextlib.suppress(OSError):  # of another user, or none was written
      os.utime(self.entry / "about.json")
    return np.stack([known[one] for one in hashes])

  def _read(self, wanted: set[bytes]) -> Iterator[tuple[bytes, Float[np.ndarray, "d"]]]:
    """The texts that are there, by their hashes; files that are damaged count as absent."""
    for path in sorted(self.entry.glob("*.npz")):
      with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(path) as file:
        hashes = [row.tobytes() for row in file["text"]]
        if wanted & set(hashes):
          yield from zip(hashes, file["embedding"], strict=True)

  def _write(self, texts: Sequence[str], embeddings: Float[np.ndarray, "n d"]) -> None:
    if jax.process_index():
      return
    with if_allowed():
      self._keep(texts, embeddings)

  def _keep(self, texts: Sequence[str], embeddings: Float[np.ndarray, "n d"]) -> None:
    self.entry.mkdir(parents=True, exist_ok=True)
    if not (self.entry / "about.json").exists():
      records.write(self.entry / "about.json", json.dumps(self._about, indent=2, default=list).encode())
    file = io.BytesIO()
    np.savez(file, text=_as_array(map(_hash, texts)), embedding=np.asarray(embeddings, np.float32))
    records.write(self.entry / f"{json_hash(list(texts))}.npz", file.getvalue())


def _hash(text: str) -> bytes:
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_BYTES]


def _as_array(hashes: Iterator[bytes]) -> UInt8[np.ndarray, "n 16"]:
  return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, _BYTES)
