"""Tests of sources whose images have a border: `border:2:SPEC`."""

import io
from pathlib import Path
import pickle

import numpy as np
from PIL import Image
import pytest

from declip_jax.data import images, sources
from declip_jax.data.pipeline import EvaluationBatches
from declip_jax.data.sources import BadSample, open_source, read_example

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 13, 3), np.uint8)


def with_border(folder: Path, width: int) -> str:
  """A folder with one picture in a red border."""
  (folder / "cats").mkdir(parents=True)
  framed = np.full((20 + 2 * width, 13 + 2 * width, 3), (255, 0, 0), np.uint8)
  framed[width : width + 20, width : width + 13] = PICTURE
  Image.fromarray(framed).save(folder / "cats" / "a.png")
  return f"folder:{folder}"


def view(spec: str) -> np.ndarray:
  """The pixels that a model is evaluated on, `[1 8 8 3]`."""
  return next(iter(EvaluationBatches(open_source(spec), range(1), 1, 1, images.EvalView(8))))["image"]


@pytest.mark.parametrize("width", [1, 2])
def test_the_views_are_those_of_the_picture_without_its_border(tmp_path: Path, width: int) -> None:
  framed, plain = with_border(tmp_path / "framed", width), with_border(tmp_path / "plain", 0)
  np.testing.assert_array_equal(open_source(f"border:{width}:{framed}")[0]["image"], PICTURE)
  np.testing.assert_array_equal(view(f"border:{width}:{framed}"), view(plain))
  assert (view(framed) != view(plain)).any()
  np.testing.assert_array_equal(view(f"border:0:{framed}"), view(framed))


def test_everything_else_is_that_of_the_source(tmp_path: Path) -> None:
  spec = with_border(tmp_path, 2)
  plain, cut = open_source(spec), open_source(f"border:2:{spec}")
  assert cut.name == f"border:2:{spec}"
  for name in ("classnames", "skipped", "left_out", "stamp"):
    assert getattr(cut, name) == getattr(plain, name)
  assert isinstance(cut, sources.Source)
  assert len(cut) == 1
  assert cut[0]["id"].startswith(plain[0]["id"])
  assert cut[0]["id"] != plain[0]["id"]  # results of both are not of the same data
  assert cut[0]["label"] == 0
  assert pickle.loads(pickle.dumps(cut))[0]["image"].shape == (20, 13, 3)


def test_an_image_that_is_all_border_or_damaged_is_a_bad_sample_with_its_name(tmp_path: Path) -> None:
  spec = with_border(tmp_path, 0)
  with pytest.raises(BadSample, match=r"a\.png: 13 x 20 pixels, but its border has 7 on each side") as found:
    read_example(open_source(f"border:7:{spec}"), 0)
  assert found.value.kind == "damaged image"
  file = io.BytesIO()
  Image.fromarray(PICTURE).save(file, "PNG")
  (tmp_path / "cats" / "a.png").write_bytes(file.getvalue()[:300])
  with pytest.raises(BadSample, match=r"a\.png: ") as found:
    read_example(open_source(f"border:2:{spec}"), 0)
  assert found.value.kind == "damaged image"


@pytest.mark.parametrize("location", ["folder:/data", "-1:scenes:test", "1.5:scenes:test", "2", "2:", "²:scenes:test"])
def test_a_bad_width_is_an_error(location: str) -> None:
  with pytest.raises(ValueError, match="expected border:PIXELS:SPEC"):
    open_source(f"border:{location}")
