"""Tests of `declip_jax.evals.composition` against CLIP_benchmark and scikit-learn, and over small files."""

import csv
import json
import math

import numpy as np
from PIL import Image
import pytest
import references as reference

from declip_jax.data.images import EvalView
from declip_jax.data.sources import open_source
from declip_jax.data.sources.composition import open_winogavil
from declip_jax.evals import EVALUATORS, catalogue
from declip_jax.evals.composition import (
  METRICS,
  caption_scores,
  check,
  choice,
  composition,
  jaccard,
  prompt,
  winoground,
)
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import Features, Split, Texts, make_data
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
  """The second example prefers the wrong caption, the third has a tie, and the fourth and the last lack an image."""
  greys, pairs = (1, 2, 3, None, 1), ((1, 2), (3, 2), (4, 5), (1, 2), (1, 3))
  examples = {}
  for number, (grey, (right, wrong)) in enumerate(zip(greys, pairs, strict=True)):
    name = f"{0 if number == 4 else number}.png"  # the last example has the first one's image
    write_grey(tmp_path / "val2017" / name, grey)
    examples[str(number)] = {"filename": name, "caption": f"a {right}", "negative_caption": f" a {wrong}"}
  examples["5"] = {**examples["2"], "filename": "missing.png"}
  (tmp_path / "add_att.json").write_text(json.dumps(examples))
  source = open_source(f"sugarcrepe:{tmp_path}/add_att.json?root={tmp_path}/val2017")
  assert [source[index]["captions"] for index in range(2)] == [("a 1", "a 2"), ("a 3", "a 2")]
  check(source, "config.evals.mine")
  found = composition(data(source), None)
  assert found.metrics == {"accuracy": 0.5, "ties": 1, "examples": 4}
  assert found.predictions["row"].tolist() == [0, 1, 2, 4]
  assert found.predictions["correct"].tolist() == [True, False, False, True]


def test_winoground(tmp_path):
  """The first example is right, the second has its captions swapped, and the others lack an image."""
  lines = []
  for number, (greys, captions) in enumerate(
    [((1, 2), (1, 2)), ((3, 4), (4, 3)), ((5, None), (5, 6)), ((6, 7), (6, 7))]
  ):
    names = [f"ex_{number}_img_{side}" for side in range(2)]
    for name, grey in zip(names, greys, strict=True):
      write_grey(tmp_path / "images" / f"{name}.png", grey)
    fields = {f"image_{side}": names[side] for side in range(2)}
    lines.append(
      json.dumps({"id": number, **fields, **{f"caption_{side}": f"a {captions[side]}" for side in range(2)}})
    )
  (tmp_path / "examples.jsonl").write_text("\n".join(lines) + "\n")
  source = open_source(f"winoground:{tmp_path}/examples.jsonl")
  (tmp_path / "images" / "ex_3_img_0.png").unlink()
  assert [source[index]["captions"] for index in range(2)] == [("a 1", "a 2"), ("a 2", "a 1")]
  found = composition(data(source), None)
  assert found.metrics == {"group_score": 0.5, "text_score": 0.5, "image_score": 0.5, "ties": 0, "examples": 2}
  assert found.headline == "group_score"
  assert found.predictions["row"].tolist() == [0, 2]
  assert {*found.metrics} < {*METRICS}


# Sizes of WinoGAViL's instances with 10 to 12 candidates, (candidates, associations) -> instances.
LARGE = {(10, 2): 338, (10, 3): 83, (10, 4): 5, (12, 2): 328, (12, 3): 84, (12, 4): 16}


def test_jaccard_indices_are_those_of_scikit_learn():
  golden = reference.load("winogavil")
  ends = np.cumsum(golden["candidates"], dtype=int)[:-1]
  found = [*map(jaccard, np.split(golden["scores"], ends), np.split(golden["right"], ends))]
  np.testing.assert_allclose([value for value, _ in found], golden["jaccard"])
  assert not any(tied for _, tied in found)


@pytest.mark.parametrize(
  ("scores", "expected", "tied"),
  [
    ([3, 2, 1, 0], 1, False),
    ([3, 3, 1, 1], 1, False),  # these ties do not cross the second place
    ([3, 1, 1, 0], 1 / 3, True),  # as if the wrong one came second
    ([2, 2, 2, 0], 0, True),
    ([1, 1, 3, 0], 0, True),  # one of the two right ones is second, but none of them alone
    ([0, 3, 2, 2], 1 / 3, True),
    ([7, 7, 7, 7], 0, True),
    ([np.nan, 3, 1, 0], 1 / 3, True),  # NaN is ahead of all others, and never an answer
    ([3, 2, np.nan, 0], 1 / 3, True),
  ],
)
def test_equal_scores_at_the_last_place_are_wrong(scores, expected, tied):
  found = jaccard(np.array(scores, np.float32), np.array([True, True, False, False]))
  assert found == (pytest.approx(expected), tied)


def test_ties_are_never_better_than_any_order_of_them():
  """Scores of few levels have many ties; noise breaks them in all ways."""
  rng = np.random.default_rng(0)
  for _ in range(100):
    scores, right = rng.integers(3, size=6).astype(float), rng.permutation(6) < 3
    orders = [jaccard(scores + rng.uniform(0, 0.5, 6), right)[0] for _ in range(30)]
    assert jaccard(scores, right)[0] <= min(orders)


def test_an_instance_without_an_association_is_named():
  with pytest.raises(ValueError, match="no candidate is right"):
    jaccard(np.ones(3), np.zeros(3, bool))


def test_chance_is_the_expected_jaccard_index_of_random_answers():
  def expected(n, k):
    hits = range(max(0, 2 * k - n), k + 1)
    return sum(math.comb(k, h) * math.comb(n - k, k - h) / math.comb(n, k) * h / (2 * k - h) for h in hits)

  value = sum(number * expected(*size) for size, number in LARGE.items()) / sum(LARGE.values())
  assert catalogue.data_set("winogavil").chance == pytest.approx(value, abs=5e-4)
  guessed = sum(number * k / n for (n, k), number in LARGE.items()) / sum(LARGE.values())
  assert guessed == pytest.approx(0.205, abs=1e-3)  # DataComp's number is that of the share of right answers


@pytest.mark.parametrize(
  ("cue", "text"), [("Owl", "An owl"), ("bald", "A bald"), ("US flag", "An us flag"), ("éclair", "A éclair")]
)
def test_prompts_of_cues(cue, text):
  assert prompt(cue) == text


def write_winogavil(folder, instances, form):
  """Writes the file in one of the forms in which it is found; returns its path."""
  path = folder / f"winogavil.{form.partition('-')[0]}"
  if form == "jsonl":
    path.write_text("".join(f"{json.dumps(one)}\n" for one in instances))
  elif form == "jsonl-texts":
    texts = [{name: str(value) for name, value in one.items()} for one in instances]
    path.write_text("".join(f"{json.dumps(one)}\n" for one in texts))
  else:
    write = json.dumps if form == "csv" else repr
    with path.open("w", newline="") as file:
      table = csv.writer(file)
      table.writerow([*instances[0], "ID"])
      for number, one in enumerate(instances):
        table.writerow([*(value if isinstance(value, str) else write(value) for value in one.values()), number])
  return path


def instance(candidates, associations, cue="a 1"):
  return {"candidates": list(candidates), "cue": cue, "associations": list(associations)}


@pytest.mark.parametrize("form", ["csv", "csv-python", "jsonl", "jsonl-texts"])
def test_samples_of_winogavil_are_candidates_of_instances(tmp_path, form):
  names = ["hot dog", "st. bernard", "o'hare", "ash"]
  for number, name in enumerate(names):
    write_grey(tmp_path / "winogavil_images" / f"{name}.jpg", number)
  instances = [instance(names[:3], names[1:3], "Owl"), instance(names[1:], ["ash"], "bald, and old")]
  source = open_source(f"winogavil:{write_winogavil(tmp_path, instances, form)}")
  examples = [*source]
  assert [example["id"] for example in examples] == [f"{name}.jpg" for name in [*names[:3], *names[1:]]]
  assert [example["label"] for example in examples] == [0, 1, 1, 0, 0, 1]
  assert [example["captions"] for example in examples] == [("Owl",)] * 3 + [("bald, and old",)] * 3
  assert [example["groups"] for example in examples] == [{"instance": i, "candidates": 3} for i in (0, 0, 0, 1, 1, 1)]
  assert source.classnames == ()
  check(source, "config.evals.mine")


def of_instances(scores, right, candidates, readable):
  """The input of an evaluation in which images have these scores with their cue."""
  instance = np.repeat(np.arange(len(candidates), dtype=np.int32), candidates)
  groups = {"instance": instance, "candidates": candidates[instance].astype(np.int32)}
  groups = {name: np.where(readable, group, -1) for name, group in groups.items()}
  label = np.where(readable, right, -1).astype(np.int32)
  embedding = np.stack([scores, np.sqrt(1 - scores**2)], axis=1)
  captions = [("Cue",) if one else () for one in readable]
  places = [str(row) for row in range(len(scores))]
  features = Features(embedding, embedding, label, None, groups, places, readable, captions, [""] * len(scores))
  encoders = Encoders(
    image=lambda images: (images, images),
    text=lambda tokens: np.eye(2, dtype=np.float32)[tokens[:, 0]],
    tokenizer=lambda texts: np.array([[("A cue", "An cue").index(text)] for text in texts]),
    view=EvalView(8),
    batch_size=4,
    batch_rows=np.arange(4),
  )
  return make_data(encoders, Texts(encoders), Split(Listed(places), encoders, encode=lambda *_: features))


def test_winogavil_is_the_mean_over_instances_and_leaves_out_those_without_an_image():
  golden = reference.load("winogavil")
  scores, right, sizes, values = (golden[name] for name in ("scores", "right", "candidates", "jaccard"))
  readable = np.ones(len(scores), bool)
  found = composition(of_instances(scores, right, sizes, readable), None)
  assert found.headline == "jaccard"
  np.testing.assert_allclose(found.predictions["jaccard"], values)
  for name, mean in reference.below(golden, "mean/").items():
    assert found.metrics[name] == pytest.approx(mean)
    used = {"jaccard": sizes >= 10, "jaccard_5_6": sizes <= 6, "jaccard_all": sizes > 0}[name]
    half = 1.96 * values[used].std() / used.sum() ** 0.5
    np.testing.assert_allclose(found.intervals[name], [mean - half, mean + half], atol=0.01)
  assert (found.metrics["ties"], found.metrics["examples"]) == (0, (sizes >= 10).sum())
  assert {*found.metrics} < {*METRICS}
  assert {*reference.below(golden, "mean/")} < {*EVALUATORS["composition"].names}
  firsts = np.cumsum(sizes, dtype=int) - sizes
  readable[firsts[[3, 8]]] = readable[firsts[[5, 6]] + sizes[[5, 6]] - 1] = False  # at the ends of instances
  found = composition(of_instances(scores, right, sizes, readable), None)
  kept = np.delete(np.arange(len(sizes)), [3, 5, 6, 8])
  assert found.predictions["row"].tolist() == firsts[kept].tolist()
  assert found.predictions["candidates"].tolist() == sizes[kept].tolist()
  np.testing.assert_allclose(found.predictions["jaccard"], values[kept])
  by_size = [[n, values[kept][sizes[kept] == n].mean(), (sizes[kept] == n).sum()] for n in (5, 6, 10, 12)]
  np.testing.assert_allclose(found.details["jaccard_by_candidates"], by_size)


def draw_winogavil(folder, instances, greys):
  for name in {name for one in instances for name in one["candidates"]}:
    write_grey(folder / "winogavil_images" / f"{name}.jpg", greys.get(name, 2))
  return open_winogavil(str(write_winogavil(folder, instances, "csv")))


def test_winogavil(tmp_path):
  """Image n0 fits the cue 1, the others the cue 2; one image cannot be decoded, and another one is missing."""
  names = [f"n{number}" for number in range(10)]
  instances = [
    instance(names, ["n0"]),
    instance(names, ["n1"]),
    instance([*names, "broken"], ["n0"]),
    instance([*names, "gone"], ["gone"]),
    instance(names[:5], names[1:3], "a 2"),  # four images have the same score
    instance(names[:5], ["n0"]),
    instance(names[:6], ["n0"]),
  ]
  source = draw_winogavil(tmp_path, instances, {"n0": 1, "broken": None})
  (tmp_path / "winogavil_images" / "gone.jpg").unlink()
  found = composition(data(source), None)
  metrics = {"jaccard": 1 / 2, "jaccard_5_6": 2 / 3, "jaccard_all": 3 / 5, "ties": 0, "examples": 2}
  assert found.metrics == pytest.approx(metrics)
  assert found.predictions["row"].tolist() == [0, 10, 42, 47, 52]
  assert found.predictions["jaccard"].tolist() == [1, 0, 0, 1, 1]


def test_a_model_that_maps_all_images_to_one_point_scores_zero_in_winogavil(tmp_path):
  names = [f"n{number}" for number in range(12)]
  source = draw_winogavil(tmp_path, [instance(names, names[:3]), instance(names[:5], names[:4])], {})
  found = composition(data(source), None)
  assert found.metrics == {"jaccard": 0, "jaccard_5_6": 0, "jaccard_all": 0, "ties": 1, "examples": 1}


def test_winogavil_without_a_large_instance_is_named(tmp_path):
  source = draw_winogavil(tmp_path, [instance(["n1", "n2", "n3"], ["n1"])], {})
  with pytest.raises(ValueError, match=r"winogavil:.*: there is no instance of at least 10 images"):
    composition(data(source), None)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"associations": ["n9"]}, "record 2: association 'n9' is not one of its candidates"),
    ({"associations": []}, "record 2: associations: 0 names, expected 1 to 1,000"),
    ({"candidates": []}, "record 2: candidates: 0 names"),
    ({"candidates": [str(number) for number in range(50_000)]}, "record 2: candidates: 50,000 names"),
    ({"candidates": ["n1", "n2", "n1"]}, "record 2: candidates: 'n1' occurs 2 times"),
    ({"associations": ["n1", "n1"]}, "record 2: associations: 'n1' occurs 2 times"),
    ({"associations": ["n1", ""]}, "record 2: associations: expected a list of names of images"),
    ({"associations": ["n1", 3]}, "record 2: associations: expected a list of names of images"),
    ({"associations": "n1"}, "record 2: associations: expected a list of names of images, got 'n1'"),
    ({"associations": None}, "record 2: associations: expected a list of names of images, got None"),
    ({"associations": "__import__('os').abort()"}, "record 2: associations: expected a list of names"),
    ({"associations": "(" * 10_000}, "record 2: associations: expected a list of names"),
    ({"associations": "-" * 10_000 + "1"}, "record 2: associations: expected a list of names"),
    ({"associations": "1" * 10_000}, "record 2: associations: expected a list of names"),
    ({"associations": json.dumps(["n1"] * 10_000)}, "record 2: associations: 60,000 characters"),
    ({"cue": ""}, "record 2: expected a text as cue"),
    ({"cue": "\u200b"}, "record 2: expected a text as cue"),
    ({"cue": None}, "record 2: expected a text as cue"),
  ],
)
def test_wrong_records_of_winogavil_are_named(tmp_path, fields, message):
  good = instance(["n1", "n2", "n3"], ["n1"])
  path = write_winogavil(tmp_path, [good, {**good, **fields}], "jsonl")
  with pytest.raises(ValueError, match=message) as found:
    open_winogavil(str(path))
  assert str(path) in str(found.value)


def test_files_of_another_form_than_winogavil_are_named(tmp_path):
  path = tmp_path / "t.csv"
  path.write_text('candidates,cue\n"[""a""]",b\n')
  with pytest.raises(ValueError, match=r"t\.csv: no column associations; its columns: \['candidates', 'cue'\]"):
    open_winogavil(str(path))
  path.write_text('candidates,cue,associations\n"[""a""]",b\n')
  with pytest.raises(ValueError, match=r"t\.csv: record 2: 2 fields, but 3 columns"):
    open_winogavil(str(path))
  with pytest.raises(FileNotFoundError, match=r"other\.csv"):
    open_winogavil(str(tmp_path / "other.csv"))
  path.write_text('candidates,cue,associations\n"[""a""]",b,"[""a""]"\n')
  with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
    open_winogavil(f"{path}?root={tmp_path}")


class Listed(list):
  """Examples as a source."""

  name, classnames = "listed", ()


def test_images_without_two_captions_are_named():
  source = Listed([{"image": np.zeros((8, 8, 3), np.uint8), "captions": ("a 1",), "label": -1, "id": "a.png"}])
  with pytest.raises(ValueError, match="listed: sample 0 has 1 caption:"):
    composition(data(source), None)
  with pytest.raises(ValueError, match="listed: sample 0 has 1 caption:"):
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
