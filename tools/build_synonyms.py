"""Rebuilds `synonyms.txt.gz`, the table of synonyms for text augmentation, from WordNet 3.0.

The source is the database as Debian ships it:

    apt-get install wordnet-base
    python tools/build_synonyms.py --wordnet /usr/share/wordnet --output declip_jax/data/text/synonyms.txt.gz

The table is ASCII text. It opens with WordNet's license, each line after `#`. Then every line is
`table<tab>word<tab>values`, values separated by commas. Table `noun` (`verb`, `adj`, `adv`) maps each lemma of one word
to all lemmas of its synsets, itself included; `noun.exc` (...) maps an irregular form to its lemmas, or to itself if
the rules of inflection would give a wrong lemma.
"""

import argparse
from collections.abc import Iterable, Iterator
import gzip
import pathlib
import re

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


def normalize(lemma: str) -> str:
  """Returns a lemma in the form of a caption: lower case, `a` to `z` and spaces only (as EDA does)."""
  return re.sub(r"[^a-z ]", "", re.sub(r"[_-]", " ", lemma.lower()))


def parse_synset(line: str) -> list[str]:
  """Returns the lemmas of one line of `data.<part of speech>`, without the syntactic marker, as `(p)`, of an adjective.

  The line has offset, file number, type, the number of lemmas in hexadecimal, then each lemma followed by its sense id.
  """
  fields = line.split(" ")
  lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
  return [lemma.partition("(")[0] for lemma in lemmas]


def group_synonyms(synsets: Iterable[list[str]]) -> dict[str, list[str]]:
  """Returns, for each lemma of one word, the sorted normalized lemmas of its synsets."""
  groups: dict[str, set[str]] = {}
  for lemmas in synsets:
    for lemma in lemmas:
      if "_" not in lemma:
        groups.setdefault(lemma.lower(), set()).update(map(normalize, lemmas))
  return {lemma: sorted(words - {""}) for lemma, words in groups.items() if words != {""}}


def read_license(path: pathlib.Path) -> list[str]:
  """Returns the license at the head of a WordNet file, where each line starts with two spaces and its number."""
  with path.open(encoding="ascii") as file:
    return [re.sub(r"^ +\d+ ", "", line).rstrip() for line in file if line.startswith("  ")]


def table_rows(wordnet: pathlib.Path) -> Iterator[str]:
  """Yields the rows of the table, sorted, from the folder that holds `data.noun`, `noun.exc` and so on.

  Raises:
    FileNotFoundError: a file of WordNet is missing from the folder.
  """
  for part in PARTS_OF_SPEECH:
    with (wordnet / f"data.{part}").open(encoding="ascii") as file:
      groups = group_synonyms(parse_synset(line) for line in file if not line.startswith("  "))
    for lemma, synonyms in sorted(groups.items()):
      yield f"{part}\t{lemma}\t{','.join(synonyms)}"
    for line in sorted((wordnet / f"{part}.exc").read_text(encoding="ascii").splitlines()):
      form, *lemmas = line.split(" ")
      if "_" not in form:
        yield f"{part}.exc\t{form}\t{','.join(lemmas)}"


def write_table(wordnet: pathlib.Path, output: pathlib.Path) -> None:
  """Writes the table; the same WordNet gives the same bytes."""
  head = [f"# {line}".rstrip() for line in read_license(wordnet / "data.noun")]
  text = "\n".join([*head, *table_rows(wordnet), ""])
  output.write_bytes(gzip.compress(text.encode("ascii"), compresslevel=9, mtime=0))


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--wordnet", type=pathlib.Path, default=pathlib.Path("/usr/share/wordnet"), help="WordNet 3.0")
  parser.add_argument("--output", type=pathlib.Path, required=True, help="the table to write, .txt.gz")
  arguments = parser.parse_args()
  write_table(arguments.wordnet, arguments.output)


if __name__ == "__main__":
  main()
