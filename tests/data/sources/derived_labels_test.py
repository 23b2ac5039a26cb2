"""Tests of derived labels: bins of VTAB's code at and next to their edges."""

import io

import numpy as np
from PIL import Image
import pytest

from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.derived_labels import DERIVED
from declip_jax.evals.catalogue import data_set
from declip_jax.evals.classes import align


def label(name: str, *values) -> int:
  derived = DERIVED[name]
  return derived.derive(values, len(derived.classnames))


def test_number_of_objects():
  assert [label("clevr/count_all", np.zeros(count, int)) for count in (3, 10)] == [0, 7]
  with pytest.raises(BadSample, match="-1: expected 0 to 7"):
    label("clevr/count_all", np.zeros(2, int))


def test_distance_of_the_closest_object():
  depths = {7.5: 0, 8.0: 0, 8.01: 1, 8.5: 1, 9.0: 2, 9.6: 4, 10.0: 4, 10.5: 5}
  for depth, expected in depths.items():
    coordinates = np.array([[1, 2, 30], [3, 4, depth]], np.float32)
    assert label("clevr/closest_object_distance", coordinates) == expected
  with pytest.raises(BadSample):
    label("clevr/closest_object_distance", np.zeros((0, 3)))


def test_distance_of_the_closest_vehicle():
  for metres, expected in {-5.0: 0, 8.0: 0, 8.5: 1, 20.0: 1, 20.5: 2, 998.0: 2}.items():
    location = np.array([[0, 0, 1], [0, 0, metres], [0, 0, 500]], np.float32)
    assert label("kitti/closest_vehicle_distance", [3, 2, 0], location) == expected
  assert label("kitti/closest_vehicle_distance", [3, 7], np.array([[0, 0, 1], [0, 0, 2]])) == 3  # pedestrians
  assert label("kitti/closest_vehicle_distance", [], []) == 3


def test_bins():
  assert [label("dsprites/x_position_16", position) for position in (0, 1, 2, 31)] == [0, 0, 1, 15]
  assert [label("dsprites/orientation_16", angle) for angle in (0, 2, 3, 39)] == [0, 0, 1, 15]  # floor(angle / 2.5)
  assert label("dsprites/orientation", 39) == 39
  assert label("smallnorb/azimuth", np.int64(17)) == 17


def test_pixels_of_dsprites_become_white():
  file = io.BytesIO()
  Image.fromarray(np.array([[0, 1]], np.uint8)).save(file, "PNG")
  pixels = DERIVED["dsprites/x_position"].pixels(file.getvalue())
  assert pixels.dtype == np.uint8
  assert pixels.tolist() == [[[0] * 3, [255] * 3]]


def test_several_labels():
  derive = DERIVED["voc/labels"].derive
  assert derive(([0, 2, 3], [2]), 5).tolist() == [0, -1, 1, 0, -1]  # 0 and 3 are difficult
  assert DERIVED["voc/labels_no_difficult"].derive(([2],), 4).tolist() == [-1, -1, 1, -1]
  assert DERIVED["imagenet/real_labels"].derive(([],), 3).tolist() == [-1, -1, -1]


def test_classes_are_those_of_the_catalogue():
  keys = {"clevr/count_all": "clevr_counts", "clevr/closest_object_distance": "clevr_distance"}
  keys |= {"kitti/closest_vehicle_distance": "kitti_distance", "dsprites/orientation": "dsprites_orientation"}
  keys |= {"dsprites/x_position": "dsprites_x_position", "smallnorb/azimuth": "smallnorb_azimuth"}
  for name, key in keys.items():
    found = align(data_set(key), DERIVED[name].classnames, f"tfds:{key}:test?label={name}")
    assert sorted(found) == [*range(len(found))]
    assert key == "clevr_counts" or found.tolist() == sorted(found)
