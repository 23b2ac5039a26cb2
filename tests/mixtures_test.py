"""Tests of `declip_jax.mixtures` and of the results that `declip_jax.evaluate` has of them."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clips import make_clip
from flax.traverse_util import flatten_dict
import jax
import numpy as np
import pytest
from tiny import tiny_config

from declip_jax import evaluate
from declip_jax.clip import Clip
from declip_jax.data.images import EvalView
from declip_jax.mixtures import mixtures

NAMES, TEMPLATES = ("ring", "blue star", "cross"), ("a photo of a {}.", "one {}")


def finetuned(**fields: Any) -> Clip:
  return make_clip(1, ("classifier",), heads__num_classes=3, heads__classnames=NAMES, **fields)


def arrays(clip: Clip) -> dict[str, np.ndarray]:
  return jax.tree.map(np.asarray, flatten_dict(clip.params, sep="/"))


@pytest.fixture(scope="module")
def start() -> Clip:
  return make_clip(0)


def test_mixtures_lie_on_the_line_between_two_models(start: Clip) -> None:
  end = make_clip(1)
  found = dict(mixtures(start, end, (0, 0.25, 1), TEMPLATES))
  before, after = arrays(start), arrays(end)
  assert len(before) > 20
  for share, mixed in found.items():
    for path, leaf in arrays(mixed).items():
      np.testing.assert_allclose(leaf, (1 - share) * before[path] + share * after[path], rtol=1e-5, err_msg=path)
  np.testing.assert_array_equal(arrays(end)["heads/logit_scale"], after["heads/logit_scale"])  # is not changed


def test_a_fine_tuned_model_is_mixed_with_the_zero_shot_classifier_of_its_classes(start: Clip) -> None:
  end = finetuned(heads__classify_joint=True)
  (_, first), (_, middle) = mixtures(start, end, (0, 0.5), TEMPLATES)
  assert set(arrays(first)) == set(arrays(end))
  assert not [path for path in arrays(first) if "text" in path]
  rows, before = start.classifier(NAMES, TEMPLATES), {**arrays(start)}
  before |= {"heads/classifier/kernel": rows.T, "heads/classifier/bias": np.zeros(3)}
  after = arrays(end)
  for path, leaf in arrays(middle).items():
    np.testing.assert_allclose(arrays(first)[path], before[path], err_msg=path)
    np.testing.assert_allclose(leaf, (before[path] + after[path]) / 2, rtol=1e-5, err_msg=path)


def test_the_zero_shot_classifier_has_names_in_place_of_wordnet_ids(start: Clip, capsys: pytest.CaptureFixture) -> None:
  ids = ("n01440764", "n01443537", "n02084071")  # of which ImageNet does not have the last one
  end = make_clip(1, ("classifier",), heads__num_classes=3, heads__classnames=ids, heads__classify_joint=True)
  ((_, first),) = mixtures(start, end, (0,), TEMPLATES)
  rows = start.classifier(("tench", "goldfish", "n02084071"), TEMPLATES)
  np.testing.assert_allclose(arrays(first)["heads/classifier/kernel"], rows.T)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("a class name is a WordNet id that ImageNet does not have, such as n02084071")


def test_models_that_compute_different_things_cannot_be_mixed(start: Clip) -> None:
  changes = [
    (
      {"image": {**start.fields["image"], "heads": 4}},
      r"image.heads=2 of .*weights 0.* does not match 4 of .*weights 1",
    ),
    (
      {"text": {**start.fields["text"], "tokenizer": "own"}},
      r"text.tokenizer='openai' of .*weights 0.* does not match",
    ),
    ({}, r"weights 0 normalises pixels with std \(1.0, 1.0, 1.0\), and"),
  ]
  for fields, message in changes:
    end = copy.copy(make_clip(1))
    end.fields = {**end.fields, **fields}
    end.view = end.view if fields else EvalView(16, std=(1.0, 1.0, 2.0))
    with pytest.raises(ValueError, match=message):
      next(mixtures(start, end, (0.5,), TEMPLATES))
  heads = {**start.params["heads"], "image_projection": {"kernel": np.zeros((32, 8), np.float32)}}
  end = start.with_weights({**start.params, "heads": heads}, start.collections)
  with pytest.raises(ValueError, match=r"params/heads/image_projection/kernel, \(32, 16\) and \(32, 8\)"):
    next(mixtures(start, end, (0.5,), TEMPLATES))


def test_only_a_classifier_of_joint_embeddings_has_a_zero_shot_counterpart(start: Clip) -> None:
  with pytest.raises(ValueError, match=r"the classifier of weights 1 has the shape \(32, 3\).*head=text"):
    next(mixtures(start, finetuned(), (0.5,), TEMPLATES))


class Given(SimpleNamespace):
  """Values of flags; all are given on the command line, except those in `absent`."""

  absent = ()

  def __getitem__(self, name: str) -> SimpleNamespace:
    return SimpleNamespace(present=name not in self.absent)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
  given = Given(interpolate_with="runs/clip", alpha=["0.25", "1"], template=list(TEMPLATES))
  monkeypatch.setattr(evaluate.flags, "FLAGS", given)
  return given


def test_results_of_mixtures_have_the_share_and_a_name_of_their_own(
  start: Clip, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(evaluate, "load", lambda path, settings: {"runs/clip": start}[path])
  end = make_clip(1)
  found = [facts for _, facts in evaluate._models(end, None, Path("runs/pets"))]
  assert [facts.weights["share"] for facts in found] == [0.25, 1.0]
  assert [facts.pretrained.rpartition("-share-")[2] for facts in found] == ["0.25", "1"]
  other = found[0].weights["interpolated_with"]
  assert (other["path"], other["origin"], found[0].weights["path"]) == ("runs/clip", "weights 0", "runs/pets")
  hashes = [*(facts.weights["hash"] for facts in found), other["hash"]]
  given.interpolate_with = None
  given.alpha = None
  (whole,) = (facts for _, facts in evaluate._models(end, None, Path("runs/pets")))
  assert len(set(hashes)) == 3
  assert whole.weights["hash"] == hashes[1]  # so that its features need not be computed again
  assert "share" not in whole.weights


def test_shares_are_those_of_wise_ft_by_default() -> None:
  assert evaluate._shares(evaluate._ALPHA) == pytest.approx(np.arange(21) / 20)


@pytest.mark.parametrize(
  ("absent", "own", "expected"),
  [((), ("own {}",), TEMPLATES), (("template",), ("own {}",), ("own {}",)), (("template",), (), TEMPLATES)],
)
def test_prompts_of_the_command_line_replace_those_of_the_run(
  absent: tuple[str, ...],
  own: tuple[str, ...],
  expected: tuple[str, ...],
  start: Clip,
  given: Given,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  c, used = tiny_config("finetune"), []
  given.absent, c.init_from.templates = absent, own
  monkeypatch.setattr(evaluate, "load", lambda path, settings: start)
  monkeypatch.setattr(evaluate, "mixtures", lambda start, end, shares, templates: used.extend(templates) or [])
  assert [*evaluate._models(start, c, Path("run"))] == []
  assert tuple(used) == expected


def test_wrong_shares_are_named(start: Clip, given: Given) -> None:
  given.alpha = ["0", "half"]
  with pytest.raises(ValueError, match=r"--alpha=0,half: 'half' is not a number from 0 to 1"):
    next(evaluate._models(start, None, Path("run")))
  given.alpha = ["1.5"]
  with pytest.raises(ValueError, match=r"'1.5' is not a number"):
    next(evaluate._models(start, None, Path("run")))
  given.interpolate_with = None
  with pytest.raises(ValueError, match=r"--alpha=1.5 needs --interpolate_with"):
    next(evaluate._models(start, None, Path("run")))
