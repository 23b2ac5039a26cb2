"""Fine-tuning on pairs: a config that follows its weights; runs with adapters, evaluated first, resumed and loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clips import make_weights
from flax.traverse_util import flatten_dict
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
from runs import assert_equal, final_state, killed_before_line
from steps import random_batch
from tiny import FinishedRun, tiny_config

from declip_jax import build, config, config_files, first_state, sharding
from declip_jax.clip import load
from declip_jax.models.lora import merge
from declip_jax.reporting.metrics import read_metrics
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.sharding import batch_sharding, to_global
from declip_jax.train import train
from declip_jax.training.state import State, abstract_state
from declip_jax.weights.describe import describe
from declip_jax.weights.read import read
from declip_jax.weights.write import write


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """An orbax export that squashes images, with a sigmoid head."""
  folder = tmp_path_factory.mktemp("weights") / "siglip"
  c, given = tiny_config("siglip"), make_weights(0)
  model = {**given.model, "mean": (0.5,) * 3, "std": (0.5,) * 3}
  heads = {**given.params["heads"], "logit_bias": np.float32(-9.5), "logit_scale": np.float32(2.5)}
  weights = given._replace(
    model={**model, "dtype": c.model.dtype},
    heads=("joint", "sigmoid"),
    params={**given.params, "heads": heads},
    view=replace(given.view, squash=True, interpolation="bicubic", mean=model["mean"], std=model["std"]),
  )
  write(weights, folder, "orbax")
  return folder


def get(init: Path | str, **arguments: Any) -> ConfigDict:
  """The config by its name."""
  return config_files.load_module("finetune_pairs").get_config(init=str(init), **arguments)


def run_config(init: Path, **arguments: Any) -> ConfigDict:
  """A run of three steps from these weights."""
  c = get(init, data="scenes:train/96/24", test="scenes:test/20/24", **arguments)
  c.batch_size, c.duration, c.model.dtype, c.model.remat = 16, config.duration(steps=3), "float32", "dots"
  c.data.threads, c.log_every, c.evaluate_batch_size = 2, 1, 16
  c.evaluate_every, c.checkpoint.every = config.duration(), config.duration(steps=2)
  c.optimizer.learning_rate, c.optimizer.warmup = 1e-2, config.duration()
  return c


def test_the_config_follows_the_weights(siglip: Path) -> None:
  c = get(siglip, data="pairs.csv", lora=4)
  assert c.objective.sigmoid.weight == 1
  assert (c.data.squash, c.data.interpolation, c.data.image_size) == (True, "bicubic", 16)
  assert (c.model.mean, c.model.image.width, c.model.text.context_length) == ((0.5,) * 3, 32, 16)
  assert (c.lora.rank, c.lora.towers, c.optimizer.learning_rate) == (4, ("image", "text"), 2e-4)
  assert c.init_from.groups == ("image", "text", "heads")
  assert c.data.train == ("kept:10%,5000:table:pairs.csv",)
  assert c.evals.retrieval.data == "heldout:10%,5000:table:pairs.csv"
  c = get(siglip, data="pairs.csv", test="test.csv", method="clip", lock="image")
  assert (c.objective.clip.weight, c.objective.sigmoid.weight) == (1, 0)
  assert (c.data.train, c.evals.retrieval.data) == (("table:pairs.csv",), "table:test.csv")
  assert c.optimizer.frozen == ("towers/image", "heads/image_projection")
  assert get(siglip, lora=2, lock="image").lora.towers == ("text",)


def test_runs_and_files_are_described_without_their_arrays(
  finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Of a run, JSON is enough. A loss that the weights were not trained with starts with its own temperature."""
  monkeypatch.setattr("declip_jax.runtime.checkpoint.Checkpoints.restore_model", pytest.fail)
  c = get(f"{finished_run.workdir}/checkpoints/8", method="siglip")
  run = finished_run.config
  assert c.model.text.to_dict() == run.model.text.to_dict()
  assert (c.model.image.to_dict(), c.model.mean) == (run.model.image.to_dict(), run.model.mean)
  assert c.init_from.groups == ("image", "text")
  write(make_weights(1), tmp_path / "clip", "open_clip")
  found, weights = describe(tmp_path / "clip", {"text.context_length": 8}), read(tmp_path / "clip")
  assert (found.view, found.heads, found.origin) == (weights.view, weights.heads, weights.origin)
  assert found.model == {**weights.model, "text": {**weights.model["text"], "context_length": 8}}
  assert get(tmp_path / "clip").objective.clip.weight == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"init": ""}, r"init= is missing"),
    ({"init": "/nowhere"}, r"/nowhere does not exist"),
    ({"method": "declip"}, r"method 'declip': choose one of \['clip', 'siglip', 'filip'\]"),
    ({"lock": "imag"}, r"lock 'imag': choose one of .*did you mean image"),
    ({"lock": "towers", "lora": 8}, r"lora=8, lock='towers'"),
    ({"settings": ("image.headz=4",)}, r"no field 'image.headz'"),
  ],
)
def test_arguments_are_checked(siglip: Path, arguments: dict[str, Any], message: str) -> None:
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    get(**{"init": siglip, **arguments})


def test_squashing_reaches_views_and_evaluation(siglip: Path) -> None:
  c = run_config(siglip)
  built = build.build(c, jax.devices()[:1])
  assert [augmentation.squash for augmentation in built.recipe.augmentations] == [True]
  weights = read(siglip)
  assert first_state._about_squash(weights, c) == []
  c.data.squash = False
  (remark,) = first_state._about_squash(weights, c)
  assert "trained on whole images" in remark
  assert remark.endswith("config.data.squash=True does as they do")
  c.data.squash, c.data.evaluation_resize = True, 20
  with pytest.raises(ValueError, match="evaluation_resize=20 has no effect with config.data.squash=True"):
    build.build(c, jax.devices()[:1])


def test_evaluations_cannot_cut_more_than_they_resize_to(siglip: Path) -> None:
  c = run_config(siglip)
  c.data.squash, c.data.evaluation_resize = False, c.data.image_size - 1
  with pytest.raises(ValueError, match=r"evaluation_resize=\d+, from which evaluations cut, is less than"):
    build.build(c, jax.devices()[:1])
  c.data.evaluation_resize += 1
  build.build(c, jax.devices()[:1])


def random_state(built: build.Built) -> State:
  """A state with random parameters, on one device."""
  abstract = abstract_state(built.batch_shape(16), built.mesh, model=built.model, optimizer=built.optimizer)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), abstract.params)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), zeros.replace(params=params), abstract)


def test_a_run_with_adapters_is_read_with_merged_kernels(siglip: Path, tmp_path: Path) -> None:
  c = run_config(siglip, lora=2)
  built = build.build(c, jax.devices()[:1])
  state, checkpoints = random_state(built), Checkpoints(tmp_path)
  checkpoints.save(3, state, data={}, config=c.to_dict())
  checkpoints.close()
  weights = read(tmp_path)
  assert_equal(weights.params, jax.device_get(merge(state.params, built.model.lora)))
  assert weights.view.squash
  trees = [tree["towers"]["text"]["transformer"]["blocks"]["qkv"]["kernel"] for tree in (weights.params, state.params)]
  assert abs(trees[0] - np.asarray(trees[1])).max() > 0.01


@pytest.mark.slow
def test_a_run_is_evaluated_first_resumes_exactly_and_is_loaded(siglip: Path, tmp_path: Path) -> None:
  c = run_config(siglip, lora=2)
  c.optimizer.ema = 0.5
  final = train(c, tmp_path / "whole")
  with killed_before_line(3):
    train(c, tmp_path / "killed")
  again = train(c, tmp_path / "killed")
  assert {name: again[name] for name in again if "loss" in name or "eval/" in name} == {
    name: final[name] for name in final if "loss" in name or "eval/" in name
  }
  (whole, _), (resumed, _) = (final_state(tmp_path / name, c, 3) for name in ("whole", "killed"))
  assert_equal(whole, resumed)
  evaluated = [line["step"] for line in read_metrics(tmp_path / "whole") if "eval/retrieval/mean_recall" in line]
  assert evaluated == [0, 3]
  first = read(siglip)
  trained = flatten_dict(whole.params, sep="/")
  for path, value in flatten_dict(first.params, sep="/").items():
    is_scale = path in ("heads/logit_scale", "heads/logit_bias")
    assert np.array_equal(trained[path], value) != is_scale, path
  assert all(trained[path].any() for path in trained if path.endswith("/b"))
  weights = read(tmp_path / "whole")
  assert_equal(weights.params, jax.device_get(merge(whole.average["params"], build.build(c).model.lora)))
  texts = ["a red circle", "a blue square"]
  assert abs(load(tmp_path / "whole").encode_text(texts) - load(siglip).encode_text(texts)).max() > 1e-3


@pytest.mark.slow
def test_split_parameters_and_micro_batches_give_the_step_of_one_device(
  siglip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  c = run_config(siglip, lora=4)
  results = []
  for data, fsdp, micro_batches in ((1, 1, 1), (2, 4, 2)):
    c.mesh.update({"data": data, "fsdp": fsdp})
    c.micro_batches = micro_batches
    built = build.build(c, jax.devices()[: data * fsdp])
    abstract = abstract_state(built.batch_shape(16), built.mesh, model=built.model, optimizer=built.optimizer)
    given = jax.device_get(random_state(built))
    state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), given, abstract)
    step = build.make_step(c, built, build.to_steps(c, 96), abstract)
    batch = jax.device_get(random_batch(built, np.random.default_rng(0)))
    state, metrics = step(state, to_global(batch, batch_sharding(built.mesh)))
    results.append(jax.device_get((metrics["loss"], metrics["gradient_norm"], state.params)))
  assert_equal(*results, rtol=1e-4, atol=2e-5)


def test_text_features_that_are_embeddings_have_no_projection_to_train_or_lock(tmp_path: Path) -> None:
  """As those of SigLIP So400m/16 for many languages."""
  weights = make_weights(0, text__width=32, heads__embed_dim=32, heads__text_linear=False)
  write(weights, tmp_path / "weights", "orbax")
  c = get(tmp_path / "weights", lock="text")
  assert (c.model.heads.text_linear, c.optimizer.frozen) == (False, ("towers/text",))
