"""Suggestions for unknown names, and counts and lists in words."""

from collections.abc import Collection, Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches

_MARGIN = 0.05  # of similarity, 0 to 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns "; did you mean ...?" with the `known` names that are close to `name`, or an empty string."""
  return suggest(close_names(name, known))


def close_names(name: str, known: Iterable[str]) -> list[str]:
  """Returns up to three of the `known` names that are close to `name`, ignoring case, the closest first.

  Names that are much less close than the closest one are left out.
  """
  lower = {other.lower(): other for other in known}
  matches = get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
  ratios = [SequenceMatcher(None, match, name.lower()).ratio() for match in matches]
  return [lower[match] for match, ratio in zip(matches, ratios, strict=True) if ratio > ratios[0] - _MARGIN]


def counted(number: int, noun: str) -> str:
  """A number with its noun, such as "1 sample" or "2,000 samples"; the plural of the noun ends in s."""
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(items: Sequence[str]) -> str:
  """Several items in words, such as "a", "a and b" or "a, b and c"."""
  *others, last = items
  return f"{', '.join(others)} and {last}" if others else last


def suggest(names: Collection[str]) -> str:
  """Returns "; did you mean ...?" with all `names`, or an empty string if there are none."""
  return f"; did you mean {' or '.join(names)}?" if names else ""
