"""Sources of examples. A new kind of source is one file and one line of `SOURCES`."""

from collections.abc import Callable
import os

from declip_jax.data.sources.arrayrecord import open_arrayrecord
from declip_jax.data.sources.base import BAD, OF_MEDIA, READ_ERROR, BadSample, Example, Source, bad_sample, read_example
from declip_jax.data.sources.border import open_border
from declip_jax.data.sources.clip_benchmark import open_clip_benchmark
from declip_jax.data.sources.coco import open_coco
from declip_jax.data.sources.composition import open_sugarcrepe, open_winogavil, open_winoground
from declip_jax.data.sources.folder import open_folder
from declip_jax.data.sources.heldout import open_heldout, open_kept, share_samples
from declip_jax.data.sources.huggingface import open_huggingface
from declip_jax.data.sources.scenes import open_scenes
from declip_jax.data.sources.table import open_table
from declip_jax.data.sources.tfds import open_tfds
from declip_jax.data.sources.tfrecord import open_tfrecord
from declip_jax.data.sources.webdataset import open_webdataset
from declip_jax.data.sources.yfcc import open_yfcc
from declip_jax.spelling import did_you_mean

__all__ = [
  "BAD",
  "OF_MEDIA",
  "READ_ERROR",
  "SOURCES",
  "BadSample",
  "Example",
  "Source",
  "bad_sample",
  "open_source",
  "read_example",
  "share_samples",
]

SOURCES: dict[str, Callable[[str], Source]] = {
  "scenes": open_scenes,
  "webdataset": open_webdataset,
  "clip_benchmark": open_clip_benchmark,
  "arrayrecord": open_arrayrecord,
  "tfrecord": open_tfrecord,
  "tfds": open_tfds,
  "table": open_table,
  "coco": open_coco,
  "yfcc": open_yfcc,
  "folder": open_folder,
  "huggingface": open_huggingface,
  "sugarcrepe": open_sugarcrepe,
  "winoground": open_winoground,
  "winogavil": open_winogavil,
  "heldout": lambda location: open_heldout(location, open_source),
  "kept": lambda location: open_kept(location, open_source),
  "border": lambda location: open_border(location, open_source),
}


def open_source(spec: str, place: str = "") -> Source:
  """Opens "kind:location", such as "webdataset:/data/train-*.tar", "tfds:cifar10:train" or "scenes:train".

  Args:
    spec: the source.
    place: where the spec is written, such as a field of a config, for messages.

  Raises:
    ValueError: the spec has no colon or no location, its kind is not one of `SOURCES`, or its data are damaged.
    OSError: its data are not there, or cannot be read.
    ModuleNotFoundError: a package that reads this kind is not installed.
  """
  try:
    return _open(spec)
  except (ValueError, OSError, ModuleNotFoundError) as error:
    if not place:
      raise
    raise _placed(error, place) from error


def _open(spec: str) -> Source:
  kind, _, location = spec.partition(":")
  if kind not in SOURCES or not location:
    hint = "" if kind in SOURCES else did_you_mean(kind, SOURCES)
    if ":" not in spec:
      hint = "; no file or folder has this name"
    if os.path.exists(spec):
      hint = "; python -m declip_jax.data.inspect prints that of a path"
    raise ValueError(f"bad source {spec!r}: expected KIND:LOCATION, where KIND is one of {', '.join(SOURCES)}{hint}")
  return SOURCES[kind](location)


def _placed(error: Exception, place: str) -> Exception:
  """An error of the same kind, hence with the same exit code, that says where the spec is written."""
  text = f"{place}: {error}"
  if not isinstance(error, OSError):
    return (ValueError if isinstance(error, ValueError) else ModuleNotFoundError)(text)
  kind = type(error) if type(error).__module__ == "builtins" else OSError
  found = kind(text)
  found.errno = error.errno
  return found
