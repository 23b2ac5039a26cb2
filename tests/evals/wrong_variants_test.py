"""Ways to get an evaluation wrong, each of which changes a number: protocols, and the traps of data sets and code.

Each function is a wrong variant. It returns the number that the package gives, the right one, from a reference (see
fixtures/README.md) or from a few lines here, and that of the variant.
"""

from collections.abc import Callable
from dataclasses import replace
import functools
from typing import Any

from greys import Greys, grey_encoders
import jax
import numpy as np
import pytest
import references as reference
from scipy.special import softmax

from declip_jax.data.images import EvalView
from declip_jax.evals import EVALUATORS, composition, linear_probe, metrics, nearest, prompts, ranks, robustness
from declip_jax.evals.catalogue import data_set
from declip_jax.evals.classes import align
from declip_jax.evals.encoders import Encoders
from declip_jax.evals.features import EvaluationData, Split, Texts, make_data
from declip_jax.evals.results import Scores
from declip_jax.evals.rows import Labelled, ProbeData
from declip_jax.evals.similarity import unit_rows
from declip_jax.sharding import make_mesh

# The number of the package, the right one, and that of the wrong variant.
Numbers = tuple[float, float, float]
golden = functools.cache(reference.load)


# Zero-shot classification.


class Pictures(list):
  """A source of pictures whose grey is their number, with one label, or several, each."""

  name, skipped, left_out = "pictures", {}, {}

  def __init__(self, labels: Any, classnames: Any):
    super().__init__(labels)
    self.classnames = tuple(classnames)

  def __getitem__(self, index: int) -> dict[str, Any]:
    own = super().__getitem__(index)
    label = {"label": own} if isinstance(own, int) else {"label": -1, "labels": own}
    return {"image": np.full((8, 8, 3), index, np.uint8), "captions": (), "id": str(index), **label}


def zero_shot(cosines: np.ndarray, labels: Any, names_of_source: Any, **data: Any) -> Scores:
  """Scores of pictures by given cosines, up to a factor per picture, with the classes of the data set."""
  names = data.setdefault("classnames", tuple(names_of_source))
  encoders = Encoders(
    image=lambda images: (cosines[images[:, 0, 0, 0]],) * 2,
    text=lambda tokens: np.eye(len(names), dtype=np.float32)[tokens[:, 0]],
    tokenizer=lambda texts: np.array([[names.index(text)] for text in texts]),
    view=EvalView(8),
    batch_size=8,
    batch_rows=np.arange(8),
  )
  split = Split(Pictures(labels, names_of_source), encoders, classes=data.pop("classes", None))
  made = make_data(encoders, Texts(encoders), split, prompts=[[name] for name in names], **data)
  return EVALUATORS["zero_shot"].function(made, None)


def random_cosines(rows: int, classes: int) -> np.ndarray:
  return unit_rows(np.random.default_rng(0).normal(size=(rows, classes)))


def classes_by_their_position() -> Numbers:
  """TFDS has KITTI's four classes in another order than CLIP."""
  data = data_set("kitti_distance")
  theirs = [data.classes[number] for number in (2, 0, 1, 3)]
  label = [0, 1, 2, 3, 0, 1, 2]  # of the source
  right = [(2, 0, 1, 3)[number] for number in label]
  found = zero_shot(
    np.eye(4, dtype=np.float32)[right],
    label,
    theirs,
    classnames=data.classes,
    classes=align(data, theirs, "folder:/kitti"),
  )
  return found.metrics["top1"], 1.0, float(np.mean(np.array(right) == label))


def prompts_averaged_before_they_are_normalised() -> Numbers:
  g = golden("prompts")
  owner = g["class_template_synonym"].astype(int)[:, 0]
  weights = prompts.classifier(g["text_embedding"], [np.flatnonzero(owner == number) for number in range(9)])
  predicted = (unit_rows(g["image_embedding"]) @ weights.T).argmax(axis=1)
  right, wrong = g["all_in_one_mean/pred"], g["wrong_mean_before_normalising/pred"]
  return tuple(float((own == g["label"]).mean()) for own in (predicted, right, wrong))


def only_the_first_synonym() -> Numbers:
  """FER2013 has twelve names for seven classes."""
  data = data_set("fer2013")
  return len(sum(data.prompts(), ())), 6 * 12, 6 * len(data.classes)


def equal_logits_answer_the_last_class() -> Numbers:
  g = golden("evaluation_metrics")
  logits, label = g["ties/logits"], g["ties/labels"]
  last = logits.shape[1] - 1 - logits[:, ::-1].argmax(axis=1)
  found = metrics.predict(logits, label)
  return float(metrics.accuracy(found.correct())), g["ties/lower_index_first_top1"], (last == label).mean()


def logits_that_are_not_numbers_answer_the_first_class() -> Numbers:
  logits, label = np.array([[np.nan] * 3, [0, 1, 0]]), np.array([0, 1])
  found = metrics.predict(logits, label)
  return float(metrics.accuracy(found.correct())), 0.5, float((logits.argmax(axis=1) == label).mean())


def images_are_weighed_equally_where_classes_are() -> Numbers:
  """Pets, aircraft, Caltech-101 and flowers report the mean over classes."""
  cosines, label = random_cosines(30, 3), [0] * 20 + [1] * 7 + [2] * 3
  hits = cosines.argmax(axis=1) == label
  right = float(np.mean([hits[:20].mean(), hits[20:27].mean(), hits[27:].mean()]))
  found = zero_shot(cosines, label, "abc", metric=str(data_set("pets").metric))
  return found.metrics[found.headline], right, float(hits.mean())


def classes_without_an_image_count_as_wrong() -> Numbers:
  g = golden("evaluation_metrics")
  found = metrics.predict(g["ties/logits"], g["ties/labels"])
  by_class = metrics.accuracy_by(found.label, found.correct())
  right, wrong = g["absent/mean_per_class_over_present"], sum(by_class.values()) / found.classes
  return float(metrics.mean_per_class(found.label, found.correct())), right, wrong


def top1_alone_on_kinetics() -> Numbers:
  g = golden("evaluation_metrics")
  found = metrics.predict(g["ties/logits"], g["ties/labels"])
  function, columns, _ = metrics.PREDICTION_METRICS[str(data_set("kinetics700").metric)]
  value = function(*columns({"rank": found.rank}))
  return float(value), g["kinetics/mean_of_top1_top5_of_the_tied_logits"], found.correct().mean()


def one_logit_as_the_score_of_hateful_memes() -> Numbers:
  g = golden("evaluation_metrics")
  logits, label = g["auc/logits"], g["auc/labels"].astype(int)
  unit = unit_rows(logits)
  found = zero_shot(logits[:200], label.tolist()[:200], "ab", metric=str(data_set("hateful_memes").metric))
  right, wrong = (metrics.roc_auc(label > 0, score) for score in (unit[:, 1] - unit[:, 0], unit[:, 1]))
  return found.metrics[found.headline], float(right), float(wrong)


def tied_pairs_count_as_right_in_an_auc() -> Numbers:
  g = golden("evaluation_metrics")
  score, present = g["auc_with_ties/scores"], g["auc_with_ties/labels"] > 0
  wrong = (score[present][:, None] >= score[~present][None]).mean()
  return float(metrics.roc_auc(present, score)), g["auc_with_ties/roc_auc"], wrong


def groups_without_an_image_are_the_worst() -> Numbers:
  g = golden("evaluation_metrics")
  correct = metrics.predict(g["ties/logits"], g["ties/labels"]).correct()
  found = metrics.worst_group(g["groups/group"].astype(int), correct)
  return float(found), g["groups/worst_group_of_those_with_examples"], 0.0


def f1_of_all_classes_instead_of_those_that_occur() -> Numbers:
  g = golden("evaluation_metrics")
  found = metrics.predict(g["ties/logits"], g["ties/labels"])
  right = g["wilds/f1_macro"]
  wrong = right * len(np.unique(found.label)) / found.classes
  return float(metrics.macro_f1(found.label, found.predicted)), right, wrong


# Several labels.


def area_under_the_curve_instead_of_eleven_points() -> Numbers:
  g = golden("evaluation_metrics")
  labels, scores = g["voc/present1_difficult0_absent-1"].astype(np.int8), g["voc/scores"]
  right, wrong = g["voc/ap11_difficult_left_out"].mean(), g["voc/average_precision_difficult_left_out"].mean()
  function, columns, _ = metrics.PREDICTION_METRICS[str(data_set("voc2007").metric)]
  return float(function(*columns({"labels": labels, "scores": scores}))), right, wrong


def difficult_objects_count_as_present() -> Numbers:
  g = golden("evaluation_metrics")
  labels, scores = g["voc/present1_difficult0_absent-1"].astype(np.int8), g["voc/scores"]
  right, wrong = g["voc/ap11_difficult_left_out"].mean(), g["voc/ap11_difficult_as_present"].mean()
  return float(metrics.mean_average_precision(labels, scores)), right, wrong


def images_are_ranked_by_cosines_without_a_softmax() -> Numbers:
  """The cosines of a class are not comparable between images."""
  cosines = random_cosines(60, 4)
  labels = np.where(cosines + random_cosines(120, 2).reshape(60, 4) > 0.6, 1, -1).astype(np.int8)
  labels[:4] = 2 * np.eye(4) - 1
  found = zero_shot(cosines, labels, "abcd", metric=str(data_set("voc2007").metric))
  right, wrong = (
    metrics.mean_average_precision(labels, own) for own in (softmax(100 * cosines.astype(float), axis=1), cosines)
  )
  return found.metrics[found.headline], float(right), float(wrong)


def real_images_without_a_label_are_wrong() -> Numbers:
  labels = np.array([[1, 1, -1], [-1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.int8)
  cosines = np.eye(3, dtype=np.float32)[[1, 0, 1, 0]]
  found = zero_shot(cosines, labels, "abc", metric=str(data_set("imagenet_real").metric))
  return found.metrics[found.headline], 2 / 3, 2 / 4


def only_the_first_of_several_right_labels() -> Numbers:
  labels = np.array([[1, 1, -1], [-1, 1, 1], [1, -1, -1]], np.int8)
  cosines = np.eye(3, dtype=np.float32)[[1, 2, 0]]
  found = zero_shot(cosines, labels, "abc", metric="any_label")
  return found.metrics[found.headline], 1.0, float((labels.argmax(axis=1) == [1, 2, 0]).mean())


# Parts of ImageNet.


def all_classes_are_answers_of_imagenet_r() -> Numbers:
  g = golden("evaluation_metrics")
  logits, label = g["subset/logits_of_all_classes"], g["subset/labels_within_subset"].astype(int)
  found = metrics.predict(metrics.merge_classes(logits, g["subset/class_ids"].astype(int)[:, None].tolist()), label)
  return float(metrics.accuracy(found.correct())), g["subset/top1_restricted"], g["subset/top1_unrestricted"]


def only_the_first_class_of_imagenet_for_one_of_objectnet() -> Numbers:
  g = golden("evaluation_metrics")
  logits, label = g["subset/logits_of_all_classes"], g["mapped/labels"].astype(int)
  ids = [own[own >= 0].tolist() for own in g["mapped/imagenet_ids_per_class"].astype(int)]
  found = metrics.predict(metrics.merge_classes(logits, ids), label)
  first = logits[:, [own[0] for own in ids]].argmax(axis=1)
  right, wrong = g["mapped/top1_max_over_mapped"], (first == label).mean()
  return float(metrics.accuracy(found.correct())), right, wrong


def a_line_through_accuracies_on_a_linear_scale() -> Numbers:
  g = golden("robustness")
  standard = g["standard_in_percent"] / 100, g["standard_shift_percent"] / 100
  accuracy = g["evaluated_in_percent"][0] / 100
  right, wrong = (g[f"{scale}/expected_shift_percent"][0] / 100 for scale in ("logit", "linear"))
  return float(robustness.fit_line(*standard).expected(accuracy)), right, wrong


# Probes.

TRAIN = [(grey, int(grey > 120)) for grey in range(0, 250, 10)]
TEST = [(5, 0), (15, 0), (205, 1), (95, 0), (235, 1), (105, 1), (40, 0)]


def probe(kind: str, encoders: Encoders | None = None, test: Any = TEST, **options: Any) -> Scores:
  encoders = encoders or grey_encoders(8)
  splits = {name: Split(Greys(TRAIN), encoders) for name in ("train", "val")}
  data: EvaluationData = make_data(encoders, Texts(encoders), Split(Greys(test), encoders), **splits)
  return EVALUATORS[kind].function(data, None, **options)


def nearest_mean_of(features: Callable[[np.ndarray], np.ndarray]) -> float:
  (grey, label), (asked, expected) = (np.array(rows, float).T for rows in (TRAIN, TEST))
  means = unit_rows(np.stack([unit_rows(features(grey))[label == k].mean(axis=0) for k in (0, 1)]))
  return float(((unit_rows(features(asked)) @ means.T).argmax(axis=1) == expected).mean())


def a_probe_of_features_after_the_projection() -> Numbers:
  """The tower's output is the grey; after the projection it is (grey, 3)."""
  pooled, joint = lambda grey: grey[:, None], lambda grey: np.stack([grey, 0 * grey + 3], axis=1)
  return probe("nearest_mean").metrics["top1"], nearest_mean_of(pooled), nearest_mean_of(joint)


def hyperparameters_chosen_on_the_test_split() -> Numbers:
  """Of a test split whose labels are all wrong, the learning rate that learns nothing would be the best."""
  encoders, test = grey_encoders(8), [(grey, 1 - label) for grey, label in TEST]
  centred = replace(encoders, image=lambda images: tuple(x / 125 - 1 for x in encoders.image(images)))
  found = probe("sgd_probe", centred, test, rates=(1e-9, 1.0), epochs=20, batch_size=8)
  return found.details["rate"], 1.0, 1e-9


def two_classes_are_a_softmax_of_two_vectors() -> Numbers:
  g, mesh = reference.below(golden("probes"), "probe/binary/"), make_mesh(1, 1, jax.devices()[:1])
  train, test = (Labelled(g[f"X_{name}"], g[f"y_{name}"]) for name in ("train", "test"))
  data = ProbeData(train, test, lambda scores, label: 0.0, 2, mesh)
  found = linear_probe.fit(data, g["C"][2], tolerance=1e-6).classifier.kernel
  right, wrong = g["coef"][2], g["coef_of_two_class_softmax_same_C"][2]
  largest = np.abs(right).argmax()
  scale = np.abs(right).max()  # the fixture's tolerance is relative to it
  return tuple(float(own[largest] / scale) for own in (found[:, 1] - found[:, 0], right, wrong))


def a_class_without_training_data_is_answered() -> Numbers:
  train = Labelled(np.array([[1.0, 1], [1, 2]], np.float32), np.array([0, 2]))
  test = Labelled(np.array([[-1.0, -1], [1, 2]], np.float32), np.array([0, 2]))
  logits, label = nearest.nearest_mean(train, test, classes=3)
  cosine = np.where(np.isinf(logits), 0, logits)  # to a mean of zeros
  return float((logits.argmax(axis=1) == 1).mean()), 0.0, float((cosine.argmax(axis=1) == 1).mean())


# Retrieval and composition.


@functools.cache
def retrieved() -> tuple[ranks.RetrievalRanks, dict[str, np.ndarray], np.ndarray]:
  """Ranks, the numbers of the reference, and all cosines of texts and images."""
  g = golden("retrieval")
  image, text, owner = g["image"], g["text"], g["text_to_image"].astype(int)
  return ranks.retrieval_ranks(image, text, owner), g, unit_rows(text) @ unit_rows(image).T


def recall(name: str) -> float:
  return ranks.recalls(retrieved()[0])[name]


def ties_count_in_favour_of_a_retrieval() -> Numbers:
  _, g, _ = retrieved()
  way = "image_to_text"
  return recall(f"{way}_r1"), g[f"{way}/r1"], (g[f"{way}/rank_ties_for_the_model"] < 1).mean()


def images_without_a_caption_are_candidates() -> Numbers:
  _, g, scores = retrieved()
  owner = g["text_to_image"].astype(int)
  own = scores[np.arange(len(owner)), owner]
  others = (scores >= own[:, None]).sum(axis=1) - 1
  return recall("text_to_image_mean_rank"), g["text_to_image/mean_rank"], float(1 + others.mean())


def recall_of_texts_is_averaged_over_images() -> Numbers:
  """The texts of images with few texts would count more."""
  _, g, _ = retrieved()
  owner, found = g["text_to_image"].astype(int), g["text_to_image/rank_ties_against"] < 1
  wrong = np.mean([found[owner == image].mean() for image in np.unique(owner)])
  return recall("text_to_image_r1"), g["text_to_image/r1"], float(wrong)


def an_image_has_to_find_all_of_its_texts() -> Numbers:
  """Any of them counts; this is the share of its texts among the first five."""
  _, g, scores = retrieved()
  owner = g["text_to_image"].astype(int)
  first = np.argsort(-scores.T, axis=1, kind="stable")[:, :5]
  shares = [(owner[first[image]] == image).sum() / (owner == image).sum() for image in g["kept_images"].astype(int)]
  return recall("image_to_text_r5"), g["image_to_text/r5"], float(np.mean(shares))


def the_folds_of_coco_are_searched_together() -> Numbers:
  _, g, _ = retrieved()
  found = ranks.recalls(ranks.retrieval_ranks(g["image"], g["text"], g["text_to_image"].astype(int), folds=5))
  return found["text_to_image_r1"], g["folds5/text_to_image_r1"], g["text_to_image/r1"]


def equal_scores_of_captions_are_right() -> Numbers:
  g = golden("retrieval")
  image, text = (unit_rows(g[f"winoground/{name}"].reshape(180, -1)) for name in ("image", "text"))
  scores = composition.caption_scores(image[::2], text)
  right, wrong = g["sugarcrepe/acc_strict"], g["sugarcrepe/acc_ties_count_as_right_as_in_clipbench"]
  return float(composition.choice(scores)["accuracy"].mean()), right, wrong


def instances_of_any_size_count_in_winogavil() -> Numbers:
  g = golden("winogavil")
  function, columns, _ = metrics.JACCARD_METRICS[str(data_set("winogavil").metric)]
  return float(function(*columns(g))), g["mean/jaccard"], g["mean/jaccard_all"]


VARIANTS = [
  classes_by_their_position,
  prompts_averaged_before_they_are_normalised,
  only_the_first_synonym,
  equal_logits_answer_the_last_class,
  logits_that_are_not_numbers_answer_the_first_class,
  images_are_weighed_equally_where_classes_are,
  classes_without_an_image_count_as_wrong,
  top1_alone_on_kinetics,
  one_logit_as_the_score_of_hateful_memes,
  tied_pairs_count_as_right_in_an_auc,
  groups_without_an_image_are_the_worst,
  f1_of_all_classes_instead_of_those_that_occur,
  area_under_the_curve_instead_of_eleven_points,
  difficult_objects_count_as_present,
  images_are_ranked_by_cosines_without_a_softmax,
  real_images_without_a_label_are_wrong,
  only_the_first_of_several_right_labels,
  all_classes_are_answers_of_imagenet_r,
  only_the_first_class_of_imagenet_for_one_of_objectnet,
  a_line_through_accuracies_on_a_linear_scale,
  a_probe_of_features_after_the_projection,
  hyperparameters_chosen_on_the_test_split,
  two_classes_are_a_softmax_of_two_vectors,
  a_class_without_training_data_is_answered,
  ties_count_in_favour_of_a_retrieval,
  images_without_a_caption_are_candidates,
  recall_of_texts_is_averaged_over_images,
  an_image_has_to_find_all_of_its_texts,
  the_folds_of_coco_are_searched_together,
  equal_scores_of_captions_are_right,
  instances_of_any_size_count_in_winogavil,
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_a_wrong_variant_gives_another_number(variant: Callable[[], Numbers]) -> None:
  found, right, wrong = variant()
  assert found == pytest.approx(right, abs=1e-4)
  assert abs(wrong - right) > 1e-3
