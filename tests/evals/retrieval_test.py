"""The evaluator over small sources; `ranks_test.py` has the tests of its numbers."""

import io

import numpy as np
from PIL import Image
import pytest

from declip_jax.data.images import EvalView
from declip_jax.evals import retrieval as retrieval_lib
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import Split, Texts, make_data
from declip_jax.evals.retrieval import METRICS, best_answers, check, retrieval


def search(source, encoders, **options):
  return retrieval(make_data(encoders, Texts(encoders), Split(source, encoders)), None, **options).metrics


class Source(list):
  """Pictures of one grey each, `20 * index`; entries that are not integers cannot be read."""

  name, classnames, skipped, left_out = "greys", (), {}, {}

  def __getitem__(self, index):
    grey, captions = super().__getitem__(index)
    image = np.full((8, 8, 3), 20 * grey, np.uint8) if isinstance(grey, int) else b"broken"
    return {"image": image, "captions": captions, "label": -1, "id": str(index)}


def encoders(words, batch_size=4):
  """Looks images up by their grey and texts by their word, in rows of the identity: equal numbers match."""
  table = np.eye(8, dtype=np.float32)
  return Encoders(
    image=lambda images: (table[np.rint(images.mean(axis=(1, 2, 3)) / 20).astype(int)],) * 2,
    text=lambda tokens: table[tokens[:, 0]],
    tokenizer=lambda texts: np.array([[words[text]] for text in texts]),
    view=EvalView(8),
    batch_size=batch_size,
    batch_rows=np.arange(batch_size),
  )


def test_unusable_samples_are_skipped():
  source = Source(
    [(0, ("zero", "nought")), ("broken", ("lost",)), (1, ("one",)), (2, ()), (3, ("three",)), (4, ("five",))]
  )
  words = {"zero": 0, "nought": 0, "one": 1, "three": 3, "five": 5}
  found = search(source, encoders(words))
  assert tuple(found) == METRICS
  assert (found["images"], found["texts"]) == (4, 5)
  assert found["image_to_text_r1"] == 0.75  # the picture of a four has only a text about a five
  assert found["text_to_image_r1"] == 0.8


class EncodedSource(Source):
  """The same pictures as PNG."""

  def __getitem__(self, index):
    example = super().__getitem__(index)
    file = io.BytesIO()
    Image.fromarray(example["image"]).save(file, "PNG")
    return {**example, "image": file.getvalue()}


@pytest.mark.parametrize(
  ("samples", "images", "expected"),
  [
    ([(1, ("one",)), (2, ("two",)), (1, ("uno",)), (2, ("due",))], 2, 1.0),
    ([(1, ("one",)), (2, ("two", "due")), (1, ("uno",))], 3, 1 / 3),  # samples are images if any has several captions
  ],
)
def test_samples_of_one_image_count_once_if_each_has_one_caption(samples, images, expected, capsys):
  words = {"one": 1, "uno": 1, "two": 2, "due": 2}
  retrieval_lib._say_joined.cache_clear()
  found = [search(EncodedSource(samples), encoders(words)) for _ in range(2)][1]
  said = "greys: 4 samples with 2 different images, each of which counts once\n" if images == 2 else ""
  assert capsys.readouterr().err == said
  assert (found["images"], found["texts"]) == (images, 4)
  assert found["image_to_text_r1"] == pytest.approx(expected)


def test_images_are_read_once():
  read = []

  class Counting(EncodedSource):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  search(Counting([(1, ("one",)), (2, ("two",)), (1, ("uno",))]), encoders({"one": 1, "uno": 1, "two": 2}))
  assert sorted(read) == [0, 1, 2]


@pytest.mark.parametrize(("equal_texts", "expected"), [(True, 1.0), (False, 0.5)])
def test_equal_texts_may_match_each_others_images(equal_texts, expected):
  # Two pictures of a one share their caption. Without shared captions they tie with each other and count as misses.
  source = Source([(1, ("one",)), (2, ("two",)), (1, ("one",)), (3, ("three",))])
  found = search(source, encoders({"one": 1, "two": 2, "three": 3}), equal_texts=equal_texts)
  assert found["image_to_text_r1"] == found["text_to_image_r1"] == expected


def test_a_source_without_captions_is_named():
  with pytest.raises(ValueError, match="greys has no readable image with a caption"):
    search(Source([(1, ()), ("broken", ("lost",))]), encoders({}))


def test_captions_may_have_a_prefix():
  source = Source([(1, ("one",)), (2, ("two",))])
  words = {"a photo of one": 1, "a photo of two": 2}  # no caption without it can be encoded
  assert search(source, encoders(words), prefix="a photo of ")["mean_recall"] == 1


@pytest.mark.parametrize(
  ("scores", "right", "expected"),
  [
    ([0.1, 0.9, 0.5], [2], [(1, 1), (2, 2), (3, 0)]),
    ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1, 0], [(1, 6), (2, 5), (3, 4), (4, 3), (5, 2), (6, 1)]),
    ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 5], [(1, 6), (2, 5), (3, 4), (4, 3), (5, 2)]),
    ([0.5] * 7, [6], [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (7, 6)]),
  ],
)
def test_the_right_answer_follows_the_best_with_its_place(scores, right, expected):
  match = np.isin(np.arange(len(scores)), right)
  assert best_answers(np.array(scores), match) == expected


def test_answers_in_both_directions_are_drawn(tmp_path, monkeypatch):
  """Seven pictures, whose texts are all about one of them: that text is right for the fourth picture alone."""
  drawn = []
  monkeypatch.setattr(retrieval_lib, "plot_retrieval", lambda *arguments: drawn.extend(arguments))
  source = Source([(grey, (f"text {grey}",)) for grey in range(7)])
  of_one = encoders({f"text {grey}": 3 for grey in range(7)})
  path = tmp_path / "retrieval.png"
  retrieval(make_data(of_one, Texts(of_one), Split(source, of_one)), path)
  title, of_texts, of_images, where = drawn
  assert title.startswith("greys: 7 texts and 7 images")
  assert where == path
  assert [text for text, _ in of_texts] == [f"text {grey}" for grey in (0, 1, 3, 4, 6)]
  assert [int(image[0, 0, 0]) // 20 for image, _ in of_images] == [0, 2, 4, 6]
  for text, answers in of_texts:
    assert [answer.place for answer in answers if answer.is_right] == [{0: 2, 1: 3, 3: 1, 4: 5, 6: 7}[int(text[-1])]]
    assert [int(answer.found[0, 0, 0]) // 20 for answer in answers if answer.is_right] == [int(text[-1])]
    assert (answers[0].score, answers[1].score) == (1, 0)
  assert [[a.found for a in answers if a.is_right] for _, answers in of_images] == [[f"text {n}"] for n in (0, 2, 4, 6)]


def test_folds_are_searched_separately():
  # The second two and its caption tie with the first unless they are searched apart.
  source = Source([(1, ("one",)), (2, ("two",)), (2, ("two",)), (3, ("three",))])
  words = encoders({"one": 1, "two": 2, "three": 3})
  assert search(source, words)["mean_r1"] == 0.5
  assert search(source, words, folds=2)["mean_r1"] == 1
  with pytest.raises(ValueError, match="4 images with a text: expected at least 5"):
    search(source, words, folds=5)


def test_more_folds_than_samples_are_rejected_before_any_is_read():
  check(Source([(1, ("one",)), (2, ("two",))]), "config.evals.mine", folds=2)
  with pytest.raises(ValueError, match=r"config.evals.mine.folds=3: .* has 2 samples"):
    check(Source([(1, ("one",)), (2, ("two",))]), "config.evals.mine", folds=3)
