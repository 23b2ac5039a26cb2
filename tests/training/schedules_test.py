"""Tests of `declip_jax.training.schedules` against the schedules of SLIP, DeCLIP and open_clip."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as reference

from declip_jax import build, config
from declip_jax.training import schedules

PRECISIONS = {"f32": np.float32, "f64": np.float64}


def make(name, total_steps=10, **settings):
  """A schedule that ends at 0.1 without warm-up, unless overridden by `settings`."""
  defaults = {"learning_rate": 1.0, "warmup": 0, "warmup_start": 0.0, "end_learning_rate": 0.1, "cooldown": 0}
  given = defaults | {"schedule": name, "total_steps": total_steps} | settings
  return schedules.make_schedule(
    build.read_settings(schedules.ScheduleSettings, config.default().optimizer, "optimizer", **given)
  )


@pytest.fixture(scope="module")
def golden():
  return reference.load("schedule")


def golden_schedules(golden):
  """Name -> (schedule, 0-based steps, their learning rates, peak)."""
  cases = {}
  for name in ("slip_cosine", "slip2_cosine"):
    base, final, epochs, steps_per_epoch, warmup_epochs, start = golden[f"{name}/args"]
    total, warmup = int(epochs * steps_per_epoch), int(warmup_epochs * steps_per_epoch)
    cases[name] = ("cosine", golden[f"{name}/lr_all"], base, start, final, warmup, total, {})

  start, peak, end, warmup, total = golden["declip_cosine/args_base_peak_min_warmup_max"]
  lr = golden["declip_cosine/lr_all_1based"]
  cases["declip_cosine"] = ("declip_cosine", lr, peak, start, end, int(warmup), int(total), {})
  cases["declip_release"] = ("declip_cosine", golden["declip_release/lr"], 1e-3, 1e-4, 0.0, 2500, 128001, {})
  start, peak, warmup, *milestones = golden["declip_step/args"]
  milestones = tuple(zip(map(int, milestones[:2]), milestones[2:], strict=True))
  lr = golden["declip_step/lr_all_1based"]
  cases["declip_step"] = ("step", lr, peak, start, 0.0, int(warmup), len(lr), {"milestones": milestones})

  peak, warmup, total = golden["openclip/args_lr_warmup_steps"]
  cooldown, power, low = golden["openclip_const_cooldown/args_steps_power_end"]
  for name, schedule, end, options in (
    ("cosine", "cosine", 0.0, {}),
    ("const", "constant", 0.0, {}),
    ("const_cooldown", "cooldown", low, {"cooldown": int(cooldown), "cooldown_power": float(power)}),
  ):
    lr = golden[f"openclip_{name}/lr_all"]
    cases[f"openclip_{name}"] = (schedule, lr, peak, peak / warmup, end, int(warmup), int(total), options)

  found = {}
  for name, (schedule, lr, peak, start, end, warmup, total, options) in cases.items():
    rates = {"learning_rate": peak, "warmup_start": start, "end_learning_rate": end}
    made = make(schedule, total, warmup=warmup, **{name: float(rate) for name, rate in rates.items()}, **options)
    steps = golden["declip_release/steps1"] - 1 if name == "declip_release" else np.arange(len(lr))
    found[name] = made, steps, lr, peak
  return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_schedules_equal_slip_declip_and_open_clip(golden, precision):
  cases = golden_schedules(golden)
  assert set(cases) == {key.split("/")[0] for key in golden if "/lr" in key} - {"optim"}
  with jax.enable_x64(True) if precision == "f64" else contextlib.nullcontext():
    # Of steps that are traced, as in the train step.
    found = jax.jit(lambda steps: {name: cases[name][0](step) for name, step in steps.items()})(
      {name: jnp.asarray(steps) for name, (_, steps, _, _) in cases.items()}
    )
  for name, (_, _, lr, peak) in cases.items():
    assert found[name].dtype == PRECISIONS[precision]
    limits = {"rtol": 2e-6, "atol": 2e-7 * peak} if precision == "f32" else {"rtol": 1e-12, "atol": 1e-15}
    np.testing.assert_allclose(found[name], lr, **limits, err_msg=name)


def test_the_cosine_is_that_of_big_vision_but_for_a_shorter_warmup():
  """Its peak is at the step after the warm-up, ours at the last one of it."""
  expected = reference.load("siglip_training")["rates"]
  found = make("cosine", len(expected), learning_rate=1e-3, warmup=10, end_learning_rate=0.0)(jnp.arange(len(expected)))
  np.testing.assert_allclose(found[10:], expected[10:], rtol=2e-6, atol=1e-10)
  np.testing.assert_allclose(found[:10], expected[:10] * 10 / 9, rtol=2e-6)


def test_a_schedule_without_warmup_starts_at_the_peak_and_is_constant_after_the_end():
  steps = jnp.array([0, 5, 10, 99])
  np.testing.assert_allclose(make("cosine")(steps), [1, 0.55, 0.1, 0.1], rtol=1e-6)
  np.testing.assert_allclose(make("cooldown", cooldown=10)(steps), [1, 0.55, 0.1, 0.1], rtol=1e-6)
  np.testing.assert_allclose(make("step", milestones=((6, 0.5),))(steps), [1, 0.5, 0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(make("constant")(steps), 1)
  np.testing.assert_allclose(make("declip_cosine")(jnp.array([9, 99])), 0.1, rtol=1e-6)


@pytest.mark.parametrize(
  ("settings", "field"),
  [
    ({"name": "linear"}, r"schedule='linear'.*'constant', 'cooldown', 'cosine'"),
    ({"warmup": 11}, r"warmup is 11 steps.* 10 "),
    ({"name": "cooldown", "cooldown": 7, "warmup": 4}, r"cooldown is 7 steps: choose 1 to 6"),
    ({"name": "cooldown"}, r"cooldown is 0 steps: choose 1 to 10"),
    ({"name": "step", "milestones": ((6, float("nan")),)}, r"milestones\[6\]=nan"),
    ({"name": "step", "milestones": ((6, -0.5),)}, r"milestones=\(\(6, -0\.5\),\)"),
    ({"name": "step"}, r"milestones=\(\)"),
    ({"warmup_start": float("inf")}, r"warmup_start=inf"),
  ],
)
def test_invalid_settings_are_rejected_with_field_and_value(settings, field):
  with pytest.raises(ValueError, match=rf"config\.optimizer\.{field}"):
    make(**{"name": "cosine"} | settings)


def test_the_peak_may_be_zero_and_a_schedule_may_rise():
  steps = jnp.array([0, 5, 10])
  np.testing.assert_allclose(make("cosine", learning_rate=0.0)(steps), [0, 0.05, 0.1], rtol=1e-6)
  np.testing.assert_allclose(make("cooldown", learning_rate=0.0, cooldown=10)(steps), [0, 0.05, 0.1], rtol=1e-6)


def test_the_schedule_of_fine_tuning_equals_beit():
  """A warm-up from 0 whose last step has the peak, and a cosine per step."""
  beit = reference.load("beit_finetuning")
  base, final, epochs, steps, warmup = beit["schedule/args_base_final_epochs_iterations_warmup"]
  total = int(epochs * steps)
  given = {"learning_rate": float(base), "end_learning_rate": float(final), "warmup": int(warmup * steps)}
  schedule = make("cosine", total, **given)
  np.testing.assert_allclose(schedule(jnp.arange(total)), beit["schedule/lr"], rtol=1e-5, atol=1e-10)
