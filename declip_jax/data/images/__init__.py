"""From the bytes of an image to the views that models see: decoding, random crops, colours, blur.

Pixels are uint8 RGB arrays `[h w 3]`; the mean and standard deviation are applied on the device. A view is made in two
steps: `draw` needs only the height and width, which the header contains, and returns `ViewParams`; `make` decodes as
much of the image as its views need and applies their parameters. A view is therefore a pure function of image and seed,
and two engines can be compared with the same parameters:

- `exact`: every operation by Pillow, bit for bit equal to torchvision's transforms of Pillow images. CLIP, SLIP and
  DeCLIP were trained with these.
- `fast`, the default in training: JPEGs are decoded by libjpeg-turbo, at 1/2, 1/4 or 1/8 resolution if the view is that
  much smaller; OpenCV does everything else. Pixels differ from `exact` by a few levels (`benchmarks/images.py` prints
  how many).
"""

from declip_jax.data.images.geometry import Crop, random_resized_crop_box
from declip_jax.data.images.photo import LARGEST_LIMIT, MAX_PIXELS, Photo, Pixels, decode, format_of, open_photo
from declip_jax.data.images.views import (
  ENGINES,
  INTERPOLATIONS,
  Augmentation,
  EngineName,
  EvalView,
  Interpolation,
  ViewParams,
  draw,
  eval_view,
  make,
  random_view,
)

# Per channel, for pixels scaled to [0, 1].
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

__all__ = [
  "ENGINES",
  "IMAGENET_MEAN_STD",
  "INTERPOLATIONS",
  "LARGEST_LIMIT",
  "MAX_PIXELS",
  "Augmentation",
  "Crop",
  "EngineName",
  "EvalView",
  "Interpolation",
  "Photo",
  "Pixels",
  "ViewParams",
  "decode",
  "draw",
  "eval_view",
  "format_of",
  "make",
  "open_photo",
  "random_resized_crop_box",
  "random_view",
]
