"""Where examples come from. A new kind of source is one file and one line here."""

from collections.abc import Callable

from declip_jax.data.sources.base import Example, Source
from declip_jax.data.sources.scenes import open_scenes
from declip_jax.data.sources.tfds import open_tfds
from declip_jax.data.sources.webdataset import open_webdataset

__all__ = ["SOURCES", "Example", "Source", "open_source"]

SOURCES: dict[str, Callable[[str], Source]] = {
  "scenes": open_scenes,
  "webdataset": open_webdataset,
  "tfds": open_tfds,
}


def open_source(spec: str) -> Source:
  """Opens "kind:location", such as "webdataset:/data/train-*.tar", "tfds:cifar10:train" or "scenes:train".

  Raises:
    ValueError: the spec has no colon or no location, or its kind is not one of `SOURCES`.
  """
  kind, _, location = spec.partition(":")
  if kind not in SOURCES or not location:
    raise ValueError(f"bad source {spec!r}: expected KIND:LOCATION, where KIND is one of {', '.join(SOURCES)}")
  return SOURCES[kind](location)
