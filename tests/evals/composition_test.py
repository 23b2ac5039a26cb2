"""Tests of `declip_jax.evals.composition` against CLIP_benchmark, and over small files of both data sets."""

import json

import numpy as np
from PIL import Image
import pytest
import references as reference

from declip_jax.data.images import EvalView
from declip_jax.data.sources import open_source
from declip_jax.evals.composition import METRICS, caption_scores, check, choice, composition, winoground
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import Split, Texts, make_data
from declip_jax.evals.similarity import cosines, unit_rows


@pytest.fixture(scope="module")
def golden():
  return reference.below(reference.load("retrieval"), "winoground/")


def scores_of_pairs(golden, similarity):
  image, text = (unit_rows(golden[name].reshape(180, -1)) for name in ("image", "text"))
  text = np.repeat(text.reshape(90, 1, 2, -1), 2, axis=1).reshape(360, -1)  # both captions for both images
  return caption_scores(image, text, similarity).reshape(90, 2, 2)


@pytest.mark.parametrize("similarity", [None, cosines])
def test_scores_equal_those_in_float64(similarity, golden):
  found = winoground(scores_of_pairs(golden, similarity))
  for name in ("text_score", "image_score", "group_score"):
    np.testing.assert_allclose(found[name].mean(), golden[name], err_msg=name)
  np.testing.assert_allclose(found["group_score"].mean(), golden["clipbench_acc"], atol=1e-6)
  assert found["ties"].sum() == 9


def test_ties_are_wrong(golden):
  expected = reference.below(reference.load("retrieval"), "sugarcrepe/")
  scores = scores_of_pairs(golden, None)[:, 0]
  found = choice(scores)
  np.testing.assert_allclose(found["accuracy"].mean(), expected["acc_strict"])
  assert found["ties"].sum() == expected["ties"]
  np.testing.assert_allclose(
    (scores[:, 0] >= scores[:, 1]).mean(), expected["acc_ties_count_as_right_as_in_clipbench"]
  )  # the other rule gives another number


def test_a_random_model_is_at_chance_and_a_collapsed_one_at_zero():
  found = winoground(np.random.default_rng(0).normal(size=(40_000, 2, 2)))
  measured = [found[name].mean() for name in ("text_score", "image_score", "group_score")]
  chance = reference.load("retrieval")["winoground/chance_text_image_group"]
  np.testing.assert_allclose(measured, chance, atol=4 * 0.5 / 200)
  found = winoground(np.ones((5, 2, 2)))
  assert {name: int(values.sum()) for name, values in found.items()} == {
    "group_score": 0,
    "text_score": 0,
    "image_score": 0,
    "ties": 5,
  }
  assert not choice(np.ones((5, 2)))["accuracy"].any()


@pytest.mark.parametrize("captions", [0, 3])
def test_captions_that_cannot_be_split_evenly_are_named(captions):
  with pytest.raises(ValueError, match=f"{captions} captions for 2 images"):
    caption_scores(np.eye(2), np.ones((captions, 2)))


def write_grey(path, grey):
  path.parent.mkdir(exist_ok=True)
  if grey is None:
    path.write_bytes(b"broken")
  else:
    Image.fromarray(np.full((8, 8, 3), 20 * grey, np.uint8)).save(path)


def data(source):
  """Images are looked up by their grey and texts by the number that they end with, in rows of the identity."""
  table = np.eye(8, dtype=np.float32)
  encoders = Encoders(
    image=lambda images: (table[np.rint(images.mean(axis=(1, 2, 3)) / 20).astype(int)],) * 2,
    text=lambda tokens: table[tokens[:, 0]],
    tokenizer=lambda texts: np.array([[int(text[-1])] for text in texts]),
    view=EvalView(8),
    batch_size=4,
    batch_rows=np.arange(4),
  )
  return make_data(encoders, Texts(encoders), Split(source, encoders))


def test_sugarcrepe(tmp_path):
  """The second example prefers the wrong caption, the third has a tie, and the fourth has an unreadable image."""
  greys, pairs = (1, 2, 3, None, 1), ((1, 2), (3, 2), (4, 5), (1, 2), (1, 3))
  examples = {}
  for number, (grey, (right, wrong)) in enumerate(zip(greys, pairs, strict=True)):
    name = f"{0 if number == 4 else number}.png"  # the last example has the first one's image
    write_grey(tmp_path / "val2017" / name, grey)
    examples[str(number)] = {"filename": name, "caption": f"a {right}", "negative_caption": f" a {wrong}"}
  (tmp_path / "add_att.json").write_text(json.dumps(examples))
  source = open_source(f"sugarcrepe:{tmp_path}/add_att.json?root={tmp_path}/val2017")
  assert [example["captions"] for example in source][:2] == [("a 1", "a 2"), ("a 3", "a 2")]
  check(source, "config.evals.mine")
  found = composition(data(source), None)
  assert found.metrics == {"accuracy": 0.5, "ties": 1, "examples": 4}
  assert found.predictions["row"].tolist() == [0, 1, 2, 4]
  assert found.predictions["correct"].tolist() == [True, False, False, True]


def test_winoground(tmp_path):
  """The first example is right, the second has its captions swapped, and the third has an unreadable image."""
  lines = []
  for number, (greys, captions) in enumerate([((1, 2), (1, 2)), ((3, 4), (4, 3)), ((5, None), (5, 6))]):
    names = [f"ex_{number}_img_{side}" for side in range(2)]
    for name, grey in zip(names, greys, strict=True):
      write_grey(tmp_path / "images" / f"{name}.png", grey)
    fields = {f"image_{side}": names[side] for side in range(2)}
    lines.append(
      json.dumps({"id": number, **fields, **{f"caption_{side}": f"a {captions[side]}" for side in range(2)}})
    )
  (tmp_path / "examples.jsonl").write_text("\n".join(lines) + "\n")
  source = open_source(f"winoground:{tmp_path}/examples.jsonl")
  assert [example["captions"] for example in source][:2] == [("a 1", "a 2"), ("a 2", "a 1")]
  found = composition(data(source), None)
  assert found.metrics == {"group_score": 0.5, "text_score": 0.5, "image_score": 0.5, "ties": 0, "examples": 2}
  assert found.headline == "group_score"
  assert found.predictions["row"].tolist() == [0, 2]
  assert {*found.metrics} < {*METRICS}


class Listed(list):
  """Examples as a source."""

  name, classnames = "listed", ()


def test_images_without_two_captions_are_named():
  source = Listed([{"image": b"", "captions": ("a 1",), "label": -1, "id": "0"}])
  with pytest.raises(ValueError, match="listed: sample 0 has 1 captions"):
    composition(data(source), None)
  with pytest.raises(ValueError, match="listed: sample 0 has 1 captions"):
    check(source, "config.evals.mine")


def test_no_readable_image_is_an_error():
  source = Listed([{"image": b"broken", "captions": ("a 1", "a 2"), "label": -1, "id": "0"}])
  with pytest.raises(ValueError, match="listed: no image can be read"):
    composition(data(source), None)


@pytest.mark.parametrize(
  ("spec", "content", "message"),
  [
    ("sugarcrepe:{}", "[1]", "expected an object with one entry per example"),
    ("sugarcrepe:{}", "{", "not JSON"),
    ("sugarcrepe:{}", '{"7": {"filename": "a.jpg", "caption": "a"}}', "entry '7': .* negative_caption, got None"),
    ("winoground:{}", '{"image_0": "a"}', r"line 1: .* image_1, got None; its fields: \['image_0'\]"),
    ("winoground:{}", "7", "line 1: expected a text as image_0"),
  ],
)
def test_files_of_another_form_are_named(tmp_path, spec, content, message):
  (tmp_path / "file.json").write_text(content)
  with pytest.raises(ValueError, match=message):
    open_source(spec.format(tmp_path / "file.json"))
