"""Tests of how the fields of `config.optimizer` become settings."""

import dataclasses

from ml_collections import ConfigDict
import pytest
import tiny

from declip_jax import build, config
from declip_jax.training import optim, schedules


def test_every_field_of_the_config_is_read_and_nothing_else() -> None:
  kinds = (optim.OptimizerSettings, schedules.ScheduleSettings)
  names = [field.name for kind in kinds for field in dataclasses.fields(kind)]
  assert sorted(names) == sorted([*config.default().optimizer, "total_steps"])


def test_settings_have_the_values_of_the_config() -> None:
  c = tiny.tiny_config("clip")
  c.optimizer.b2, c.optimizer.milestones = 0.5, ((3, 0.1),)
  c.optimizer.warmup, c.optimizer.cooldown = config.duration(examples=48), config.duration(steps=4)
  assert build.read_settings(optim.OptimizerSettings, c.optimizer, "optimizer").b2 == 0.5
  schedule = build.to_steps(c, epoch_examples=100).schedule
  assert (schedule.milestones, schedule.warmup, schedule.cooldown, schedule.total_steps) == (((3, 0.1),), 3, 4, 8)


def test_a_field_of_the_config_without_effect_is_rejected() -> None:
  c = tiny.tiny_config("clip")
  with c.unlocked():
    c.optimizer.b3 = 0.5
  with pytest.raises(ValueError, match=r"config\.optimizer.*\['b3'\]"):
    build.build(c)


def test_a_setting_without_a_field_in_the_config_is_rejected() -> None:
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Settings(optim.OptimizerSettings):
    b3: float

  with pytest.raises(ValueError, match=r"config\.optimizer.*\['b3'\]"):
    build.read_settings(Settings, config.default().optimizer, "optimizer")
  with pytest.raises(ValueError, match=r"config\.optimizer.*\['name', 'b1'"):
    build.read_settings(Settings, ConfigDict({"b3": 0.1}), "optimizer")
