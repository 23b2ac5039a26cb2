"""Starting a run from weights: what is taken, resized, grown, locked, left fresh, and refused."""

from pathlib import Path

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
import references as reference
from tiny import tiny_config

from declip_jax import config, run, train
from declip_jax.metrics import read_metrics
from declip_jax.models.bank import Bank
from declip_jax.state import abstract_state, create_state
from declip_jax.weights.initial import initial, resize_positions
from declip_jax.weights.read import from_state_dict, read_run


def state_of(c: ConfigDict):
  """The fresh state of a config."""
  parts = run.build(c)
  batch = parts.batch_shape(c.batch_size)
  options = {"model": parts.model, "optimizer": parts.optimizer}
  return create_state(c.seed, batch, abstract_state(batch, parts.mesh, **options), **options)


def bare(method: str, workdir: Path | str = "", *parts: str) -> ConfigDict:
  """A tiny run without evaluations, from the weights in `workdir`."""
  c = tiny_config(method)
  c.evals = ConfigDict()
  c.duration.steps = 3
  c.init_from.path = str(workdir)
  if parts:
    c.init_from.parts = parts
  return c


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A CLIP run of a few steps."""
  workdir = tmp_path_factory.mktemp("clip")
  train.train(bare("clip"), workdir)
  return workdir


def assert_same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_goes_on_with_another_method_and_new_heads(clip_run: Path) -> None:
  c = bare("declip", clip_run)
  given, fresh = read_run(clip_run), state_of(c)
  state, lines = train.initialise(fresh, train.read_initial(c), c)
  towers, theirs = state.params["towers"], given.params["towers"]
  assert_same(towers["image"], theirs["image"])
  assert_same(state.params["heads"]["image_projection"], given.params["heads"]["image_projection"])
  # The mask token is a new row behind the old ones.
  rows, old = (np.asarray(x["text"]["token_embedding"]["embedding"]) for x in (towers, theirs))
  assert (len(rows), len(old)) == (49409, 49408)
  np.testing.assert_array_equal(rows[:-1], old)
  np.testing.assert_array_equal(rows[-1], fresh.params["towers"]["text"]["token_embedding"]["embedding"][-1])
  for head in ("projector", "predictor", "mlm"):
    assert_same(state.params["heads"][head], fresh.params["heads"][head])
  assert not np.any(state.params["heads"]["text_projection"]["bias"])
  assert "new, at zero: heads/text_projection/bias" in lines
  assert lines[0].startswith("from declip_jax, step 3: ")
  assert "towers/image (31,872)" in lines[0]
  assert "grown: towers/text/token_embedding/embedding, (49408, 16) -> (49409, 16)" in lines
  assert lines[-1].startswith("fresh: heads/")
  assert "heads/mlm" in lines[-1]
  assert "towers" not in lines[-1]


def test_resolution_and_context_change(clip_run: Path) -> None:
  c = bare("clip", clip_run)
  c.data.image_size = 32
  c.model.text.context_length = 20
  state, lines = train.initialise(state_of(c), train.read_initial(c), c)
  given = read_run(clip_run)
  old, new = (np.asarray(x["towers"]["image"]["position_embedding"]) for x in (given.params, state.params))
  assert (len(old), len(new)) == (5, 17)
  np.testing.assert_array_equal(new[0], old[0])
  np.testing.assert_allclose(new[1:].mean(axis=0), old[1:].mean(axis=0), atol=1e-6)
  texts, longer = (np.asarray(x["towers"]["text"]["position_embedding"]) for x in (given.params, state.params))
  np.testing.assert_array_equal(longer[:16], texts)
  assert {"resized: towers/image/position_embedding, 5 -> 17 positions"} < set(lines)


def test_positions_are_resized_as_they_lie_in_the_grid() -> None:
  grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij"), axis=-1).reshape(16, 2)
  positions = np.concatenate([[[7.0, 7.0]], grid]).astype(np.float32)
  larger = resize_positions(positions, 65)
  np.testing.assert_array_equal(larger[0], 7)
  middle = larger[1:].reshape(8, 8, 2)[2:6, 2:6]
  np.testing.assert_allclose(np.diff(middle[..., 0], axis=0), 0.5, atol=0.05)
  np.testing.assert_allclose(np.diff(middle[..., 1], axis=1), 0.5, atol=0.05)
  np.testing.assert_allclose(np.diff(middle[..., 0], axis=1), 0, atol=1e-5)
  with pytest.raises(ValueError, match="square grid"):
    resize_positions(positions, 60)


@pytest.mark.parametrize("parts", [("image",), ("text",), ("image", "text"), ("heads",)])
def test_only_the_wanted_parts_come(parts: tuple[str, ...], clip_run: Path) -> None:
  c = bare("clip", clip_run, *parts)
  c.seed = 1
  fresh = state_of(c)
  before = jax.tree.map(np.asarray, fresh.params)
  state, _ = train.initialise(fresh, train.read_initial(c), c)
  given = read_run(clip_run).params
  for part in ("image", "text"):
    expected = given if part in parts else before
    assert_same(state.params["towers"][part], expected["towers"][part])
    assert_same(state.params["heads"][f"{part}_projection"], expected["heads"][f"{part}_projection"])
  expected = given if "heads" in parts else before
  assert_same(state.params["heads"]["logit_scale"], expected["heads"]["logit_scale"])


def test_a_declip_run_takes_its_bank_along(tmp_path: Path) -> None:
  train.train(bare("declip"), tmp_path)
  c = bare("declip", tmp_path)
  state, lines = train.initialise(state_of(c), train.read_initial(c), c)
  bank = state.collections["heads"]["bank"]["text"]
  assert isinstance(bank, Bank)
  assert_same(bank, read_run(tmp_path).collections["heads"]["bank"]["text"])
  assert int(bank.filled) == 32
  assert lines[-1] == "nothing is fresh"


def test_settings_say_what_the_file_does_not(clip_run: Path) -> None:
  c = bare("clip", clip_run)
  c.init_from.settings = ("image.activation=gelu", "text.heads=1")
  with pytest.raises(ValueError, match="activation='quick_gelu' does not fit .* 'gelu'"):
    train.read_initial(c)
  c.model.image.activation, c.model.text.heads = "gelu", 1
  assert train.read_initial(c).model.text.heads == 1
  c.init_from.settings = ("gelu",)
  with pytest.raises(ValueError, match="'gelu' is not of the form"):
    train.read_initial(c)


def test_what_is_left_behind_is_said(tmp_path: Path) -> None:
  train.train(bare("declip"), tmp_path)
  c = bare("clip", tmp_path)
  _, lines = train.initialise(state_of(c), train.read_initial(c), c)
  (behind,) = [line for line in lines if line.startswith("left behind: ")]
  assert {"heads/text_projection/bias", "heads/mlm/kernel", "heads/bank/text"} <= set(
    behind.removeprefix("left behind: ").split(", ")
  )


def test_a_locked_image_tower_stays_and_has_no_moments(clip_run: Path, tmp_path: Path) -> None:
  c = bare("clip", clip_run, "image")
  c.seed = 1
  c.optimizer.frozen = ("towers/image", "heads/image_projection")
  state = state_of(c)
  free = bare("clip")
  free.seed = 1
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(x.opt_state)) for x in (state, state_of(free))]
  locked = state.params["towers"]["image"], state.params["heads"]["image_projection"]
  assert sizes[1] - sizes[0] == 2 * sum(leaf.size for leaf in jax.tree.leaves(locked))
  train.train(c, tmp_path)
  before, after = read_run(clip_run), read_run(tmp_path)
  assert_same(after.params["towers"]["image"], before.params["towers"]["image"])
  assert_same(after.params["heads"]["image_projection"], before.params["heads"]["image_projection"])
  text = [x.params["towers"]["text"]["transformer"]["blocks"]["qkv"]["kernel"] for x in (before, after)]
  assert not np.array_equal(*text)
  assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path) if "loss" in row)


@pytest.mark.parametrize("frozen", ["towers/image", "towers/image/", "towers"])
def test_a_locked_resnet_keeps_its_statistics(frozen: str) -> None:
  golden = reference.load("openai_resnet")
  weights = from_state_dict(reference.below(golden, "sd/"))
  c = config.default("clip")
  c.model, c.data.image_size = weights.model, 64
  c.batch_size, c.optimizer.frozen = 8, (frozen,)
  c.model.text.vocab_size, c.model.text.context_length = 49408, 16
  c.model.text.eot = 49407
  parts = run.build(c)
  state = state_of(c)
  params, collections, _ = initial(state.params, state.collections, weights, ("image",))
  batch = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 1, 64, 64, 3), np.uint8),
    "text": np.full((8, 1, 16), 49407, np.int32),
  }
  features, new = jax.jit(parts.model.encode)(params, collections, batch)
  assert_same(new["batch_stats"], weights.collections["towers"]["batch_stats"])
  alone, _ = jax.jit(parts.model.encode)(params, collections, {name: x[:1] for name, x in batch.items()})
  np.testing.assert_allclose(alone.image[0], features.image[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model.image.activation": "gelu"}, r"config.model.image.activation='gelu' does not fit .* 'quick_gelu'"),
    ({"model.text.width": 32}, r"config.model.text.width=32 does not fit"),
    ({"init_from.parts": ("vision",)}, r"parts=\('vision',\): choose of \['heads', 'image', 'text'\]"),
    ({"init_from.path": "/nowhere"}, r"/nowhere does not exist"),
    ({"optimizer.frozen": ("towers/vision",)}, r"nothing at 'towers/vision'; there are heads/"),
  ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str, clip_run: Path, tmp_path: Path) -> None:
  c = bare("clip", clip_run)
  c.update_from_flattened_dict(change)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train.train(c, tmp_path)


def test_a_simclr_model_gives_its_image_tower() -> None:
  golden = reference.load("slip")
  sd = {k: v for k, v in reference.below(golden, "sd/").items() if k.startswith(("visual.", "image_mlp."))}
  weights = from_state_dict(sd, {"image.heads": 3})
  assert (weights.heads, sorted(weights.params["towers"])) == (("simclr",), ["image"])
  c = config.default("slip")
  c.model.image, c.data.image_size, c.batch_size = weights.model.image, 32, 8
  c.model.text.update({"width": 16, "depth": 1, "heads": 2, "context_length": 16})
  c.model.heads.update({"embed_dim": 24, "simclr_projector": (64, 64, 32)})
  state = state_of(c)
  params, _, lines = initial(state.params, state.collections, weights, ("image", "heads"))
  np.testing.assert_array_equal(params["heads"]["simclr"]["linear2"]["bias"], sd["image_mlp.layer3.bias"])
  np.testing.assert_array_equal(params["towers"]["image"]["post_norm"]["scale"], sd["visual.norm.weight"])
  assert lines[-1].startswith("fresh: ")
  assert "towers/text (" in lines[-1]
  assert "towers/image" not in lines[-1]
