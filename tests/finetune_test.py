"""Fine-tuning by the trainer: from the weights of another run, with a zero-shot classifier; exact resumption."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from flax.traverse_util import flatten_dict
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
from runs import assert_equal, final_state, killed_before_line
from tiny import FinishedRun, tiny_config

from declip_jax import architectures, build, config, train
from declip_jax import first_state as first_state_lib
from declip_jax.clip import load
from declip_jax.data.mixture import Mixture
from declip_jax.data.recipes import RECIPES
from declip_jax.data.sources import open_source
from declip_jax.first_state import first_state, read_weights
from declip_jax.reporting.metrics import read_metrics
from declip_jax.training.state import abstract_state

TEMPLATES = ("a photo of a {}.", "one {}")


def finetune_config(init: Path, steps: int = 3) -> ConfigDict:
  """Fine-tuning of a tiny run on the scenes, at twice its resolution, with a zero-shot classifier."""
  c = tiny_config("finetune")
  c.duration = config.duration(steps=steps)
  c.data.image_size = 32
  c.init_from.path, c.init_from.groups, c.init_from.templates = str(init), ("image",), TEMPLATES
  c.model.heads.num_classes, c.model.heads.classify_joint = 0, True
  c.optimizer.layer_decay = 0.65
  c.evals.test = config.classify("scenes:test/30/24")
  return c


@pytest.mark.slow
def test_a_run_starts_from_other_weights_and_resumes_exactly(finished_run: FinishedRun, tmp_path: Path) -> None:
  c = finetune_config(finished_run.workdir)
  final = train.train(c, tmp_path / "whole")
  with killed_before_line(3):
    train.train(c, tmp_path / "killed")
  again = train.train(c, tmp_path / "killed")
  assert {name: again[name] for name in again if "loss" in name or "eval/" in name} == {
    name: final[name] for name in final if "loss" in name or "eval/" in name
  }
  saved = config.from_json((tmp_path / "whole" / "config.json").read_text())
  names = open_source("scenes:train/256/24").classnames
  assert (saved.model.heads.num_classes, saved.model.heads.classnames) == (70, names)  # taken from the data
  assert_equal(*(final_state(tmp_path / name, saved, 3) for name in ("whole", "killed")))
  lines = [line for line in read_metrics(tmp_path / "whole") if "loss" in line]
  assert all({"loss/classify", "class_accuracy", "gradient_norm/image"} <= set(line) for line in lines)
  assert 0 <= final["eval/test/top1"] <= 1
  assert final["eval/test/images"] == 30


def test_the_first_state_has_the_tower_and_the_zero_shot_classifier(finished_run: FinishedRun) -> None:
  c = finetune_config(finished_run.workdir)
  c.data.image_size, c.model.heads.num_classes = 16, 70  # the positions of the tower are then unchanged
  c.model.heads.classnames = open_source("scenes:train/256/24").classnames
  built = build.build(c, jax.devices()[:1])
  shapes = built.batch_shape(c.batch_size)
  abstract = abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer)
  state, messages = first_state(c, built, abstract, read_weights(c))
  clip = load(finished_run.workdir)
  ours, theirs = (flatten_dict(tree, sep="/") for tree in (state.params, jax.device_get(clip.params)))
  for path in ours:
    if path.startswith("towers/image") or "image_projection" in path:
      np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
  assert not any("text" in path for path in ours)
  images = [open_source("scenes:test/8/16")[index]["image"] for index in range(8)]
  pixels = np.stack([clip.preprocess(image) for image in images])
  pooled, _ = jax.jit(built.model.encode_image_features)(state.params, state.collections, pixels)
  logits = built.model.classify(state.params["heads"], pooled)
  expected = clip.encode_image(images) @ clip.classifier(c.model.heads.classnames, TEMPLATES).T
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  prompts = [template.format(name) for name in c.model.heads.classnames for template in TEMPLATES]
  mean = clip.encode_text(prompts).reshape(70, 2, -1).mean(axis=1)
  rows = clip.logit_scale * mean / np.linalg.norm(mean, axis=1, keepdims=True)
  np.testing.assert_allclose(ours["heads/classifier/kernel"].T, rows, rtol=1e-5, atol=1e-5)
  assert not ours["heads/classifier/bias"].any()
  assert "class names" in messages[-1]


@pytest.mark.parametrize(
  ("second", "name", "remark"),
  [
    ("n01443537", "goldfish", "prompts have ImageNet's names in place of WordNet ids, such as 'tench' for n01440764"),
    ("n02084071", "n02084071", "a class name is a WordNet id that ImageNet does not have, such as n02084071"),
    ("dog", "dog", "prompts have ImageNet's names"),
  ],
)
def test_the_zero_shot_classifier_of_wordnet_ids_is_that_of_their_names(
  second: str, name: str, remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  c, built, asked = finetune_config(Path("run")), mock.MagicMock(), []
  c.model.heads.classnames = ("n01440764", second)
  encoder = SimpleNamespace(classifier=lambda names, templates: asked.append((names, templates)) or np.eye(2))
  end = SimpleNamespace(average={})
  results = {
    "create_state": 0,
    "initialise": (SimpleNamespace(params={"heads": {}}), ["read"]),
    "Clip": encoder,
    "set_classifier": end,
  }
  for function, value in results.items():
    monkeypatch.setattr(first_state_lib, function, lambda *_, value=value, **__: value)
  weights = SimpleNamespace(view=SimpleNamespace(squash=False))
  state, messages = first_state(c, built, mock.MagicMock(), weights)
  assert (state, asked) == (end, [(("tench", name), TEMPLATES)])
  assert messages[0] == "read"
  assert messages[1].startswith(remark)
  assert len(messages) == 3


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"data.augment_on": "device"}, "config.data.augment_on='device': recipe 'finetune' has RandAugment"),
    ({"data.recipe": "clip"}, "term 'classify' .* Views.classified_image, which the recipe 'clip' does not make"),
    ({"model.heads.num_classes": 0}, "config.model.heads.num_classes=0: a classifier needs at least 1 class"),
    ({"objective.clip.weight": 1.0, "data.recipe": "both", "model.heads.classify_joint": True}, "classify_joint=True"),
    ({"model.drop_path": 1.0}, "config.model.drop_path=1.0: expected"),
    ({"data.rand_magnitude": 11.0}, "config.data.rand_magnitude=11.0: expected 0 to 10"),
    ({"data.erase_probability": 2.0}, "config.data.erase_probability=2.0: expected 0 to 1"),
    ({"data.mixup": -1.0}, "config.data.mixup=-1.0: expected a finite number, 0 or more"),
  ],
)
def test_what_does_not_fit_is_rejected(fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
  both = RECIPES["clip"].views.replace(classified_image=(0,))
  monkeypatch.setitem(RECIPES, "both", dataclasses.replace(RECIPES["clip"], views=both))
  c = tiny_config("finetune")
  c.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=message):
    build.build(c)


def test_drop_path_needs_a_vision_transformer() -> None:
  c = tiny_config("clip")
  c.model.drop_path, c.model.image = 0.1, architectures.resnet(4, (1, 1, 1, 1))
  with pytest.raises(ValueError, match=r"config\.model\.drop_path=0.1 needs config\.model\.image\.kind='vit'"):
    build.build(c)


def test_classes_of_the_data_have_to_be_those_of_the_classifier() -> None:
  mixture = Mixture((open_source("scenes:train/8/16"), open_source("scenes:heldout/8/16")), (1.0, 1.0), False)
  names = mixture.sources[0].classnames
  with pytest.raises(ValueError, match="scenes:heldout/8/16 has 30 class names, but config.model.heads.num_classes=70"):
    mixture.check_classes(70, names)
  evals = ConfigDict({"mine": config.classify("scenes:heldout/8/16")})
  with pytest.raises(ValueError, match=r"config\.evals\.mine: .*; only in scenes:heldout/8/16: 'red circle'"):
    build.make_evaluators(evals, Path(), names)
  with pytest.raises(ValueError, match="class 0 is 'red star' in scenes:train/8/16, but 'red cross'"):
    mixture.check_classes(70, (names[1], names[0], *names[2:]))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"init_from.path": ""}, r"config\.init_from\.templates=.*weights with a text tower"),
    ({"model.heads.classify_joint": False}, r"config\.init_from\.templates=.*classify_joint=True"),
  ],
)
def test_a_classifier_cannot_start_from_texts_without_joint_embeddings(fields: dict[str, Any], message: str) -> None:
  c = finetune_config(Path("run"))
  c.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=message):
    build.make_init_from(c)
