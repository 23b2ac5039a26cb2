"""Tests of starting a run from weights: loaded, resized, extended, locked, fresh and rejected arrays."""

from collections.abc import Callable
import functools
from pathlib import Path
import re

from flax.traverse_util import flatten_dict
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
import references as reference
from tiny import tiny_config

from declip_jax import architectures, build, config, first_state, train
from declip_jax.models.bank import Bank
from declip_jax.reporting.metrics import read_metrics
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.training.state import State, start_average
from declip_jax.weights.initial import initialise, load_weights, read_initial
from declip_jax.weights.read import Weights, _average, from_state_dict, read_run
from declip_jax.weights.read import read as read_weights
from declip_jax.weights.write import write

MakeState = Callable[..., State]
Runs = Callable[[str], Path]


def bare(method: str, workdir: Path | str = "", *groups: str) -> ConfigDict:
  """A tiny run without evaluations, from the weights in `workdir`."""
  c = tiny_config(method)
  c.evals = ConfigDict()
  c.duration.steps = 3
  c.init_from.path = str(workdir)
  if groups:
    c.init_from.groups = groups
  return c


def read(c: ConfigDict) -> Weights:
  """The weights that a config starts from."""
  return read_initial(build.make_init_from(c), c.model.to_dict())


def start(c: ConfigDict, fresh: State | None) -> tuple[State, list[str]]:
  """The first state of a run with its weights, and the lines that report it."""
  weights = read(c)
  return initialise(fresh, weights, c.init_from.groups, build.build(c).model)


def of_line(lines: list[str], opening: str) -> set[str]:
  """The paths in the one line that begins with `opening`."""
  (line,) = [line for line in lines if line.startswith(opening)]
  return set(re.findall(r"\w+(?:/\w+)+", line))


@pytest.fixture(scope="module")
def runs(save_run: Callable[[ConfigDict], Path]) -> Runs:
  """A function of a method to the working directory of its run."""
  return functools.cache(lambda method: save_run(bare(method)))


@pytest.fixture(scope="module")
def clip_run(runs: Runs) -> Path:
  """A CLIP run."""
  return runs("clip")


def assert_same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_a_run_continues_with_another_method_and_new_heads(clip_run: Path, random_state: MakeState) -> None:
  c = bare("declip", clip_run)
  given, fresh = read_run(clip_run), random_state(c)
  state, lines = start(c, fresh)
  towers, theirs = state.params["towers"], given.params["towers"]
  assert_same(towers["image"], theirs["image"])
  assert_same(state.params["heads"]["image_projection"], given.params["heads"]["image_projection"])
  # The mask token is a new row after the old ones.
  rows, old = (np.asarray(x["text"]["token_embedding"]["embedding"]) for x in (towers, theirs))
  assert (len(rows), len(old)) == (49409, 49408)
  np.testing.assert_array_equal(rows[:-1], old)
  np.testing.assert_array_equal(rows[-1], fresh.params["towers"]["text"]["token_embedding"]["embedding"][-1])
  for head in ("projector", "predictor", "mlm"):
    assert_same(state.params["heads"][head], fresh.params["heads"][head])
  assert not np.any(state.params["heads"]["text_projection"]["bias"])
  assert "initialised to zero: heads/text_projection/bias" in lines
  assert lines[0].startswith("loaded from declip_jax, step 3: ")
  assert "towers/image (31,872)" in lines[0]
  assert "extended: towers/text/token_embedding/embedding, (49408, 16) -> (49409, 16)" in lines
  assert lines[-1].startswith("newly initialised: heads/")
  assert "heads/mlm" in lines[-1]
  assert "towers" not in lines[-1]


def test_resolution_and_context_change(clip_run: Path, random_state: MakeState) -> None:
  c = bare("clip", clip_run)
  c.data.image_size = 32
  c.model.text.context_length = 20
  state, lines = start(c, random_state(c))
  given = read_run(clip_run)
  old, new = (np.asarray(x["towers"]["image"]["position_embedding"]) for x in (given.params, state.params))
  assert (len(old), len(new)) == (5, 17)
  np.testing.assert_array_equal(new[0], old[0])
  np.testing.assert_allclose(new[1:].mean(axis=0), old[1:].mean(axis=0), atol=1e-6)
  texts, longer = (np.asarray(x["towers"]["text"]["position_embedding"]) for x in (given.params, state.params))
  np.testing.assert_array_equal(longer[:16], texts)
  assert {"resized: towers/image/position_embedding, 5 -> 17 positions"} < set(lines)


@pytest.mark.parametrize("groups", [("image",), ("text",), ("image", "text"), ("heads",)])
def test_only_the_wanted_groups_are_loaded(groups: tuple[str, ...], clip_run: Path, random_state: MakeState) -> None:
  c = bare("clip", clip_run, *groups)
  fresh = random_state(c)
  before = jax.tree.map(np.asarray, fresh.params)
  state, _ = start(c, fresh)
  given = read_run(clip_run).params
  for side in ("image", "text"):
    expected = given if side in groups else before
    assert_same(state.params["towers"][side], expected["towers"][side])
    assert_same(state.params["heads"][f"{side}_projection"], expected["heads"][f"{side}_projection"])
  expected = given if "heads" in groups else before
  assert_same(state.params["heads"]["logit_scale"], expected["heads"]["logit_scale"])


@pytest.mark.slow
def test_a_declip_run_loads_its_bank(runs: Runs, random_state: MakeState) -> None:
  c = bare("declip", runs("declip"))
  fresh = random_state(c)
  state, lines = start(c, fresh)
  bank, before = (x.collections["heads"]["bank"]["text"] for x in (state, fresh))
  assert isinstance(bank, Bank)
  assert_same(bank, read_run(runs("declip")).collections["heads"]["bank"]["text"])
  assert bank.entries.shape == (1, 32, 16)
  assert not np.any(np.asarray(bank.entries) == np.asarray(before.entries))
  assert lines[-1] == "nothing is newly initialised"


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"bank_size": 64}, pytest.param({"bank_groups": 2}, marks=pytest.mark.slow)])
def test_a_bank_of_another_shape_is_not_loaded(change: dict, runs: Runs, random_state: MakeState) -> None:
  c = bare("declip", runs("declip"))
  c.model.heads.update(change)
  fresh = random_state(c)
  state, lines = start(c, fresh)
  bank = fresh.collections["heads"]["bank"]["text"]
  assert_same(state.collections["heads"]["bank"]["text"], bank)
  assert f"not loaded: heads/bank/text, (1, 32, 16) in the weights and {bank.entries.shape} in the run" in lines


def test_the_temperature_belongs_to_its_loss(
  runs: Runs, random_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
  """SigLIP's paper starts with 10 and -10; CLIP's bound of 100 is below SigLIP's temperature."""
  c = bare("siglip", runs("clip"))
  fresh = random_state(c)
  state, lines = start(c, fresh)
  assert "not loaded: heads/logit_scale, since these weights have no bias of a sigmoid loss" in lines
  for name in ("logit_scale", "logit_bias"):
    assert state.params["heads"][name] == fresh.params["heads"][name]
  same, lines = start(bare("siglip", runs("siglip")), fresh)
  assert lines[-1] == "nothing is newly initialised"
  assert same.params["heads"]["logit_scale"] != fresh.params["heads"]["logit_scale"]
  c = bare("clip", runs("siglip"))
  weights, fresh = read(c), random_state(c)
  weights.params["heads"]["logit_scale"] = np.float32(np.log(117))
  monkeypatch.setattr(first_state, "create_state", lambda *args, **options: fresh)
  built = build.build(c)
  state, lines = first_state.first_state(c, built, fresh, weights)
  np.testing.assert_allclose(state.params["heads"]["logit_scale"], np.log(117), rtol=1e-6)
  (line,) = [line for line in lines if "inverse temperature" in line]
  assert line.startswith("the inverse temperature of these weights, 117, becomes 100 after the first step")
  c.optimizer.logit_scale_range = ()
  assert not [line for line in first_state.first_state(c, built, fresh, weights)[1] if "temperature" in line]


def test_settings_add_to_the_file(clip_run: Path) -> None:
  c = bare("clip", clip_run)
  c.init_from.settings = ("image.activation=gelu", "text.heads=1")
  with pytest.raises(ValueError, match="activation='quick_gelu' does not match .* 'gelu'"):
    read(c)
  c.model.image.activation, c.model.text.heads = "gelu", 1
  assert read(c).model["text"]["heads"] == 1
  c.init_from.settings = ("gelu",)
  with pytest.raises(ValueError, match="'gelu' is not of the form"):
    read(c)


def test_pixels_may_be_normalised_otherwise_where_the_image_tower_is_not_loaded(clip_run: Path) -> None:
  c = bare("clip", clip_run, "text")
  c.model.mean, c.model.std = architectures.IMAGENET_MEAN, architectures.IMAGENET_STD
  assert read(c).model["mean"] == architectures.OPENAI_MEAN
  c = bare("clip", clip_run)
  c.model.mean, c.model.std = architectures.IMAGENET_MEAN, architectures.IMAGENET_STD
  c.init_from.settings = (f"mean={architectures.IMAGENET_MEAN}", f"std={architectures.IMAGENET_STD}")
  assert read(c).view.mean == architectures.IMAGENET_MEAN


def test_unused_weights_are_reported(runs: Runs, random_state: MakeState) -> None:
  c = bare("clip", runs("declip"))
  _, lines = start(c, random_state(c))
  (unused,) = [line for line in lines if line.startswith("not in this model: ")]
  assert {"heads/text_projection/bias", "heads/mlm/kernel", "heads/bank/text"} <= set(
    unused.removeprefix("not in this model: ").split(", ")
  )


def test_a_momentum_tower_starts_as_the_loaded_tower(runs: Runs, random_state: MakeState) -> None:
  c = bare("slip_mocov3", runs("declip"))
  fresh = random_state(c)
  state, lines = start(c, fresh)
  given = read_run(runs("declip"))
  tower, copy = state.params["towers"]["image"], state.collections["momentum"]
  assert_same(tower, given.params["towers"]["image"])
  assert_same(copy["towers"]["image"], given.params["towers"]["image"])
  assert_same(copy["heads"]["momentum_project"], fresh.params["heads"]["momentum_project"])
  assert jax.tree.map(lambda x: x.sharding, state.collections) == jax.tree.map(lambda x: x.sharding, fresh.collections)
  pointers = [leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in jax.tree.leaves((tower, copy))]
  assert len(pointers) == len(set(pointers))  # a step donates both
  assert of_line(lines, "newly initialised: ") == {"heads/momentum_predict", "heads/momentum_project"}
  assert {"heads/text_projection/bias", "heads/predictor/linear1/kernel", "heads/bank/text"} <= of_line(lines, "not in")


def test_a_run_starts_from_the_average_of_another_and_its_own_average_from_its_weights(
  random_state: MakeState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  c = bare("clip")
  fresh, built = start_average(random_state(c)), build.build(c)
  c.optimizer.ema, c.init_from.path = 0.5, str(tmp_path / "run")
  saved = jax.device_put(jax.device_get(fresh), jax.devices()[0])
  saved = saved.replace(average=jax.tree.map(lambda x: x + 1, saved.average))
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(3, saved, data={}, config=c.to_dict())
  checkpoints.close()
  monkeypatch.setattr(first_state, "create_state", lambda *_, **__: fresh)
  for settings, params, origin, decay in (
    ((), saved.average["params"], "declip_jax, step 3, average of the weights", 0.5),
    (("average=False",), saved.params, "declip_jax, step 3", 0.0),
  ):
    c.init_from.settings = settings
    weights = read(c)
    assert (weights.origin, weights.average) == (origin, decay)
    state, lines = first_state.first_state(c, built, fresh, weights)
    assert_same(state.params, params)
    assert_same(state.average, {"params": params, "batch_stats": {}})
    assert lines[0].startswith(f"loaded from {origin}: ")
    here, expected = (jax.tree.map(lambda x: x.sharding, tree) for tree in (state, fresh))
    assert here == expected
  write(read_run(tmp_path / "run"), tmp_path / "export", "orbax")
  assert_same(read_weights(tmp_path / "export").params, saved.average["params"])


def test_only_a_run_with_an_average_has_the_setting(clip_run: Path) -> None:
  with pytest.raises(ValueError, match="this model has no field 'average'"):
    read_run(clip_run, settings={"average": False})
  with pytest.raises(ValueError, match="run: average=0: expected True or False"):
    _average(0.9, {"average": 0}, "run")


@pytest.mark.slow
def test_a_run_with_a_momentum_tower_continues_without_and_with_it(runs: Runs, random_state: MakeState) -> None:
  given = read_run(runs("slip_mocov3"))
  assert given.collections.keys() == {"towers", "heads"}
  c = bare("clip", runs("slip_mocov3"))
  state, lines = start(c, random_state(c))
  assert state.collections.keys() == {"towers", "heads"}
  assert_same(state.params["towers"], given.params["towers"])
  assert {path.split("/")[-3] for path in of_line(lines, "not in") if "norm0" in path} == {
    "momentum_predict",
    "momentum_project",
  }
  assert lines[-1] == "nothing is newly initialised"
  # Continued by the same method, it starts from the online tower, like a new run.
  c = bare("slip_byol", runs("slip_mocov3"))
  state, lines = start(c, random_state(c))
  for half in ("towers", "heads"):
    assert_same(state.params[half], given.params[half])
    assert_same(state.collections[half], given.collections[half])
    for name, copy in state.collections["momentum"][half].items():
      assert_same(copy, given.params[half][name])
  assert lines[-1] == "nothing is newly initialised"


@pytest.mark.slow
def test_self_supervision_first_then_clip(runs: Runs, random_state: MakeState) -> None:
  """SLIP, section 5.2: SimCLR, whose image tower CLIP then continues to train."""
  given = read_run(runs("simclr"))
  assert (given.heads, [*given.params["towers"]]) == (("simclr",), ["image"])
  c = bare("clip", runs("simclr"), "image")
  fresh = random_state(c)
  state, lines = start(c, fresh)
  assert_same(state.params["towers"]["image"], given.params["towers"]["image"])
  assert_same(state.params["towers"]["text"], fresh.params["towers"]["text"])
  assert_same(state.params["heads"], fresh.params["heads"])
  assert of_line(lines, "loaded from declip_jax, step 3: ") == {"towers/image"}
  assert of_line(lines, "newly initialised: ") == {
    "towers/text",
    "heads/image_projection",
    "heads/logit_scale",
    "heads/text_projection",
  }
  c = bare("slip", runs("simclr"), "image", "heads")
  state, lines = start(c, random_state(c))
  assert_same(state.params["heads"]["simclr"], given.params["heads"]["simclr"])
  assert_same(state.collections["heads"], given.collections["heads"])
  assert "heads/simclr" in of_line(lines, "loaded from ")
  with pytest.raises(ValueError, match=r"groups=\('image', 'text', 'heads'\): declip_jax, step 3 has no text tower"):
    read(bare("clip", runs("simclr")))
  # A method without texts can start from the image tower of one with texts.
  c = bare("simclr", clip := runs("clip"), "image")
  state, _ = start(c, random_state(c))
  assert_same(state.params["towers"], {"image": read_run(clip).params["towers"]["image"]})


@pytest.mark.slow
def test_the_mask_embedding_is_added_and_dropped(runs: Runs, random_state: MakeState) -> None:
  c = bare("slip_mim", runs("clip"))
  _, lines = start(c, random_state(c))
  assert of_line(lines, "newly initialised: ") == {"towers/image", "heads/mim", "heads/mim_norm"}
  assert "towers/image (32)" in lines[-1]
  c = bare("clip", runs("slip_mim"))
  _, lines = start(c, random_state(c))
  assert "towers/image/mask_embedding" in of_line(lines, "not in this model: ")
  assert lines[-1] == "nothing is newly initialised"


CONVOLUTIONS = {
  "resnet": architectures.resnet(8, (1, 2, 1, 1)),
  "regnet": architectures.regnet(8, 6.0, 1.8, 7, 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutional_towers_load_their_statistics(
  kind: str, save_run: Callable[[ConfigDict], Path], random_state: MakeState
) -> None:
  before, c = bare("clip"), bare("siglip")
  for x in (before, c):
    x.model.image, x.data.image_size, x.model.heads.image_bias = CONVOLUTIONS[kind], 32, kind == "resnet"
  c.init_from.path = str(workdir := save_run(before))
  state, lines = start(c, random_state(c))
  given = read_run(workdir)
  assert len(flatten_dict(given.collections["towers"]["batch_stats"]["image"])) > 20
  assert_same(state.collections["towers"], given.collections["towers"])
  assert_same(state.params["towers"], given.params["towers"])
  assert_same(state.params["heads"]["image_projection"], given.params["heads"]["image_projection"])
  assert of_line(lines, "newly initialised: ") == {"heads/logit_bias"}


@pytest.mark.slow
def test_a_locked_image_tower_does_not_change_and_has_no_moments(
  clip_run: Path, tmp_path: Path, random_state: MakeState
) -> None:
  c = bare("clip", clip_run, "image")
  c.seed = 1
  c.optimizer.frozen = ("towers/image", "heads/image_projection")
  state = random_state(c)
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(x.opt_state)) for x in (state, random_state(bare("clip")))]
  locked = state.params["towers"]["image"], state.params["heads"]["image_projection"]
  assert sizes[1] - sizes[0] == 2 * sum(leaf.size for leaf in jax.tree.leaves(locked))
  train.train(c, tmp_path)
  before, after = read_run(clip_run), read_run(tmp_path)
  assert_same(after.params["towers"]["image"], before.params["towers"]["image"])
  assert_same(after.params["heads"]["image_projection"], before.params["heads"]["image_projection"])
  text = [x.params["towers"]["text"]["transformer"]["blocks"]["qkv"]["kernel"] for x in (before, after)]
  assert not np.array_equal(*text)
  assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path) if "loss" in row)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["towers/image", "towers/image/", "towers"])
def test_a_locked_resnet_keeps_its_statistics(frozen: str, random_state: MakeState) -> None:
  golden = reference.load("openai_resnet")
  weights = from_state_dict(reference.below(golden, "sd/"), reference.TOLD)
  c = config.default("clip")
  c.model, c.data.image_size = ConfigDict(weights.model), 64
  c.batch_size, c.optimizer.frozen = 8, (frozen,)
  c.model.text.vocab_size, c.model.text.context_length = 49408, 16
  c.model.text.eot = 49407
  built = build.build(c)
  state = random_state(c)
  params, collections, _ = load_weights(state.params, state.collections, weights, ("image",))
  batch = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 1, 64, 64, 3), np.uint8),
    "text": np.full((8, 1, 16), 49407, np.int32),
  }
  features, new = jax.jit(built.model.encode)(params, collections, batch)
  assert_same(new["batch_stats"], weights.collections["towers"]["batch_stats"])
  alone, _ = jax.jit(built.model.encode)(params, collections, {name: x[:1] for name, x in batch.items()})
  np.testing.assert_allclose(alone.image[0], features.image[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model.image.activation": "gelu"}, r"config.model.image.activation='gelu' does not match .* 'quick_gelu'"),
    ({"model.text.width": 32}, r"config.model.text.width=32 does not match"),
    (
      {"model.std": (0.229, 0.224, 0.225)},
      r"config.model.std=\(0.229, 0.224, 0.225\) does not match .* --config.model.mean='\(0.48145466, .*\)'",
    ),
    ({"init_from.groups": ("vision",)}, r"groups=\('vision',\): choose from \['heads', 'image', 'text'\]"),
    ({"init_from.path": "/nowhere"}, r"/nowhere does not exist"),
    ({"optimizer.frozen": ("towers/vision",)}, r"config.optimizer.frozen: no parameter at 'towers/vision'"),
  ],
)
def test_mismatched_weights_are_rejected(change: dict, message: str, clip_run: Path, random_state: MakeState) -> None:
  c = bare("clip", clip_run)
  c.update_from_flattened_dict(change)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    start(c, random_state(c) if "optimizer.frozen" in change else None)


def test_the_image_tower_of_a_simclr_model_is_loaded(random_state: MakeState) -> None:
  golden = reference.load("slip")
  sd = {k: v for k, v in reference.below(golden, "sd/").items() if k.startswith(("visual.", "image_mlp."))}
  weights = from_state_dict(sd, {"image.heads": 3})
  assert (weights.heads, sorted(weights.params["towers"])) == (("simclr",), ["image"])
  c = config.default("slip")
  c.model.image, c.data.image_size, c.batch_size = ConfigDict(weights.model["image"]), 32, 8
  c.model.text.update({"width": 16, "depth": 1, "heads": 2, "context_length": 16})
  c.model.heads.update({"embed_dim": 24, "simclr_projector": (64, 64, 32)})
  state = random_state(c)
  params, _, lines = load_weights(state.params, state.collections, weights, ("image", "heads"))
  np.testing.assert_array_equal(params["heads"]["simclr"]["linear2"]["bias"], sd["image_mlp.layer3.bias"])
  np.testing.assert_array_equal(params["towers"]["image"]["post_norm"]["scale"], sd["visual.norm.weight"])
  assert lines[-1].startswith("newly initialised: ")
  assert "towers/text (" in lines[-1]
  assert "towers/image" not in lines[-1]
