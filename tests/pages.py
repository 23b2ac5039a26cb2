"""The pages of the documentation, and what they tell a reader to type."""

from collections.abc import Iterator
from pathlib import Path
import re
import shlex

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md", *sorted(DOCS.rglob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
  """The blocks of code of a page in these languages, "" for none."""
  found = _FENCE.findall(page.read_text())
  return [
    re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, language, code in found if language in languages
  ]


def shell_commands(page: Path) -> Iterator[list[str]]:
  """Yields the words of each command in the blocks of a page that have no language; output has the language `text`.

  Variables have the values that the block gives them, the first of those of a loop. Optional flags of a synopsis,
  [--flag], are there.
  """
  for block in blocks(page, ""):
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
      yield from _commands(re.sub(r"\[(--[^\]]+)\]", r"\1", line), variables)


def inline_commands(page: Path, programs: tuple[str, ...]) -> Iterator[list[str]]:
  """Yields the words of each command of these programs that is within the text of a page."""
  for found in _INLINE.findall(_FENCE.sub("", page.read_text())):
    text = found.replace("\n", " ")
    if re.match(rf"(?:{'|'.join(programs)}) |benchmarks/\w+\.py ", text):
      yield from _commands(text, {})


def _commands(line: str, variables: dict[str, str]) -> Iterator[list[str]]:
  """Yields the commands of a line; changes the variables that it sets."""
  lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
  lexer.whitespace_split = True
  words: list[str] = []
  for word in [*lexer, ";"]:
    if not word or not set(word) <= set("();<>|&"):
      for name, value in variables.items():
        word = re.sub(rf"\${name}\b", lambda _, value=value: value, word)
      words.append(word)
      continue
    while words and (words[0] == "do" or _ASSIGNMENT.fullmatch(words[0])):
      if set_ := _ASSIGNMENT.fullmatch(words.pop(0)):
        variables[set_[1]] = set_[2]
    if words[:1] == ["for"]:
      variables[words[1]] = words[3]
    elif words and words != ["done"]:
      yield words
    words = []
