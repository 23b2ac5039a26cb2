"""Counts and lists in words."""

from declip_jax.spelling import counted, listed


def test_one_is_singular() -> None:
  assert [counted(number, "step") for number in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]


def test_the_last_item_of_a_list_has_an_and() -> None:
  assert [listed(items) for items in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
