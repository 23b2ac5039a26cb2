"""A search page over a few images with hostile captions, shared by the tests of server and browser."""

from collections.abc import Iterator
import contextlib
import io
from pathlib import Path
import threading

from clips import make_clip
import numpy as np
from PIL import Image

from declip_jax.clip import Clip
from declip_jax.data.sources import open_source
from declip_jax.evals.features import encode
from declip_jax.image_search.searcher import Searcher
from declip_jax.image_search.server import SearchServer

COUNT, BROKEN = 60, 5  # images, one of which cannot be read
SECRET = "not one of the images"
CAPTION = "<img src=x onerror=\"document.title='hacked'\"> & <b>bold</b>"


def model() -> Clip:
  """A model whose texts may be longer than those that are cut."""
  return make_clip(0, text__context_length=32)


def encoded(seed: int, kind: str = "PNG") -> bytes:
  """Random squares, as an image file."""
  squares = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(squares.repeat(10, axis=0).repeat(10, axis=1)).save(file, kind)
  return file.getvalue()


def make_searcher(folder: Path) -> Searcher:
  """Answers queries on images in `folder/images`, beside which there is a secret."""
  images = folder / "images"
  images.mkdir()
  (folder / "secret.txt").write_text(SECRET)
  (images / "secret.txt").write_text(SECRET)  # no image has this name, so it is no caption
  for number in range(COUNT):
    content = b"broken" if number == BROKEN else encoded(number, "JPEG" if number % 2 else "PNG")
    (images / f"{number:03}.{'jpg' if number % 2 else 'png'}").write_bytes(content)
    (images / f"{number:03}.txt").write_text(f"{CAPTION} {number}" if number else CAPTION)
  clip, source = model(), open_source(f"folder:{images}")
  found = Searcher(clip, source, encode(source, clip.encoders(16), range(COUNT)))
  found.compile()
  return found


@contextlib.contextmanager
def serving(searcher: Searcher) -> Iterator[SearchServer]:
  """A server on a free port."""
  server = SearchServer(0)
  thread = threading.Thread(target=server.serve, args=(searcher,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
