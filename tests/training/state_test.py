"""The train state with an average of the weights; `step_test.py` tests how a step moves it."""

import jax
import numpy as np
from tiny import tiny_config

from declip_jax import architectures, build
from declip_jax.planning.compile import state_shapes
from declip_jax.training.state import State, evaluated_weights, start_average, weights_of


def test_an_average_has_the_shapes_of_parameters_and_batch_statistics() -> None:
  """Not of the momentum tower, nor of anything else; and a state without one is as before."""
  config = tiny_config("slip_mocov3")
  config.optimizer.frozen = ()
  config.model.image, config.data.image_size = architectures.resnet(4, (1, 1, 1, 1)), 64
  built = build.build(config, jax.devices()[:1])  # traced once
  without = state_shapes(config, built)
  config.optimizer.ema = 0.9
  state = state_shapes(config, built)
  assert state.average["params"] == state.params
  assert {half: {"batch_stats": x} for half, x in state.average["batch_stats"].items()} == {
    half: state.collections[half] for half in ("towers", "heads")
  }
  assert len(jax.tree.leaves(state.average["batch_stats"])) > 20
  assert "momentum" in state.collections
  assert without.average == {}
  assert jax.tree.leaves(without) == jax.tree.leaves(state.replace(average={}))


def test_evaluations_read_the_average_and_what_has_none_from_the_state() -> None:
  params = {"kernel": np.float32(1)}
  collections = {"towers": {"batch_stats": {"mean": np.float32(2)}}, "heads": {"bank": np.float32(3)}}
  state = State(np.int32(0), params, {}, collections, {})
  assert evaluated_weights(state) == (params, collections)
  average = jax.tree.map(lambda x: 10 * x, weights_of(params, collections))
  found, others = evaluated_weights(state.replace(average=average))
  assert found == {"kernel": 10}
  assert others == {"towers": {"batch_stats": {"mean": 20}}, "heads": {"bank": 3}}


def test_an_average_starts_as_a_copy_since_a_step_donates_both() -> None:
  params = jax.device_put({"kernel": np.arange(4.0, dtype=np.float32)})
  state = start_average(State(np.int32(0), params, {}, {}, {}))
  np.testing.assert_array_equal(state.average["params"]["kernel"], params["kernel"])
  params["kernel"].delete()
  assert state.average["params"]["kernel"].sum() == 6
