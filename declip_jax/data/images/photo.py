"""Images whose size is known before they are decoded, and errors for those that cannot be decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import io

import cv2
from jaxtyping import UInt8
import numpy as np
from PIL import Image, features
import simplejpeg

from declip_jax.data.sources.base import BadSample

Pixels = UInt8[np.ndarray, "h w 3"]
View = UInt8[np.ndarray, "size size 3"]

MAX_PIXELS = 2**26  # 8192 x 8192, 192 MiB decoded; more counts as a decompression bomb

# Formats for Pillow. Of its others most are not for photographs, EPS starts programs, and TGA is guessed from noise.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000") + ("AVIF",) * features.check("avif")
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Photo:
  """An image of known size, decoded each time it is needed; made by `open_photo`.

  Attributes:
    height: height in pixels.
    width: width in pixels.
    source: the encoded image, a Pillow image, or pixels.
    reducible: whether it can be decoded at lower resolution, as ordinary JPEGs can.
  """

  height: int
  width: int
  source: bytes | np.ndarray | Image.Image
  reducible: bool = False

  def decode(self, factor: int = 1) -> tuple[Pixels, int]:
    """Returns pixels, and the factor `n` by which their resolution was reduced: 8, 4, 2 or 1, at most `factor`.

    libjpeg-turbo then omits the high frequencies of each block of 8 x 8; pixel `i` covers pixels `n * i` to
    `n * (i + 1)` of the image.

    Raises:
      BadSample: the image is damaged.
    """
    if isinstance(self.source, np.ndarray):
      return self.source, 1
    if self.reducible:
      reduction = next(n for n in (8, 4, 2, 1) if n <= max(factor, 1))
      try:
        # simplejpeg chooses the smallest size that is at least this one. Other factors are slower, without vector code.
        height, width = -(-self.height // reduction), -(-self.width // reduction)
        return simplejpeg.decode_jpeg(self.source, "RGB", min_height=height, min_width=width), reduction
      except ValueError:
        pass  # the damage may be harmless (stray bytes), and Pillow tolerates that
    with _opened(self.source) as image:
      pixels = _rgb(_pillow_pixels(image))
    if pixels.shape[:2] != (self.height, self.width):
      height, width = pixels.shape[:2]
      raise BadSample("damaged image", f"{width} x {height} pixels, but {self.width} x {self.height} in its header")
    return pixels, 1


def open_photo(image: bytes | np.ndarray | Image.Image | Photo) -> Photo:
  """Reads the header of an encoded image, or checks an array.

  Args:
    image: an encoded image, whatever the suffix of its file, as JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, JPEG 2000 or, if
      Pillow has it, AVIF; a Pillow image; or uint8 `[h w]`, `[h w 1]`, `[h w 3]`, `[h w 4]`.

  Raises:
    BadSample: no bytes, an unknown format, or more than `MAX_PIXELS` according to the header. Callers add the name.
    ValueError: an array of another type or shape.
  """
  if isinstance(image, Photo):
    return image
  if isinstance(image, np.ndarray):
    pixels = _rgb(image)
    return Photo(*pixels.shape[:2], pixels)
  if not isinstance(image, Image.Image):
    if not image:
      raise BadSample("empty image", "the image has 0 bytes")
    if size := _jpeg_size(image):
      return Photo(*_checked(*size), image, reducible=True)
  with _opened(image) as opened:
    return Photo(*_checked(opened.height, opened.width), image)


def decode(image: bytes | np.ndarray | Image.Image | Photo) -> Pixels:
  """Decodes an image to RGB at full resolution; the first frame of an animation.

  JPEG pixels equal Pillow's. As in torchvision's loaders, transparency is dropped (not blended with a background) and
  the EXIF orientation is ignored (except in TIFF, where Pillow applies it). Unlike there, 16-bit grey keeps its range
  instead of being clipped to white.

  Args:
    image: see `open_photo`; an array `[h w 3]` is returned without copying.

  Raises:
    BadSample: as in `open_photo`, or the image cannot be read completely.
    ValueError: as in `open_photo`.
  """
  return open_photo(image).decode()[0]


def _checked(height: int, width: int) -> tuple[int, int]:
  if height * width > MAX_PIXELS:
    raise BadSample("too many pixels", f"{width} x {height} pixels are more than {MAX_PIXELS}")
  return height, width


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
  """Height and width of an ordinary JPEG; None if Pillow should read it."""
  if not data.startswith(b"\xff\xd8\xff"):
    return None
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
  except ValueError:
    return None
  return None if colours in ("CMYK", "YCCK") else (height, width)


@contextmanager
def _opened(source: bytes | Image.Image) -> Iterator[Image.Image]:
  """Opens an image with Pillow, lazily; errors of Pillow within the context become `BadSample`."""
  try:
    if isinstance(source, Image.Image):
      yield source
    else:
      with Image.open(io.BytesIO(source), formats=_FORMATS) as image:
        yield image
  except BadSample:
    raise
  except Image.UnidentifiedImageError as error:
    raise BadSample("unknown format", f"not a known image format (starts with {source[:8]!r})") from error
  except _BOMB as error:
    raise BadSample("too many pixels", f"more than {MAX_PIXELS} pixels: {error}") from error
  except Exception as error:  # decoders raise nearly anything for bad bytes: OSError, SyntaxError, struct.error, ...
    raise BadSample("damaged image", f"cannot be decoded: {error}") from error


def _pillow_pixels(image: Image.Image) -> np.ndarray:
  if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 255
    return np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
  image.load()
  image.info.pop("transparency", None)  # otherwise Pillow warns that each palette image loses it
  return np.array(image.convert("RGB"))


def _rgb(image: np.ndarray) -> Pixels:
  channels = image.shape[2] if image.ndim == 3 else 1
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
    raise ValueError(f"image is {image.dtype}{list(image.shape)}; expected uint8 [h w], [h w 1], [h w 3] or [h w 4]")
  if not image.size:
    raise BadSample("empty image", f"image is {image.dtype}{list(image.shape)}")
  if channels == 1:
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
  return image if channels == 3 else np.ascontiguousarray(image[:, :, :3])
