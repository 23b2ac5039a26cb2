"""Searches images by text or image, on a page: python -m declip_jax.search --weights FILE --images SOURCE

  --images    a folder, path, pattern or URL, or KIND:LOCATION

Encodes all images once; an interrupted command continues after the last block that was written, and `evaluate` and
`overlap` use the same features. Then serves a page, which is printed, until Ctrl-C. Texts and images can be added to
and subtracted from a query. --features_dtype=float16 halves the space on disk; searches then take longer.

The page is served on 127.0.0.1 only. To use it from another machine: ssh -L 8000:localhost:8000 THIS_MACHINE. Images
are served by their numbers in the source, and nothing else is read. The API answers in JSON:

  curl 'http://localhost:8000/api/search?text=red+shoes&minus=high+heels&like=17&offset=0&limit=24'
  curl --data-binary @photo.jpg 'http://localhost:8000/api/search?text=in+blue'
"""

from collections.abc import Iterator, Sequence
import dataclasses
from pathlib import Path
import sys
from typing import Any

from absl import flags
import numpy as np

from declip_jax import command_line
from declip_jax.clip import load
from declip_jax.data.guess import guess
from declip_jax.data.readers import disable_opencv_threads
from declip_jax.data.sources import Source, open_source
from declip_jax.data.storage.indexes import cache_folder
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import encode, read_batches
from declip_jax.image_search.searcher import Searcher
from declip_jax.image_search.server import SearchServer
from declip_jax.reporting.progress import Bar, drop_lost_streams, message
from declip_jax.runtime.hosts import check_backend
from declip_jax.spelling import counted
from declip_jax.weights.settings import parse_settings

_BATCH_SIZE = 256
_PORT = 8000


def make_searcher(
  weights: str,
  images: str,
  *,
  settings: Sequence[str] = (),
  batch_size: int = _BATCH_SIZE,
  features_dtype: str = "float32",
  cache: Path | None = None,
) -> Searcher:
  """Loads a model, encodes the images of a source and compiles what queries need.

  Args:
    weights: checkpoint that `clip.load` reads.
    images: spec of a source, or a path.
    settings: see `parse_settings`.
    batch_size: images encoded at once.
    features_dtype: "float32" or "float16", in which embeddings are stored.
    cache: folder of features; None to keep them in memory.

  Raises:
    OSError: the weights or the images are not there, or cannot be read.
    ValueError: the model has no text tower or compares tokens, the source has no images, or none of them can be read.
  """
  with command_line.naming("--weights"):
    clip = load(weights, parse_settings(settings, "--settings"))
  if clip.tokens:
    raise ValueError(f"--weights={weights} compares tokens (FILIP): expected a model that compares embeddings")
  encoders = clip.encoders(batch_size, field="--batch_size")
  encoders = dataclasses.replace(encoders, features_dtype=features_dtype)
  source = open_source(guess(images), "--images")
  kept = clip.feature_cache(cache) if cache else None
  encode_all = kept.encode_mapped if kept else encode
  features = encode_all(source, encoders, range(len(source)), _read_with_progress)
  searcher = Searcher(clip, source, features, kept.entry(source, encoders) if kept else None)
  if not searcher.index.size:
    raise ValueError(f"--images={images}: no readable image among {len(source):,}")
  searcher.compile()
  return searcher


def _read_with_progress(
  source: Source | Sequence[Any], encoders: Encoders, rows: range
) -> Iterator[dict[str, np.ndarray]]:
  """`read_batches` with a progress bar."""
  with Bar("encoding", len(rows), "images") as bar:
    for number, batch in enumerate(read_batches(source, encoders, rows), 1):
      yield batch
      bar.set(min(number * encoders.batch_size, len(rows)))


def _command(_: list[str]) -> None:
  given = flags.FLAGS
  disable_opencv_threads()
  check_backend()
  try:
    server = SearchServer(given.port)  # before the images are encoded, since the port may be in use
    searcher = make_searcher(
      given.weights,
      given.images,
      settings=given.settings,
      batch_size=given.batch_size,
      features_dtype=given.features_dtype,
      cache=None if given.cache == "off" else Path(given.cache or cache_folder() / "features"),
    )
    unreadable = len(searcher.source) - searcher.index.size
    note = f", and {unreadable:,} that cannot be read" if unreadable else ""
    message(f"{searcher.source.name}: {counted(searcher.index.size, 'image')}{note}", stream=sys.stdout)
    message(f"{server.url} (Ctrl-C ends it)", stream=sys.stdout)
    server.serve(searcher)
  finally:
    drop_lost_streams()


def main() -> None:
  """Runs the command."""
  flags.DEFINE_string("weights", None, "Run, checkpoint file or folder, or hf-hub:ORG/NAME.")
  flags.DEFINE_string("images", None, "Images to search, such as a folder or webdataset:/data/test-*.tar.")
  flags.DEFINE_multi_string(
    "settings", [], "Setting that the checkpoint does not contain, such as text.activation=gelu. Can be repeated."
  )
  flags.DEFINE_integer("port", _PORT, "Port on 127.0.0.1; 0 for a free one.", 0, 65535)
  flags.DEFINE_integer("batch_size", _BATCH_SIZE, "Images encoded at once.", lower_bound=1)
  flags.DEFINE_string("cache", None, "Folder of features, or off; by default in the user's cache folder.")
  flags.DEFINE_enum(
    "features_dtype", "float32", ["float32", "float16"], "Dtype of stored features; float16 takes half the space."
  )
  command_line.run(_command, __doc__, required=("weights", "images"))


if __name__ == "__main__":
  main()
