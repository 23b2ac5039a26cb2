"""Suggestions for unknown names."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns "; did you mean ...?" with the `known` names that are close to `name`, or an empty string."""
  return suggest(close_names(name, known))


def close_names(name: str, known: Iterable[str]) -> list[str]:
  """Returns up to three of the `known` names that are close to `name`, ignoring case, the closest first."""
  lower = {other.lower(): other for other in known}
  return [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]


def suggest(names: Collection[str]) -> str:
  """Returns "; did you mean ...?" with all `names`, or an empty string if there are none."""
  return f"; did you mean {' or '.join(names)}?" if names else ""
