"""The stages of a run: their configs and steps, their schedules, exact resumption across the boundary, and errors."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
from runs import assert_equal, final_state, losses_on_disk, train_in_two_processes
from tiny import tiny_config

from declip_jax import architectures, build, config, sharding, train
from declip_jax.batch_sizes import BatchSizes
from declip_jax.clip import load
from declip_jax.data import pipeline
from declip_jax.data.mixture import Mixture
from declip_jax.data.sources import open_source
from declip_jax.models import model as model_lib
from declip_jax.planning import training_facts
from declip_jax.planning.flops import step_flops
from declip_jax.reporting.metrics import read_metrics
from declip_jax.runtime.rollback import Rollbacks
from declip_jax.runtime.services import Cadence, Services
from declip_jax.stages import LAST, Stage, flops_until, plan_stages, repeatable_from, stage_configs
from declip_jax.training import schedules
from declip_jax.training.state import abstract_state

EPOCH = 256
LOW = {"image_size": 16, "patch_dropout": 0.5, "context_length": 8, "batch_size": 32, "learning_rate": 2e-3}


def staged(method: str = "clip", **fields: object) -> ConfigDict:
  """Four steps of 32 pairs at a quarter of the pixels, then three of 16 at 32 x 32; each step is saved."""
  c = tiny_config(method, image_size=32)
  c.evals = ConfigDict()
  c.duration = config.duration(examples=4 * 32 + 3 * 16)
  c.evaluate_every = config.duration(steps=3)
  c.checkpoint.every, c.checkpoint.keep_last = config.duration(steps=1), 9
  c.stages.low = config.stage(duration=config.duration(epochs=0.5), **{**LOW, **fields})
  return c


@contextlib.contextmanager
def one_device() -> Iterator[None]:
  """Trains on one device, where an evaluation returns its number."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, "make_evaluators", lambda *_: lambda encoders, number: {"eval/a/top1": float(number)})
    patch.setattr(build, "make_mesh", lambda **_: sharding.make_mesh(1, 1, jax.devices()[:1]))
    yield


def spans(stages: list[Stage]) -> list[tuple[str, int, int]]:
  return [(stage.name, stage.first, stage.last) for stage in stages]


def test_the_config_of_a_stage_has_its_fields_and_otherwise_those_of_the_run() -> None:
  c = staged(warmup=config.duration(steps=3))
  low, last = stage_configs(c).values()
  assert [*stage_configs(c)] == ["low", LAST]
  changed = {
    "data.image_size": 16,
    "model.patch_dropout": 0.5,
    "model.text.context_length": 8,
    "batch_size": 32,
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup.steps": 3,
    "duration.epochs": 0.5,
    "duration.examples": 0,
  }
  expected = c.copy_and_resolve_references()
  expected.stages = ConfigDict()
  assert last.to_dict() == expected.to_dict()
  expected.update_from_flattened_dict(changed)
  assert low.to_dict() == expected.to_dict()
  c.stages = ConfigDict()
  assert stage_configs(c) == {LAST: c}


def test_durations_become_steps_of_the_batches_of_each_stage() -> None:
  c = staged()
  assert spans(plan_stages(c, EPOCH)) == [("low", 0, 4), (LAST, 4, 7)]
  c.duration = config.duration(epochs=1.01)
  c.stages.low2 = config.stage(duration=config.duration(examples=65))
  c.stages.low.duration = config.duration(steps=2)
  stages = plan_stages(c, EPOCH)
  assert spans(stages) == [("low", 0, 2), ("low2", 2, 7), (LAST, 7, 15)]  # 259 examples: 2 * 32 + 13 * 16
  assert {stage.batch_sizes for stage in stages} == {BatchSizes(((0, 32), (2, 16)))}
  assert stages[1].own_sizes == BatchSizes(((0, 16),))
  assert flops_until(stages, 9, lambda stage, size: size * len(stage.name)) == 2 * 32 * 3 + 5 * 16 * 4 + 2 * 16 * 4
  assert repeatable_from(stages) == 0


@pytest.mark.parametrize("start", [1, 3, 4, 6])
def test_a_run_that_resumes_has_the_same_stages(start: int) -> None:
  c = staged()
  stages = plan_stages(c, EPOCH)
  sizes = stages[-1].batch_sizes.between(0, start)
  again = plan_stages(c, EPOCH, sizes, start)
  assert spans(again) == spans(stages)
  assert again[-1].batch_sizes == stages[-1].batch_sizes
  assert repeatable_from(again) == 0


def test_stages_count_the_examples_of_earlier_batches_of_another_size() -> None:
  c = staged()
  c.stages.low.batch_size = 16
  stages = plan_stages(c, EPOCH, BatchSizes(((0, 32),)), 2)  # 64 of 128 examples
  assert spans(stages) == [("low", 0, 6), (LAST, 6, 9)]
  assert stages[0].own_sizes == BatchSizes(((0, 32), (2, 16)))
  assert repeatable_from(stages) == 2
  c.stages.low.batch_size, c.batch_size = 32, 8
  stages = plan_stages(c, EPOCH, BatchSizes(((0, 32), (4, 16))), 6)  # 160 of 176 examples
  assert spans(stages) == [("low", 0, 4), (LAST, 4, 8)]
  assert stages[1].own_sizes == BatchSizes(((0, 16), (2, 8)))
  assert repeatable_from(stages) == 6


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"stages.low.duration.epochs": 0.0}, ("config.stages.low.duration", "steps, epochs, examples")),
    ({"stages.low.duration.steps": 4}, ("config.stages.low.duration", "'steps': 4", "'epochs': 0.5")),
    ({"stages.low.context_length": 17}, ("config.stages.low.context_length=17", "16")),
    ({"duration.examples": 128}, ("config.stages", "4 steps", "config.duration")),
  ],
)
def test_stages_that_contradict_the_run_are_rejected(change: dict[str, Any], named: tuple[str, ...]) -> None:
  c = staged()
  c.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match="config") as raised:
    plan_stages(c, EPOCH)
  assert all(word in str(raised.value) for word in named)


def test_the_names_of_stages_and_of_their_fields_are_checked() -> None:
  c = staged()
  c.stages.last = config.stage(duration=config.duration(steps=1))
  with pytest.raises(ValueError, match="config.stages.last"):
    stage_configs(c)
  del c.stages.last
  c.stages.low = ConfigDict({"duration": config.duration(steps=1), "imagesize": 8})
  with pytest.raises(ValueError, match=r"config.stages.low .*'imagesize'.*did you mean image_size"):
    stage_configs(c)
  with pytest.raises(AttributeError, match="imagesize"):
    config.stage(imagesize=8)


@pytest.mark.parametrize(
  ("method", "fields", "named"),
  [
    ("clip", {"image_size": 12}, ("config.stages.low.image_size=12", "config.model.image.patch=8")),
    ("clip", {"patch_dropout": 1.0}, ("config.stages.low.patch_dropout=1.0",)),
    ("clip", {"batch_size": 0}, ("config.stages.low.batch_size=0",)),
    ("clip", {"micro_batches": 5}, ("config.stages.low.micro_batches=5", "config.stages.low.batch_size=32")),
    ("clip", {"warmup": config.duration(steps=5)}, ("config.stages.low.warmup", "4 steps")),
    ("slip_mim", {}, ("config.stages.low.patch_dropout=0.5", "'mim'")),
    ("slip_mim", {"image_size": 8, "patch_dropout": 0.0}, ("config.stages.low", "config.data.patch_share")),
    ("filip_repo", {"image_size": 8}, ("config.stages.low", "config.objective.filip.top_k=3")),
  ],
)
def test_a_stage_that_cannot_be_trained_is_named(
  method: str, fields: dict[str, Any], named: tuple[str, ...], tmp_path: Path
) -> None:
  with one_device(), pytest.raises(ValueError, match="config") as raised:
    train.train(staged(method, **fields), tmp_path)
  assert all(word in str(raised.value) for word in named)
  assert str(raised.value).startswith("config.stages.low")
  assert not (tmp_path / "config.json").exists()


def rates_of(steps: build.Steps, first: int) -> np.ndarray:
  return np.asarray(schedules.make_schedule(steps.schedule)(jnp.arange(first, steps.total) + steps.lead))


def test_each_stage_has_a_whole_schedule_and_cadences_go_through_the_run() -> None:
  c = staged()
  c.optimizer.warmup = config.duration(examples=64)
  c.evaluate_every = config.duration(examples=48)
  c.duration.examples = 4 * 32 + 8 * 16
  c.stages.low.evaluate_every = config.duration(steps=3)
  low, last = (build.stage_steps(stage, EPOCH) for stage in plan_stages(c, EPOCH))
  assert [(steps.total, steps.schedule.total_steps, steps.schedule.warmup) for steps in (low, last)] == [
    (4, 4, 2),
    (12, 8, 4),
  ]
  alone = tiny_config("clip")
  alone.optimizer.warmup = config.duration(steps=4)
  np.testing.assert_array_equal(rates_of(last, 4), rates_of(build.to_steps(alone, EPOCH), 0))
  assert rates_of(low, 0).max() == pytest.approx(2e-3)
  assert (low.evaluate, low.evaluate_phase) == (3, 0)
  assert (last.evaluate, last.evaluate_phase) == (3, 2)  # at steps 5, 8 and 11: after 144 examples, 192 and 240
  # The decay of a momentum tower rises once in the run, over its examples.
  assert [(low.run_lead, low.run_total), (last.run_lead, last.run_total)] == [(0, 8), (4, 16)]


class Reading(NamedTuple):
  """What a step of a run has read."""

  image: tuple[int, ...]
  text: np.ndarray
  position: int


@contextlib.contextmanager
def recorded(read: dict[int, Reading]) -> Iterator[None]:
  """Records the batches of the training inside, by step."""
  loop = train.loop

  def recording(step_fn: Any, batches: Any, state: Any, start: int, *others: Any) -> Any:
    def seen() -> Iterator[Any]:
      for step, (batch, position, bad) in enumerate(batches, start + 1):
        read[step] = Reading(batch["image"].shape, np.asarray(batch["text"]), position["next_index"])
        yield batch, position, bad

    return loop(step_fn, seen(), state, start, *others)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "loop", recording)
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Reading]]:
  """A run in two stages that is not interrupted, and what it has read."""
  workdir, read = tmp_path_factory.mktemp("whole"), {}
  with one_device(), recorded(read):
    train.train(staged(), workdir)
  return workdir, read


def test_each_stage_reads_its_own_batches_and_the_order_goes_on(whole: tuple[Path, dict[int, Reading]]) -> None:
  workdir, read = whole
  assert [reading.position for _, reading in sorted(read.items())] == [32, 64, 96, 128, 144, 160, 176]
  assert {reading.image for step, reading in read.items() if step <= 4} == {(32, 1, 16, 16, 3)}
  assert {reading.image for step, reading in read.items() if step > 4} == {(16, 1, 32, 32, 3)}
  assert {step: reading.text.shape[1:] for step, reading in read.items()} == dict.fromkeys(range(1, 5), (1, 8)) | (
    dict.fromkeys(range(5, 8), (1, 16))
  )
  c = staged()
  mixture = Mixture([open_source(name) for name in c.data.train])
  with one_device():
    for of_stage, samples in (("low", range(128)), (LAST, range(128, 176))):
      make_views = build.build(stage_configs(c)[of_stage]).make_views
      expected = pipeline.training_samples(mixture, make_views, c.seed)
      steps = [reading.text for step, reading in sorted(read.items()) if (step <= 4) == (of_stage == "low")]
      np.testing.assert_array_equal(np.concatenate(steps), [expected[index]["text"] for index in samples])


def test_metrics_and_counters_are_those_of_the_stage(
  whole: tuple[Path, dict[int, Reading]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  lines = [line for line in read_metrics(whole[0]) if "loss" in line]
  assert [(line["step"], line["stage"], line["examples"]) for line in lines] == [
    *((step, 1, 32 * step) for step in range(1, 5)),
    *((4 + step, 2, 128 + 16 * step) for step in range(1, 4)),
  ]
  flops = np.diff([0.0] + [line["training_flops"] for line in lines])
  assert len(set(flops[:4])) == len(set(flops[4:])) == 1
  builds = {name: build.build(c, jax.devices()[:1]) for name, c in stage_configs(staged()).items()}
  assert flops[0] == step_flops(builds["low"], 32)
  assert flops[-1] == step_flops(builds[LAST], 16)
  monkeypatch.setattr(training_facts, "cache_folder", lambda: tmp_path)
  facts = training_facts.training_facts(whole[0], 7)
  assert (facts["pairs_seen"], facts["flops"]) == (176, lines[-1]["training_flops"])
  assert [final_state(whole[0], staged(), step)[0].skipped["measured"] for step in (4, 5, 7)] == [4, 1, 3]
  stages = plan_stages(staged(), EPOCH)
  rates = np.concatenate([rates_of(build.stage_steps(stage, EPOCH), stage.first) for stage in stages])
  np.testing.assert_allclose([line["lr"] for line in lines], rates, rtol=1e-6)


def evaluations(workdir: Path) -> list[tuple[float, float, float, float]]:
  """The steps of evaluations, their numbers, and what their lines say about the training."""
  found = [line for line in read_metrics(workdir) if "eval/a/top1" in line]
  return [(line["step"], line["eval/a/top1"], line["stage"], line["examples"]) for line in found]


def test_the_last_step_of_a_stage_is_evaluated_and_saved(whole: tuple[Path, dict[int, Reading]]) -> None:
  assert evaluations(whole[0]) == [(3, 1, 1, 96), (4, 0, 1, 128), (6, 2, 2, 160), (7, 0, 2, 176)]
  cadence = Cadence(total=4, log=3, evaluate=3, checkpoint=3, first=2)
  assert [step for step in range(6) if cadence.has(step)] == [2, 3]
  assert [step for step in (3, 4) if cadence.saves(step)] == [3, 4]
  c = staged()
  c.checkpoint.every = config.duration()
  assert [build.stage_steps(stage, EPOCH).checkpoint for stage in plan_stages(c, EPOCH)] == [0, 0]


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_resumes_bit_exact_on_either_side_of_the_boundary(
  step: int, whole: tuple[Path, dict[int, Reading]], tmp_path: Path
) -> None:
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  for later in range(step + 1, 8):  # as if it had been killed
    shutil.rmtree(tmp_path / "checkpoints" / str(later))
  metrics = tmp_path / "metrics.jsonl"  # the evaluation of the newest checkpoint is repeated
  kept = [line for line in metrics.read_text().splitlines() if not ("eval/" in line and f'"step": {step},' in line)]
  metrics.write_text("\n".join(kept) + "\n")
  with one_device():
    assert train.train(staged(), tmp_path)["step"] == 7
  assert_same_end(tmp_path, whole[0], staged())
  assert evaluations(tmp_path) == evaluations(whole[0])


def assert_same_end(workdir: Path, expected: Path, c: ConfigDict) -> None:
  """Two runs have the same losses and, bit for bit, the same last state and position."""
  assert losses_on_disk(workdir) == losses_on_disk(expected)
  (ours, position), (theirs, place) = (final_state(folder, c, 7) for folder in (workdir, expected))
  assert_equal(ours, theirs)
  assert position == place == {"next_index": 176}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "ema"), [("declip", 0.9), ("slip_byol", 0.0)])
def test_banks_averages_and_momentum_towers_resume_bit_exact(method: str, ema: float, tmp_path: Path) -> None:
  c = staged(method)
  c.optimizer.ema = ema
  with one_device():
    train.train(c, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for later in range(4, 8):
      shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(later))
    train.train(c, tmp_path / "killed")
  assert_same_end(tmp_path / "killed", tmp_path / "whole", c)


@pytest.mark.slow
def test_a_rollback_returns_to_the_stage_before(
  whole: tuple[Path, dict[int, Reading]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Of a run that diverges at step 6, as it is told, to step 2: the steps are those of their stages, on other data."""
  diverged, found = Services.diverged, [False]

  def told(self: Services, metrics: dict[str, jax.Array]) -> bool:
    if self.clock.has_compiled and self.batch_sizes.size == 16 and metrics and not found[0]:
      found[0] = True
      return True
    return diverged(self, metrics)

  monkeypatch.setattr(Services, "diverged", told)
  monkeypatch.setattr(Rollbacks, "target", lambda self, steps, healthy: 2)
  read: dict[int, Reading] = {}
  with one_device(), recorded(read):
    train.train(staged(), tmp_path)
  assert read[3].position == 160 + 32  # after the batches of steps 5 and 6, which was in flight
  assert [read[step].image[0] for step in range(1, 8)] == [32, 32, 32, 32, 16, 16, 16]
  assert [line["examples"] for line in read_metrics(tmp_path) if "loss" in line] == [32, 64, 96, 128, 144, 160, 176]
  assert read[7].position == 160 + 2 * 32 + 3 * 16


@pytest.mark.slow
def test_stages_on_several_devices_and_in_micro_batches(
  whole: tuple[Path, dict[int, Reading]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(sharding, "MIN_SIZE", 256)
  monkeypatch.setattr(build, "make_mesh", lambda **_: sharding.make_mesh(2, 2, jax.devices()[:4]))
  c = staged(micro_batches=2)
  train.train(c, tmp_path)
  np.testing.assert_allclose(losses_on_disk(tmp_path), losses_on_disk(whole[0]), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_stages_in_two_processes(whole: tuple[Path, dict[int, Reading]], tmp_path: Path) -> None:
  c = staged()
  low = {"duration.epochs": 0.5, **LOW}
  flags = [f"--config.stages.low.{name}={value}" for name, value in low.items()]
  flags += ["--config.data.image_size=32", "--config.duration.steps=0"]
  flags += [f"--config.duration.examples={c.duration.examples}"]
  train_in_two_processes("clip,bare", tmp_path, *flags)
  np.testing.assert_allclose(losses_on_disk(tmp_path), losses_on_disk(whole[0]), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_stage_trains_as_a_run_with_its_config_does(tmp_path: Path) -> None:
  c = staged(image_size=32, context_length=16)  # the parameters of other sizes would have other random values
  c.checkpoint.every.steps = 0
  with one_device():
    train.train(c, tmp_path / "staged")
    train.train(stage_configs(c)["low"], tmp_path / "low")
  (staged_state, _), (low_state, _) = (final_state(tmp_path / name, c, 4) for name in ("staged", "low"))
  assert_equal(staged_state, low_state)


RESNET = architectures.resnet(width=8, layers=(1, 1, 1, 1))
OTHERS = ("defilip", "slip_byol", "siglip", "simclr", "finetune")


@pytest.mark.parametrize(
  ("method", "tower"),
  [
    ("clip", None),
    pytest.param("clip", RESNET, marks=pytest.mark.slow),
    *(pytest.param(method, None, marks=pytest.mark.slow) for method in OTHERS),
  ],
)
def test_a_stage_of_any_method_keeps_the_shapes_of_the_state(method: str, tower: ConfigDict | None) -> None:
  c = staged(method)
  if tower:
    c.model.image, c.data.image_size = tower, 64
    c.stages.low.image_size, c.stages.low.patch_dropout = 32, 0.0
  low, last = stage_configs(c).values()
  built, whole = (build.build(of_stage, jax.devices()[:1]) for of_stage in (low, last))
  options = {"model": whole.model, "optimizer": whole.optimizer}
  state = abstract_state(whole.batch_shape(16), whole.mesh, **options)
  step = build.make_step(low, built, build.stage_steps(plan_stages(c, EPOCH)[0], EPOCH), state)
  new, _ = jax.eval_shape(step, state, built.batch_shape(32))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_a_run_without_stages_compiles_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
  def program() -> str:
    c = tiny_config("clip")
    built = build.build(c, jax.devices()[:1])
    shapes = built.batch_shape(16)
    state = abstract_state(shapes, built.mesh, model=built.model, optimizer=built.optimizer)
    return build.make_step(c, built, build.to_steps(c, EPOCH), state).lower(state, shapes).as_text()

  fitted = program()
  monkeypatch.setattr(model_lib, "fit_positions", lambda towers, **_: towers)
  assert fitted == program()


@pytest.mark.slow
def test_a_checkpoint_of_any_stage_is_that_of_the_whole_model(whole: tuple[Path, dict[int, Reading]]) -> None:
  for step in (2, 6):
    clip = load(str(whole[0] / "checkpoints" / str(step)))
    assert clip.encode_image([np.zeros((40, 30, 3), np.uint8)]).shape == (1, 16)
    assert clip.encode_text(["a red ring"]).shape == (1, 16)
