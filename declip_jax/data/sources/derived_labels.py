"""Labels that follow from other features of TFDS data sets, named by `tfds:...?label=NAME`.

Those of CLEVR, KITTI, dSprites and SmallNORB are the tasks of VTAB (Zhai et al. 2019; google-research/task_adaptation
d7630d3, task_adaptation/data). Its paper bins orientation and position of dSprites to 16 classes, its code and
CLIP_benchmark do not: both are here. Pixels of dSprites are 0 and 1 in TFDS, and become 0 and 255 as there.
"""

from collections.abc import Callable, Sequence
import io
from typing import Any, NamedTuple

from jaxtyping import Int8
import numpy as np
from PIL import Image

from declip_jax.data.sources.base import BadSample

_FEWEST_OBJECTS = 3  # in an image of CLEVR
_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)  # of CLEVR's objects, in pixel depth
_METRES = (-100.0, 8.0, 20.0, 999.0)  # of KITTI's vehicles
_VEHICLES = 3  # the first types of object: car, van, truck
_NO_VEHICLE = 1000.0


# Function from the values of features, and the number of classes, to a class, or to 1, 0 or -1 for each class, see
# `Marks.labels`.
Derive = Callable[[Sequence[Any], int], int | Int8[np.ndarray, "classes"]]


class Derived(NamedTuple):
  """A label that follows from other features.

  Attributes:
    features: paths of these features.
    derive: the label of their values.
    classnames: names of the classes; () if they are those of the first feature.
    pixels: function from the encoded image to its pixels, where they are not those in the file.
  """

  features: tuple[str, ...]
  derive: Derive
  classnames: tuple[str, ...] = ()
  pixels: Callable[[bytes], np.ndarray] | None = None


def _count(values: Sequence[Any], classes: int) -> int:
  (sizes,) = values
  return _checked(len(sizes) - _FEWEST_OBJECTS, classes)


def _closest_object(values: Sequence[Any], classes: int) -> int:
  (coordinates,) = values
  return _checked(_bin(np.asarray(coordinates).reshape(-1, 3)[:, 2], _DISTANCES), classes)


def _closest_vehicle(values: Sequence[Any], classes: int) -> int:
  kind, location = np.asarray(values[0]).reshape(-1), np.asarray(values[1]).reshape(-1, 3)
  return _checked(_bin(np.append(location[kind < _VEHICLES, 2], _NO_VEHICLE), _METRES), classes)


def _bin(distances: np.ndarray, edges: Sequence[float]) -> int:
  """The last edge that is below the least distance."""
  return int(np.searchsorted(edges, distances.min(initial=np.inf))) - 1


def _same(values: Sequence[Any], classes: int) -> int:
  return _checked(int(values[0]), classes)


def _binned(original: int) -> Derive:
  """A label of `original` classes, adjacent ones joined to fewer."""
  return lambda values, classes: _checked(int(values[0]) * classes // original, classes)


def _voc(values: Sequence[Any], classes: int) -> Int8[np.ndarray, "classes"]:
  present, certain = values
  return _several(classes, (present, 0), (certain, 1))


def _present(values: Sequence[Any], classes: int) -> Int8[np.ndarray, "classes"]:
  return _several(classes, (values[0], 1))


def _several(classes: int, *marked: tuple[Sequence[int], int]) -> Int8[np.ndarray, "classes"]:
  """-1 for all classes but those that are marked with another value, the last of which counts."""
  labels = np.full(classes, -1, np.int8)
  for listed, value in marked:
    labels[np.asarray(listed, np.int64)] = value
  return labels


def _checked(label: int, classes: int) -> int:
  if not 0 <= label < classes:
    raise BadSample("damaged record", f"the derived label is {label}: expected 0 to {classes - 1}")
  return label


def _black_and_white(image: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(image)) as opened:
    return np.repeat(np.asarray(opened.convert("L"))[:, :, None], 3, axis=2) * np.uint8(255)


def _numbers(classes: int) -> tuple[str, ...]:
  return tuple(map(str, range(classes)))


DERIVED = {
  "clevr/count_all": Derived(("objects/size",), _count, tuple(map(str, range(3, 11)))),
  "clevr/closest_object_distance": Derived(
    ("objects/pixel_coords",), _closest_object, ("very nearby", "nearby", "near", "", "distant", "very distant")
  ),
  "kitti/closest_vehicle_distance": Derived(
    ("objects/type", "objects/location"),
    _closest_vehicle,
    (
      "a photo i took of a car on my left or right side.",
      "a photo i took with a car nearby.",
      "a photo i took with a car in the distance.",
      "a photo i took with no car.",
    ),
  ),
  "dsprites/orientation": Derived(("label_orientation",), _same, _numbers(40), _black_and_white),
  "dsprites/x_position": Derived(("label_x_position",), _same, _numbers(32), _black_and_white),
  "dsprites/orientation_16": Derived(("label_orientation",), _binned(40), _numbers(16), _black_and_white),
  "dsprites/x_position_16": Derived(("label_x_position",), _binned(32), _numbers(16), _black_and_white),
  "smallnorb/azimuth": Derived(("label_azimuth",), _same, _numbers(18)),
  "smallnorb/elevation": Derived(("label_elevation",), _same, _numbers(9)),
  "voc/labels": Derived(("labels", "labels_no_difficult"), _voc),  # difficult objects do not count
  "voc/labels_no_difficult": Derived(("labels_no_difficult",), _present),  # and here they are absent
  "imagenet/real_labels": Derived(("real_label",), _present),
}
