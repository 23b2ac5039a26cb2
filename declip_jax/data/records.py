"""Samples that have been checked to be usable, and ArrayRecord files of them."""

from collections import Counter
import errno
import io
import os
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from declip_jax.data import images
from declip_jax.data.sources import BadSample, Example, Source, bad_sample, read_example
from declip_jax.data.sources.arrayrecord import WRITER_OPTIONS, open_reader, pack
from declip_jax.data.storage import outputs
from declip_jax.data.storage.jobs import Advance
from declip_jax.extras import array_record_module

NAMED = 3  # bad samples of each kind whose messages are kept
_MOST_FAILED = (
  100  # samples in a row that a disk, a mount or a network failed to read: it will not read the next either
)
_STEP = 64  # samples between two reports of progress


class Shard(NamedTuple):
  """Samples `start` to `stop` of a source, for the file at `path`, a path or URL."""

  path: str
  start: int
  stop: int


def read(source: Source, index: int, max_pixels: int = images.MAX_PIXELS) -> tuple[Example, images.Pixels]:
  """Returns a sample and its pixels, at most `max_pixels` of them.

  Raises:
    BadSample: training could not use the sample; the message names it.
  """
  example = read_example(source, index)
  try:
    return example, images.decode(example["image"], max_pixels)
  except BaseException as error:
    raise bad_sample(error, example["id"]) from error


def make_record(source: Source, index: int, max_pixels: int = images.MAX_PIXELS) -> bytes:
  """Returns the record of a sample; its image is stored as it is, pixels as PNG.

  Raises:
    BadSample: as in `read`.
  """
  example, pixels = read(source, index, max_pixels)
  try:
    return pack(example if isinstance(example["image"], bytes) else {**example, "image": _png(pixels)})
  except BaseException as error:
    raise bad_sample(error, example["id"]) from error


def write(source: Source, max_pixels: int, shard: Shard, advance: Advance) -> dict[str, Any]:
  """Writes an ArrayRecord file of the samples that `read` can read.

  Returns:
    `count` of the written samples, and of the others: how many were `skipped` by kind, and the first messages `named`.

  Raises:
    OSError: the file cannot be written, or a disk, a mount or a network fails for `_MOST_FAILED` samples in a row.
  """
  skipped, named, count, failed = Counter(), {}, 0, 0
  try:
    with outputs.writing(shard.path) as temporary:
      writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), WRITER_OPTIONS)
      for index in range(shard.start, shard.stop):
        try:
          writer.write(make_record(source, index, max_pixels))
          count, failed = count + 1, 0
        except BadSample as error:
          failed = failed + 1 if error.kind == "read error" else 0
          if failed == _MOST_FAILED:
            raise OSError(errno.EIO, f"{failed} samples in a row cannot be read; the last one: {error}") from None
          skipped[error.kind] += 1
          named.setdefault(error.kind, []).extend([str(error)] * (skipped[error.kind] <= NAMED))
        if (index + 1 - shard.start) % _STEP == 0 or index + 1 == shard.stop:
          advance((index - shard.start) % _STEP + 1)
      writer.close()
      if open_reader(os.fspath(temporary)).num_records() != count:
        raise OSError(f"{shard.path} could not be written completely: is the disk of {temporary.parent} full?")
  except RuntimeError as error:  # of array_record
    raise OSError(f"{shard.path} could not be written: {error}") from error
  return {"count": count, "skipped": dict(skipped), "named": named}


def _png(pixels: np.ndarray) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()
