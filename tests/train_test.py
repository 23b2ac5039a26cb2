"""The trainer: the same losses on any mesh, exact resumption, what it refuses, and what it leaves behind."""

from collections.abc import Mapping
import errno
from functools import partial
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from checkpoint_files import arrays, flip
from cpu_devices import xla_flags
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest
from steps import random_batch
from tiny import tiny_config

from declip_jax import build, sharding, train
from declip_jax import config as config_lib
from declip_jax.clip import load
from declip_jax.data import pipeline
from declip_jax.data.mixture import Mixture
from declip_jax.data.sources import open_source
from declip_jax.evaluate import evaluate
from declip_jax.models.heads import diagnostic_kinds
from declip_jax.objectives import make_objective
from declip_jax.objectives.diagnostics import diagnose
from declip_jax.reporting.metrics import MetricWriter, read_metrics
from declip_jax.runtime import workdir as workdir_lib
from declip_jax.runtime.checkpoint import Checkpoints
from declip_jax.runtime.rollback import Rollbacks
from declip_jax.runtime.trace import Trace, parse_steps
from declip_jax.training.gradient import Gradient, make_gradient
from declip_jax.training.state import abstract_state, init_state
from declip_jax.training.step import is_spike, train_step

TESTS = Path(__file__).parent


def final_state(workdir: Path, config, step: int):
  """The state of a run, on one device."""
  built = build.build(config, jax.devices()[:1])
  abstract = abstract_state(
    built.batch_shape(config.batch_size), built.mesh, model=built.model, optimizer=built.optimizer
  )
  checkpoints = Checkpoints(workdir)
  state, position = checkpoints.restore(step, abstract)
  checkpoints.close()
  return jax.tree.map(np.asarray, state), position


def assert_equal(a, b, **tolerance: float) -> None:
  """Leaf by leaf, bit for bit unless a tolerance is given."""
  for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
    np.testing.assert_allclose(x, y, **({"rtol": 0, "atol": 0} | tolerance), err_msg=jax.tree_util.keystr(path))


def without_blind_biases(params):
  """The parameters with those biases set to zero that the loss cannot see.

  Softmax does not see a bias of the keys, and batch norm none of the linear layer before it, nor one before that: that
  of SimSiam's projections, whose prediction starts with a linear layer. Their exact gradient is zero, and Adam turns
  its rounding noise into steps of full size.
  """

  def clear(path, leaf):
    names = [entry.key for entry in path]
    if names[-2:] == ["qkv", "bias"]:
      query, _, value = np.split(leaf, 3, axis=-1)
      return np.concatenate([query, np.zeros_like(query), value], axis=-1)
    head = params["heads"].get(names[1], {})
    normed = names[-1] == "bias" and names[-2].replace("linear", "norm") in head
    blind = (normed and names[-2].startswith("linear")) or names == ["heads", "projector", "norm2", "bias"]
    return np.zeros_like(leaf) if blind else leaf

  return jax.tree.map_with_path(clear, params)


def banks(state):
  """The neighbour bank, if there is one. (Batch statistics follow the biases that the loss cannot see.)"""
  return state.collections["heads"].get("bank", {})


def use_mesh(monkeypatch: pytest.MonkeyPatch, data: int, fsdp: int) -> None:
  devices = jax.devices()[: data * fsdp]
  monkeypatch.setattr(build, "make_mesh", lambda **_: sharding.make_mesh(data, fsdp, devices))


FOUR_STEPS = {"duration.steps": 4, "model.heads.bank_size": 16, "checkpoint.every.steps": 0}  # bank: full after a step


def four_steps(method: str) -> ConfigDict:
  config = tiny_config(method)
  config.update_from_flattened_dict(FOUR_STEPS)
  return config


def assert_same_run(workdir: Path, method: str, one) -> None:
  """Losses, evaluations if there are any, parameters, bank and input position are those of one device."""
  rows, state, position = one
  for row, expected in zip(read_metrics(workdir), rows, strict=False):
    for name in row.keys() & {name for name in expected if name.startswith(("loss", "eval/"))}:
      np.testing.assert_allclose(row[name], expected[name], rtol=0, atol=1e-5, err_msg=f"{name} at {row['step']}")
  ours, ours_position = final_state(workdir, four_steps(method), 4)
  assert_equal(without_blind_biases(ours.params), without_blind_biases(state.params), atol=1e-5)
  assert_equal(banks(ours), banks(state), atol=1e-5)
  assert ours_position == position


@pytest.mark.parametrize("method", ["declip", "filip"])  # methods_test.py has the steps of all
def test_meshes_and_processes_agree_with_one_device(
  method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  with pytest.MonkeyPatch.context() as one_device:
    use_mesh(one_device, 1, 1)
    train.train(four_steps(method), tmp_path / "one")
  one = read_metrics(tmp_path / "one"), *final_state(tmp_path / "one", four_steps(method), 4)
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)  # so that the small arrays of this test are split at all
  config = four_steps(method)
  config.evals = ConfigDict()
  for data, fsdp in [(2, 4)] + ([(8, 1)] if method == "declip" else []):
    use_mesh(monkeypatch, data, fsdp)
    workdir = tmp_path / f"{data}x{fsdp}"
    train.train(config, workdir)
    assert len(losses_on_disk(workdir)) == 4
    assert_same_run(workdir, method, one)
  train_in_two_processes(method, tmp_path / "two")
  rows = read_metrics(tmp_path / "two")
  assert sum("loss" in row for row in rows) == 4
  assert {"eval/heldout/top1", "eval/retrieval/text_to_image_r10"} <= rows[-1].keys()
  assert_same_run(tmp_path / "two", method, one)


def train_in_two_processes(method: str, workdir: Path) -> None:
  """The four steps in two processes of one device each."""
  overrides = [f"--config.{name}={value}" for name, value in FOUR_STEPS.items()]
  paths = ["--config", f"{TESTS / 'tiny.py'}:{method}", "--workdir", str(workdir)]
  port = 20000 + os.getpid() % 20000
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "declip_jax.train", *paths, *overrides]
      + [f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}"],
      env=environment(),
    )
    for index in range(2)
  ]
  assert [process.wait(timeout=180) for process in processes] == [0, 0]


def command(config: str, workdir: Path, *overrides: str) -> list[str]:
  """A run without evaluations, which take most of the time of a short one."""
  paths = ["--config", f"{TESTS / 'tiny.py'}:{config},bare", "--workdir", str(workdir)]
  return [sys.executable, "-m", "declip_jax.train", *paths, *overrides]


def environment(devices: int = 1) -> dict[str, str]:
  settings = {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
  return os.environ | settings | {"XLA_FLAGS": xla_flags(devices)}


def losses_on_disk(workdir: Path) -> list[float]:
  return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen, seconds: float = 60) -> None:
  """Until metrics.jsonl has that step."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    if (workdir / "metrics.jsonl").exists() and any(row["step"] >= step for row in read_metrics(workdir)):
      return
    assert process.poll() is None, f"ended with {process.returncode} before step {step}"
    time.sleep(0.05)
  raise AssertionError(f"no step {step} within {seconds:.0f} s")


@pytest.mark.parametrize(("method", "workers", "augment_on"), [("declip", 0, "host"), ("slip_mocov3", 2, "device")])
def test_killed_run_resumes_bit_exact(method: str, workers: int, augment_on: str, tmp_path: Path) -> None:
  place = f"--config.data.augment_on={augment_on}"
  steps = ["--config.duration.steps=30", place, f"--config.data.workers={workers}"]
  subprocess.run(command(method, tmp_path / "whole", *steps), env=environment(), check=True)
  victim = subprocess.Popen(command(method, tmp_path / "killed", *steps), env=environment(), start_new_session=True)
  wait_for_step(tmp_path / "killed", int(np.random.default_rng().integers(3, 15)), victim)
  os.killpg(victim.pid, signal.SIGKILL)
  assert victim.wait() == -signal.SIGKILL
  # The other number of workers goes on: the stream does not depend on it.
  other = ["--config.duration.steps=30", place, f"--config.data.workers={2 - workers}"]
  subprocess.run(command(method, tmp_path / "killed", *other), env=environment(), check=True)
  config = tiny_config(method)
  whole, killed = (final_state(tmp_path / name, config, 30) for name in ("whole", "killed"))
  assert_equal(whole[0], killed[0])
  assert whole[1] == killed[1] == {"next_index": 30 * 16}
  assert losses_on_disk(tmp_path / "whole") == losses_on_disk(tmp_path / "killed")


@pytest.mark.parametrize(
  ("signum", "code", "flags"),
  [(signal.SIGTERM, 0, ()), (signal.SIGTERM, 143, ("--stopped_exit_code=143",)), (signal.SIGINT, 130, ())],
)
def test_signal_saves_and_leaves(signum: int, code: int, flags: tuple[str, ...], tmp_path: Path) -> None:
  process = subprocess.Popen(
    command("clip", tmp_path, "--config.duration.steps=100000", "--config.checkpoint.every.steps=0", *flags),
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_for_step(tmp_path, 5, process)
  process.send_signal(signum)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == code
  assert "Traceback" not in errors
  (step,) = Checkpoints(tmp_path).steps()
  assert step >= 5
  assert f"stopped at step {step}" in errors


def test_run_leaves_its_record(tmp_path: Path) -> None:
  config = tiny_config("declip")
  final = train.train(config, tmp_path, profile=(3, 4))
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  for row in read_metrics(tmp_path)[1:]:
    if "loss" in row:
      shares = {what: row[f"time/{what}"] for what in ("data", "step", "save", "evaluation")}
      assert 0 < sum(shares.values()) <= 1  # the rest is lines and pictures
      assert shares["step"] > 0
      assert row["images_per_second_per_device"] == row["images_per_second"] / 8
      assert row["compile_seconds"] > 0
      assert not {"utilisation", "device_memory_gib"} & row.keys()  # a CPU's are not known
  names = {path.name for path in tmp_path.iterdir()}
  assert names >= {"checkpoints", "config.json", "starts.jsonl", "metrics.jsonl", "tensorboard"}
  assert names >= {"views.png", "curves.png", "retrieval.png"}
  (about,) = map(json.loads, (tmp_path / "starts.jsonl").read_text().splitlines())
  assert about["versions"]["jax"] == jax.__version__
  assert about["mesh"] == {"data": 8, "fsdp": 1}
  assert {"loss", "loss/clip", "loss/nns", "eval/heldout/top1", "eval/retrieval/text_to_image_r10"} <= set(final)
  # A finished run, started again, has nothing to do and says the same.
  again = train.train(config, tmp_path)
  scores = {name: value for name, value in final.items() if name.startswith("eval/")}
  assert {name: again[name] for name in scores} == scores
  # The commands' functions read it back, whatever the batch size.
  assert {name: value for name, value in evaluate(tmp_path, batch_size=8).items() if name != "step"} == pytest.approx(
    scores
  )
  clip = load(tmp_path)
  images = [np.full((30, 20, 3), value, np.uint8) for value in (0, 128, 255)]
  assert clip.encode_image(images).shape == (3, 16)
  np.testing.assert_allclose(np.linalg.norm(clip.encode_text(["a red ring", ""]), axis=1), 1, atol=1e-5)
  # A damaged checkpoint is not read, and not touched.
  flip(arrays(tmp_path / "checkpoints" / "8" / "model")[0])
  with pytest.warns(UserWarning, match=r"step 8 is damaged and that of step 6 is taken: .* has another checksum"):
    assert load(tmp_path).step == 6
  with pytest.raises(ValueError, match=r"the checkpoint of step 8 is damaged: .* has another checksum"):
    load(tmp_path, step=8)
  assert Checkpoints(tmp_path).steps() == [6, 8]


def test_hosts_that_see_other_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
  sources = [open_source("scenes:train/32/16"), open_source("scenes:test/20/16")]
  train._check_hosts(sources)
  seen = np.array([[32, 20], [32, 20], [32, 19]])
  monkeypatch.setattr(train.multihost_utils, "process_allgather", lambda sizes, **_: seen)
  with pytest.raises(ValueError, match=r"scenes:test/20/16: the hosts see .*host 0: 20, host 1: 20, host 2: 19"):
    train._check_hosts(sources)


def test_data_of_another_size_are_told_when_a_run_goes_on(tmp_path: Path) -> None:
  config = tiny_config("clip")
  mesh = sharding.make_mesh(-1, 1)
  assert workdir_lib.record(config, mesh, tmp_path, {"a": 1000, "b": 5}) == []
  assert workdir_lib.record(config, mesh, tmp_path, {"a": 1200, "c": 7}) == [
    "a had 1,000 samples and has 1,200: from here on they come in another order"
  ]


def test_training_learns(tmp_path: Path) -> None:
  config = tiny_config("clip")
  config.duration.steps = 60
  config.data.train = ("scenes:train/16/24",)
  config.optimizer.learning_rate = 3e-3
  config.evals = ConfigDict()
  config.checkpoint.every.steps = 0
  train.train(config, tmp_path)
  losses = losses_on_disk(tmp_path)
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def gradient_of(built: build.Built, weights: Mapping[str, Any]) -> Gradient:
  return make_gradient("cached", 1, model=built.model, objective=make_objective(weights))


def test_step_with_nan_changes_nothing_but_counts() -> None:
  config = tiny_config("declip")
  built = build.build(config)
  batch = {name: jnp.ones(x.shape, x.dtype) for name, x in built.batch_shape(16).items()}
  options = {
    "model": built.model,
    "optimizer": built.optimizer,
    "gradient_fn": gradient_of(built, config.objective.to_dict()),
    "momentum_decay": lambda step: 1.0,
    "is_diagnosed": lambda step: False,
    "logit_scale_range": (0.0, 4.6),
  }
  state = init_state(0, batch, model=built.model, optimizer=built.optimizer)
  broken = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
  step = jax.jit(lambda state: train_step(state, batch, schedule=lambda step: 0.1, **options))
  after, metrics = step(broken)
  assert_equal(after.params, broken.params)
  assert_equal((after.opt_state, after.collections), (broken.opt_state, broken.collections))
  assert (int(after.step), int(metrics["skipped_total"]), int(metrics["skipped_in_a_row"])) == (1, 1, 1)
  recovered, metrics = step(after.replace(params=state.params))
  assert int(metrics["skipped_in_a_row"]) == 0
  assert int(recovered.skipped["total"]) == 1
  assert not np.array_equal(
    recovered.params["heads"]["text_projection"]["kernel"], state.params["heads"]["text_projection"]["kernel"]
  )


def test_an_entry_whose_update_is_not_finite_stays_and_the_others_move() -> None:
  config = tiny_config("clip")
  built = build.build(config)
  batch = random_batch(built, np.random.default_rng(0))
  plain = built.optimizer

  def update(*args: Any) -> tuple[Any, Any]:
    change, state = plain.update(*args)
    change["heads"]["text_projection"]["kernel"] = change["heads"]["text_projection"]["kernel"].at[1, 2].set(jnp.nan)
    return change, state

  state = init_state(0, batch, model=built.model, optimizer=plain)
  step = partial(
    train_step,
    model=built.model,
    optimizer=optax.GradientTransformation(plain.init, update),
    schedule=lambda step: 0.1,
    gradient_fn=gradient_of(built, config.objective.to_dict()),
    momentum_decay=lambda step: 1.0,
    is_diagnosed=lambda step: False,
  )
  after, metrics = jax.jit(step)(state, batch)
  before, after = (tree.params["heads"]["text_projection"]["kernel"] for tree in (state, after))
  stayed = np.asarray(before) == np.asarray(after)
  assert np.argwhere(stayed).tolist() == [[1, 2]]
  assert int(metrics["skipped_total"]) == 0


def test_the_momentum_tower_follows_the_parameters_before_it_encodes() -> None:
  config = tiny_config("slip_mocov3")
  built = build.build(config)
  batch = {name: jnp.ones(x.shape, x.dtype) for name, x in built.batch_shape(16).items()}
  batch["image"] = jax.random.randint(jax.random.key(1), batch["image"].shape, 0, 256).astype(jnp.uint8)
  state = init_state(0, batch, model=built.model, optimizer=built.optimizer)
  kept = 0.75
  step = jax.jit(
    lambda state: train_step(
      state,
      batch,
      model=built.model,
      optimizer=built.optimizer,
      schedule=lambda step: 1e-2,
      gradient_fn=gradient_of(built, {"moco": {"weight": 1.0}}),
      momentum_decay=lambda step: kept,
      is_diagnosed=lambda step: step == 1,
      diagnose=partial(diagnose, kinds=diagnostic_kinds(("momentum",))),
    )
  )
  first, metrics = step(state)
  assert_equal(first.collections["momentum"]["towers"]["image"], state.params["towers"]["image"], atol=1e-7)
  assert np.isnan(metrics["diagnostics/momentum_target/deviation"])
  second, metrics = step(first)
  assert np.isfinite(metrics["diagnostics/momentum_target/deviation"])
  for half, part in (("towers", "image"), ("heads", "momentum_project")):
    old, new = (tree.params[half][part] for tree in (state, first))
    expected = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, old, new)
    assert_equal(second.collections["momentum"][half][part], expected, atol=1e-6)
    assert not np.allclose(jax.tree.leaves(new)[0], jax.tree.leaves(old)[0])


def test_self_supervision_on_other_images_than_those_with_captions(tmp_path: Path) -> None:
  """SLIP's decoupled study: the pairs' stream is the same as without, the views of self-supervision are others."""
  config = tiny_config("slip")
  coupled = build.build(config).make_views
  config.data.ssl_train, config.data.ssl_mixture = ("scenes:test/64/24",), (1.0,)
  pairs, others = (
    Mixture(tuple(map(open_source, specs)), needs_caption=needed)
    for specs, needed in ((config.data.train, True), (config.data.ssl_train, False))
  )
  rows = pipeline.training_samples(pairs, coupled, 0)[5]
  apart = pipeline.training_samples(pairs, coupled, 0, others)[5]
  np.testing.assert_array_equal(rows["image"][0], apart["image"][0])
  np.testing.assert_array_equal(rows["text"], apart["text"])
  assert not np.array_equal(rows["image"][1:], apart["image"][1:])
  config.duration.steps, config.evals = 2, ConfigDict()
  assert np.isfinite(train.train(config, tmp_path)["loss"])
  config.objective.simclr.weight = 0.0
  with pytest.raises(ValueError, match=r"ssl_train=.*no view for self-supervision"):
    build.build(config)
  declip = tiny_config("declip")
  declip.data.ssl_train = ("scenes:test/64/24",)
  with pytest.raises(ValueError, match=r"ssl_train=.*also contrasts these views"):
    build.build(declip)


def test_the_texts_that_search_the_bank_can_be_chosen() -> None:
  config = tiny_config("declip")
  for kinds, views in ((None, (0,)), (("augmented",), (1,)), (("augmented", "raw"), (1, 0))):
    config.data.neighbour_texts = kinds
    model = build.build(config).model
    assert model.views.neighbour_text == views
    batch = build.build(config).batch_shape(16)
    outputs = jax.eval_shape(lambda batch, model=model: forward(model, batch), batch)
    assert outputs.neighbour.shape == (len(views), 16, 16)


def forward(model, batch):
  params, collections = model.init(jax.random.key(0), batch)
  return model.apply_heads(params, collections, model.encode(params, collections, batch)[0])[0]


def test_a_method_without_texts_takes_no_evaluation(tmp_path: Path) -> None:
  config = tiny_config("simclr")
  config.evals.heldout = config_lib.zero_shot("scenes:heldout/40/24")
  with pytest.raises(ValueError, match=r"config.evals has \['heldout'\], which compare images with texts"):
    train.train(config, tmp_path / "run")


def test_too_many_skipped_steps_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = tiny_config("clip")
  config.model.heads.logit_scale_init = 1000.0  # whose exponential is infinite
  config.safety.max_skipped_steps = 3
  config.checkpoint.every.steps = 100
  with pytest.raises(FloatingPointError, match=r"3 steps in a row .*; there is no checkpoint from before"):
    train.train(config, tmp_path)


def test_a_spike_is_a_gradient_far_above_the_mean_of_those_before() -> None:
  rng = np.random.default_rng(0)
  norms = np.exp(rng.normal(size=400)).astype(np.float32)
  norms[[50, 150, 151, 300]] *= 1000
  norms[200] = 0
  state = {"measured": jnp.int32(0), "log_norm": jnp.float32(0)}
  judge = jax.jit(lambda norm, state: is_spike(norm, state, 30.0))
  logs: list[float] = []
  for index, norm in enumerate(norms):
    too_large, after = judge(norm, state)
    weights = 0.99 ** np.arange(len(logs))[::-1]
    weights[: min(len(logs), 100)] = 0.99 ** max(len(logs) - 100, 0)  # the first hundred have one weight
    log_norm = float(np.log(max(norm, np.finfo(np.float32).tiny)))
    expected = len(logs) >= 100 and log_norm > np.average(logs, weights=weights) + np.log(30)
    assert bool(too_large) == expected, index
    if norm == 0:  # of a loss that has not begun: no measure of anything
      assert all(np.array_equal(after[name], state[name]) for name in state)
    elif not expected:  # as `train_step` keeps it
      state = after
      logs.append(log_norm)
  assert [bool(judge(norm, state)[0]) for norm in (1e3, 1.0)] == [True, False]
  assert not is_spike(jnp.float32(1e30), state, 0.0)[0]


def test_a_run_goes_back_before_what_was_skipped_or_else_as_far_as_it_can(tmp_path: Path) -> None:
  rollbacks = Rollbacks(tmp_path)
  assert rollbacks.target([2, 4, 6, 8], 5) == 4
  assert rollbacks.target([6, 8], 5) == 6  # skipped steps have changed no parameters
  assert rollbacks.target([], 5) is None
  rollbacks.record(3, 8, 4, {"next_index": 128})
  assert Rollbacks(tmp_path).target([2, 4], 5) == 2  # from 4 it diverged again


def test_a_spike_changes_nothing_but_counts() -> None:
  config = tiny_config("clip")
  built = build.build(config)
  batch = random_batch(built, np.random.default_rng(0))
  state = init_state(0, batch, model=built.model, optimizer=built.optimizer)
  step = jax.jit(
    lambda state: train_step(
      state,
      batch,
      model=built.model,
      optimizer=built.optimizer,
      schedule=lambda step: 0.1,
      gradient_fn=gradient_of(built, config.objective.to_dict()),
      momentum_decay=lambda step: 1.0,
      is_diagnosed=lambda step: False,
      spike_factor=10.0,
    )
  )
  _, metrics = step(state)
  usual = float(jnp.log(metrics["gradient_norm"]))
  for factor, skipped in ((9.0, 0), (11.0, 1)):
    known = {"measured": jnp.int32(100), "log_norm": jnp.float32(usual - np.log(factor))}
    before = state.replace(skipped={**state.skipped, **known})
    after, metrics = step(before)
    assert (int(metrics["skipped_total"]), int(after.step)) == (skipped, 1)
    same = [np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True)]
    assert all(same) == bool(skipped)
    assert (float(after.skipped["log_norm"]) == float(before.skipped["log_norm"])) == bool(skipped)


def bare(**changes: object) -> ConfigDict:
  """CLIP without evaluations."""
  config = tiny_config("clip")
  config.evals = ConfigDict()
  config.update_from_flattened_dict(changes)
  return config


class Killed(BaseException):
  """In place of a signal that ends the process."""


def train_until(step: int, config: ConfigDict, workdir: Path, time: int = 1) -> None:
  """A run that ends before it writes its line about a step, the first one or the so manieth."""
  seen, write = [], MetricWriter.write

  def killing(self, at, values):
    seen.append(at)
    if seen.count(step) == time:
      raise Killed
    write(self, at, values)

  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(MetricWriter, "write", killing)
    with pytest.raises(Killed):
      train.train(config, workdir)


def poison(monkeypatch: pytest.MonkeyPatch, config: ConfigDict, batches: list[int]) -> None:
  """Makes the images of these batches of the stream not finite."""
  mixture = Mixture(tuple(map(open_source, config.data.train)))
  rows = pipeline.training_samples(mixture, build.build(config).make_views, config.seed)
  size = config.batch_size
  images = [np.stack([rows[index]["image"] for index in range(b * size, (b + 1) * size)]) for b in batches]
  sums = jnp.array([image.sum() for image in images], jnp.uint32)

  def make_augment(config, built):
    def augment(batch, step):
      poisoned = jnp.isin(batch["image"].astype(jnp.uint32).sum(), sums)
      return {**batch, "image": jnp.where(poisoned, jnp.nan, batch["image"].astype(jnp.float32))}

    return augment

  monkeypatch.setattr("declip_jax.build.make_augment", make_augment)


def test_a_run_that_diverges_goes_back_and_on_behind_the_bad_data(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = bare(**{"duration.steps": 10, "safety.max_skipped_steps": 2, "checkpoint.keep_last": 3})
  poison(monkeypatch, config, [4, 5])
  train.train(config, tmp_path / "diverged")
  assert "step 6: loss, gradient or rate was not finite" in (said := capsys.readouterr().err)
  assert "back to the checkpoint of step 4, and on with the data from example 112 on (time 1 of 3)" in said
  assert "the checkpoint of step 6 is passed over: the run diverged" in said
  rows = [row for row in read_metrics(tmp_path / "diverged") if "loss" in row]
  assert [row["step"] for row in rows] == list(range(1, 11))
  assert [row.get("rollbacks", 0) for row in rows] == [0] * 4 + [1] * 6
  final = final_state(tmp_path / "diverged", config, 10)
  assert final[1] == {"next_index": (10 + 3) * 16}  # two bad batches, and the one that was on its way
  assert int(final[0].skipped["total"]) == 0
  # Killed after it went back and before the next checkpoint, it comes to the same.
  train_until(6, config, tmp_path / "killed", time=2)
  train.train(config, tmp_path / "killed")
  # And so does a run that never met the bad data.
  train_until(5, config, tmp_path / "told")
  Rollbacks(tmp_path / "told").record(2, 6, 4, {"next_index": 112})
  train.train(config, tmp_path / "told")
  for name in ("killed", "told"):
    assert losses_on_disk(tmp_path / name) == losses_on_disk(tmp_path / "diverged")
    other = final_state(tmp_path / name, config, 10)
    assert_equal(other[0], final[0])
    assert other[1] == final[1]


def test_a_run_that_diverges_again_goes_further_back_and_ends_at_last(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = bare(
    **{"duration.steps": 10, "safety.max_skipped_steps": 2, "checkpoint.keep_last": 3, "safety.max_rollbacks": 2}
  )
  poison(monkeypatch, config, list(range(4, 20)))
  with pytest.raises(FloatingPointError, match=r"went back 2 of config.safety.max_rollbacks=2 times"):
    train.train(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "rollbacks.jsonl").read_text().splitlines()]
  assert [(line["to"], line["at"]) for line in lines] == [(4, 6), (2, 6)]
  assert {path.name for path in (tmp_path / "checkpoints").glob("*.diverged*")} >= {"6.diverged", "4.diverged"}


def test_training_outlives_saves_that_fail(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = bare()
  reasons = ["No space left on device"] * 3
  monkeypatch.setattr(Checkpoints, "_cannot_write", lambda self: reasons.pop() if reasons else "")
  train.train(config, tmp_path)
  rows = [row for row in read_metrics(tmp_path) if "loss" in row]
  assert [row.get("checkpoint_failed", 0) for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
  assert Checkpoints(tmp_path).steps() == [8]
  assert "the checkpoint of step 4 was not written: OSError: No space left on device; training goes on" in caplog.text
  # Only the last one has to be.
  monkeypatch.setattr(Checkpoints, "_cannot_write", lambda self: "No space left on device")
  monkeypatch.setattr(train, "_PATIENCE", 1.5)
  with pytest.raises(OSError, match=r"checkpoint of step 8 cannot be written to .*No space left.*newest .* step none"):
    train.train(config, tmp_path / "never")


def test_saves_by_the_clock_are_made_at_lines_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = bare(
    **{"checkpoint.every.steps": 0, "checkpoint.keep_last": 9, "safety.checkpoint_minutes": 1e-9, "log_every": 3}
  )
  train.train(config, tmp_path)
  assert Checkpoints(tmp_path).steps() == [3, 6, 8]


def test_a_directory_in_use_is_refused_until_its_run_is_gone(tmp_path: Path) -> None:
  holder = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import pathlib, sys, time\nfrom declip_jax.runtime import workdir\n"
      "with workdir.lock(pathlib.Path(sys.argv[1])):\n  print('held', flush=True)\n  time.sleep(600)",
      str(tmp_path),
    ],
    env=environment(),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert holder.stdout.readline() == "held\n"
  with pytest.raises(ValueError, match=rf"in use by another run: .+, process {holder.pid}, since \d{{4}}-"):
    train.train(bare(), tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}
  holder.kill()
  holder.wait()
  with workdir_lib.lock(tmp_path) as note:
    assert note == ""


def test_without_locks_a_run_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(workdir_lib.fcntl, "flock", flock)
  with workdir_lib.lock(tmp_path) as note:
    assert "No locks available; nothing keeps a second run out of this directory" in note


def test_a_hang_ends_the_process_and_leaves_the_stacks(tmp_path: Path) -> None:
  script = """
import pathlib, sys, time
from declip_jax.runtime.watchdog import Watchdog

def stand_still():
  time.sleep(600)

with Watchdog(pathlib.Path(sys.argv[1]), 0.5) as watchdog:
  for step in range(5):
    watchdog.beat(f"step {step}")
    time.sleep(0.2)
  stand_still()
"""
  done = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 70
  assert "error: step 4 has not ended within config.safety.hang_timeout=0.5 s" in done.stderr
  stacks = (tmp_path / "hang.0.txt").read_text()
  assert "step 4" in stacks
  assert "in stand_still" in stacks


def test_what_is_compiled_is_kept_beside_the_run_unless_elsewhere(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  before = jax.config.jax_compilation_cache_dir
  try:
    workdir_lib.use_compile_cache(tmp_path)
    assert jax.config.jax_compilation_cache_dir == before  # tests have one
    jax.config.update("jax_compilation_cache_dir", None)
    workdir_lib.use_compile_cache(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("text", ["100", "5:3", "0:2", "a:b"])
def test_steps_to_trace_are_checked(text: str) -> None:
  with pytest.raises(ValueError, match=r"--profile=.*such as 100:110"):
    parse_steps(text)


def test_the_loss_goes_on_the_same_on_fewer_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  config = bare()
  use_mesh(monkeypatch, 1, 1)
  train.train(config, tmp_path / "one")
  for mesh, step in (((2, 4), 3), ((4, 1), 6)):
    use_mesh(monkeypatch, *mesh)
    train_until(step, config, tmp_path / "fewer")
  use_mesh(monkeypatch, 1, 1)
  train.train(config, tmp_path / "fewer")
  fewer, one = (losses_on_disk(tmp_path / name) for name in ("fewer", "one"))
  np.testing.assert_allclose(fewer, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 12}, r"batch_size=12 does not divide over the 8 devices"),
    ({"contrast.block": 3}, r"contrast.block=3 does not divide the 16 candidates .*form='auto' compares on 8 devices"),
    ({"contrast.block": 4, "contrast.method": "ring"}, r"contrast.block=4 does not divide the 2 candidates"),
    ({"contrast.block": 5, "contrast.method": "chunked"}, r"contrast.block=5 does not divide the 16 candidates"),
    ({"data.recipe": "blip"}, r"recipe='blip': choose one of \['clip', 'clip_color', "),
    ({"data.recipe": "clip"}, r"term 'mlm' .* needs Views.masked_text.*recipe 'clip' does not make"),
    ({"data.train": ("webdataset:/nowhere/train-*.tar",)}, r"/nowhere"),
    ({"data.train": ("parquet:/data",)}, r"parquet"),
    (
      {"objective.mlm.weight": 0.0, "data.recipe": "clip"},
      r"term 'mvs' .* needs Views.contrastive_text\[1\].*recipe 'clip'",
    ),
    ({"objective.nns": {"symmetrical": True}}, r"config.objective.nns.symmetrical: term 'nns' has the options"),
    ({"data.neighbour_texts": ("raw", "masked")}, r"neighbour_texts=.*: choose one or more of \['raw', 'augmented'\]"),
    ({"optimizer.name": "adamax"}, r"config.optimizer.name='adamax': choose one of"),
    ({"optimizer.schedule": "linear"}, r"config.optimizer.schedule='linear': choose one of"),
    ({"optimizer.weight_decay": float("nan")}, r"config.optimizer.weight_decay=nan: a finite number"),
    ({"optimizer.multipliers": (("heads", float("inf")),)}, r"optimizer.multipliers\['heads'\]=inf"),
    ({"optimizer.decay_mask": "every"}, r"config.optimizer.decay_mask='every': choose one of"),
    ({"model.mlm_attention": "both"}, r"mlm_attention='both': choose one of"),
    ({"model.heads.norm_groups": 3}, r"norm_groups=3 .*does not divide the batch of 16"),
    ({"model.image.kind": "cnn"}, r"kind='cnn': choose one of"),
    ({"model.text.vocab_size": 49408}, r"vocab_size=49408 is too small"),
    ({"data.image_size": 20}, r"image_size=20 is no multiple of config.model.image.patch=8"),
    ({"mesh.data": 3}, r"does not fit 8 devices"),
    ({"duration.epochs": 2.0}, r"set one of steps, epochs, examples"),
    ({"optimizer.warmup.steps": 9}, r"longer than the training of 8"),
    ({"model.heads.bank_groups": 3}, r"bank_groups=3 does not divide the batch of 16"),
    ({"model.heads.bank_neighbours": 33}, r"bank_neighbours=33 is more than its bank_size=32"),
    ({"objective.byol.schedule": ((0, 1.0),)}, r"config.objective.byol.schedule=.*config.objective.byol.weight is 0"),
    ({"objective.nns.schedule": ((9, 0.0), (5, 1.0))}, r"config.objective.nns.schedule=.*steps have to ascend"),
    ({"objective.nns.schedule": (0, 0.0)}, r"config.objective.nns.schedule=\(0, 0.0\): pairs of a step and a factor"),
    ({"objective.nns.schedule": ((0, float("nan")),)}, r"config.objective.nns.schedule=.*factors have to be finite"),
    ({"momentum_tower.decay": 1.5}, r"config.momentum_tower.decay=1.5: 0 to 1"),
    ({"objective.clip.weight": float("nan")}, r"config.objective.clip.weight=nan: a finite number"),
    ({"objective.simclr.temperature": 0.0}, r"config.objective.simclr.temperature=0.0: more than 0"),
    ({"objective.clip.label_smoothing": 2.0}, r"config.objective.clip.label_smoothing=2.0: 0 to 1"),
    ({"optimizer.learning_rate": float("nan")}, r"config.optimizer.learning_rate=nan: a finite number"),
    ({"optimizer.logit_scale_range": (6.0, 3.0)}, r"logit_scale_range=\(6.0, 3.0\): two numbers, ascending, or \(\)"),
    ({"objective.mim.weight": 1.0}, r"term 'mim' .*needs Views.masked_image.*recipe 'declip'"),
    ({"model.heads.bank_size": 8}, r"bank_size=8 texts, fewer than the 16 of a step"),
    ({"data.mixture": (0.5, 0.5)}, r"a positive weight for each of 1 sources"),
    ({"data.augment_on": "gpu"}, r"augment_on='gpu': choose 'host' or 'device'"),
    ({"data.engine": "pillow"}, r"engine='pillow': choose one of \['exact', 'fast'\]"),
    ({"data.text_operations": ("translate",)}, r"text_operations=.*choose one or more of \['delete', 'insert'"),
    ({"model.text.tokenizer": "bert"}, r"tokenizer='bert': choose 'openai', 'huggingface:FILE'"),
    ({"data.weak_scale": (0.5, 3.0)}, r"weak_scale=\(0.5, 3.0\): two numbers, ascending, from 0 to 1"),
    ({"data.strong_scale": (0.5,)}, r"strong_scale=\(0.5,\): two numbers"),
    ({"data.jitter": (0.4,)}, r"jitter=\(0.4,\): brightness, contrast, saturation, hue"),
    ({"data.flip_probability": 2.0}, r"flip_probability=2.0: from 0 to 1"),
    ({"data.caption_weights": (-1, 2)}, r"config.data.caption_weights=\(-1, 2\): weights of 0 or more"),
    ({"data.templates": ("a photo",)}, r"config.data.templates=\('a photo',\): texts with {} once"),
    ({"data.interpolation": "nearest"}, r"interpolation='nearest': one of \['bilinear', 'bicubic'\]"),
    ({"data.workers": -1}, r"config.data.workers=-1: 0 or more, or None"),
    ({"data.max_bad": 5.0}, r"config.data.max_bad=5.0: a share"),
    ({"data.image_size": 0}, r"config.data.image_size=0: 1 or more"),
    ({"seed": -1}, r"config.seed=-1: 0 or more"),
    ({"safety.spike_factor": 0.5}, r"config.safety.spike_factor=0.5: 0, or more than 1"),
    ({"safety.checkpoint_minutes": -1.0}, r"config.safety.checkpoint_minutes=-1.0: 0 or more"),
    ({"checkpoint.keep_every.steps": -1}, r"config.checkpoint.keep_every=.*: set one of"),
    ({"model.text.eot": 3}, r"eot=3: config.model.text.tokenizer='openai' ends texts with 49407"),
  ],
)
def test_bad_config_is_refused_before_compiling(change: dict, message: str, tmp_path: Path) -> None:
  config = tiny_config("declip")
  config.update_from_flattened_dict(change)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("signalled", [False, True])
def test_an_evaluation_that_is_cut_off_costs_no_step_and_is_made_up_for(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signalled: bool
) -> None:
  use_mesh(monkeypatch, 1, 1)
  config = tiny_config("clip")
  config.evaluate_every.steps, config.checkpoint.every.steps = 4, 100

  def interrupt(encoders: object) -> dict[str, float]:
    if not signalled:
      raise KeyboardInterrupt
    os.kill(os.getpid(), signal.SIGTERM)
    return {"eval/heldout/top1": 0.5}

  with monkeypatch.context() as patched:
    patched.setattr(train, "make_evaluators", lambda *_: interrupt)
    with pytest.raises(train.Stopped if signalled else KeyboardInterrupt):
      train.train(config, tmp_path)
  assert Checkpoints(tmp_path).steps() == [4]
  train.train(config, tmp_path)
  rows = [row["step"] for row in read_metrics(tmp_path) if "eval/heldout/top1" in row]
  assert rows == [4, 8]


def test_a_trace_out_of_reach_is_told(tmp_path: Path) -> None:
  assert Trace(tmp_path, (3, 4)).out_of_reach(2, 8) == ""
  for start, total in ((4, 8), (0, 2)):
    said = Trace(tmp_path, (3, 4)).out_of_reach(start, total)
    assert said == f"--profile=3:4 traces nothing: this run takes the steps {start + 1} to {total}"
  assert Trace(tmp_path, None).out_of_reach(0, 8) == ""


@pytest.mark.parametrize(
  ("error", "code"), [(ValueError("no"), 2), (FileNotFoundError("no"), 2), (OSError(errno.ESTALE, "stale"), 74)]
)
def test_what_may_be_gone_the_next_time_has_an_exit_code_of_its_own(
  tmp_path: Path, capsys: pytest.CaptureFixture, error: Exception, code: int
) -> None:
  assert build._report(error, tmp_path) == code
  assert capsys.readouterr().err == f"error: {error}\n"
