"""Text views of an example: choose a caption, vary its words (EDA), mask its tokens (masked language modelling).

The `rng` of the example is the only source of randomness, so a text view depends only on seed and position, not on the
worker.
"""

from collections.abc import Callable, Sequence
import functools
import gzip
import math
import pathlib
from typing import NamedTuple

import numpy as np

from declip_jax.data.text import tokenizer as tokenizers

# English words that carry grammar rather than content: determiners and pronouns; prepositions and conjunctions;
# auxiliary verbs; adverbs and the remains of contractions. WordNet knows many of them as something else: `a` as a
# vitamin, `in` as a metal, `who` as an organization. The reference uses NLTK's list, and only on lower-case words.
_FUNCTION_WORDS = """
  a an the this that these those some any each every all both few many more most much other another such own same
  i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
  herself it its itself they them their theirs themselves one who whom whose which what

  about above across after against along among around as at before behind below beneath beside between beyond by down
  during for from in inside into like near of off on onto out outside over past per since through to toward towards
  under until up upon via with within without and but or nor so yet if because while although though than then

  am is are was were be been being do does did doing have has had having can could may might must shall should will
  would

  again further once here there when where why how no not only very too just now s t d m o y ll re ve don
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())

# WordNet's rules for removing endings (morphy(7WN)): ending, replacement.
# fmt: off
_ENDINGS = {
  "noun": (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
           ("men", "man"), ("ies", "y")),
  "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
  "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
  "adv": (),
}
# fmt: on


class MaskedText(NamedTuple):
  """A caption with masked tokens, and the original ids. Unused slots have position, target and weight 0.

  Attributes:
    tokens: int32 `[t]` token ids of the masked caption.
    position: int32 `[k]` selected positions, ascending.
    target: int32 `[k]` original ids at these positions.
    weight: float32 `[k]` 1 for a selected position, 0 for an unused slot.
  """

  tokens: np.ndarray
  position: np.ndarray
  target: np.ndarray
  weight: np.ndarray


def choose_caption(captions: Sequence[str], rng: np.random.Generator, weights: Sequence[float] = ()) -> str:
  """Draws one of the captions that are not blank.

  Args:
    captions: captions of the example.
    rng: generator of the example.
    weights: weights of the first caption, the second and so on; 0 for further ones. () means equal weights. DeCLIP's
      code always uses the first caption, which is (1,). If all weights of captions that are not blank are 0, they are
      equally likely.

  Raises:
    ValueError: there is no caption.
  """
  written = [place for place, caption in enumerate(captions) if caption.strip()]
  if not written:
    raise ValueError(f"no caption: {captions!r} contains no text")
  chances = np.array([weights[place] if place < len(weights) else 0.0 for place in written])
  if not chances.any():
    return captions[written[rng.integers(len(written))]]
  return captions[written[int(rng.choice(len(written), p=chances / chances.sum()))]]


@functools.cache
def _wordnet() -> dict[str, dict[str, str]]:
  """Reads the table made by `tools/build_synonyms.py`, once per process, in 0.1 s."""
  tables: dict[str, dict[str, str]] = {}
  with gzip.open(pathlib.Path(__file__).with_name("synonyms.txt.gz"), "rt", encoding="ascii") as file:
    for line in file:
      if not line.startswith("#"):
        table, word, values = line.rstrip("\n").split("\t")
        tables.setdefault(table, {})[word] = values
  return tables


def _base_forms(word: str, speech: str) -> list[str]:
  """Returns the lemmas of a part of speech of which a lower-case word may be a form, possibly the word itself."""
  lemmas, irregular = _wordnet()[speech], _wordnet()[f"{speech}.exc"]
  if word in irregular:
    forms = [word, *irregular[word].split(",")]
  else:
    forms = [word, *(word.removesuffix(end) + new for end, new in _ENDINGS[speech] if word.endswith(end))]
  return [form for form in forms if form in lemmas]


@functools.lru_cache(maxsize=2**14)
def find_synonyms(word: str) -> tuple[str, ...]:
  """Returns WordNet's synonyms of a word in any inflection, sorted; empty if it has none.

  They are the lemmas of all synsets of all parts of speech, in lower case, `a` to `z` and spaces (a lemma may be two
  words). They equal those of NLTK's `wordnet.synsets`, which the reference uses, except that case is ignored: there,
  `dog` is a synonym of `Dog`. In both, a word with punctuation attached has none.
  """
  word = word.lower()
  found = {
    synonym
    for speech in _ENDINGS
    for base in _base_forms(word, speech)
    for synonym in _wordnet()[speech][base].split(",")
  }
  return tuple(sorted(found - {word}))


def replace_synonyms(words: Sequence[str], rng: np.random.Generator, n: int = 1) -> list[str]:
  """Replaces `n` of the words, or all that have synonyms if these are fewer, each in all its occurrences.

  Stop words are kept. A synonym that consists of two words is one string with a space.
  """
  candidates = [word for word in dict.fromkeys(words) if word.lower() not in STOP_WORDS]
  chosen: dict[str, str] = {}
  for i in rng.permutation(len(candidates)):
    if len(chosen) == n:
      break
    if synonyms := find_synonyms(candidates[i]):
      chosen[candidates[i]] = synonyms[rng.integers(len(synonyms))]
  return [chosen.get(word, word) for word in words]


def insert_synonyms(words: Sequence[str], rng: np.random.Generator, n: int = 1) -> list[str]:
  """Inserts `n` synonyms of random words, not stop words, at random positions.

  If no word has a synonym, nothing changes. A synonym of two words is one string with a space.
  """
  new = list(words)
  known = [word for word in words if word.lower() not in STOP_WORDS]
  for _ in range(n):
    for i in rng.permutation(len(known)):
      if synonyms := find_synonyms(known[i]):
        new.insert(int(rng.integers(len(new) + 1)), synonyms[rng.integers(len(synonyms))])
        break
  return new


def swap_words(words: Sequence[str], rng: np.random.Generator) -> list[str]:
  """Swaps two of the words at different positions; fewer than two are returned unchanged.

  The reference draws both positions independently, up to three times, so it sometimes leaves short captions unchanged.
  """
  words = list(words)
  if len(words) > 1:
    i, j = rng.integers(len(words)), rng.integers(len(words) - 1)
    j += j >= i
    words[i], words[j] = words[j], words[i]
  return words


def delete_words(words: Sequence[str], rng: np.random.Generator, p: float = 0.1) -> list[str]:
  """Deletes each word with probability `p`; if all would be deleted, one random word remains."""
  if not words:
    return []
  kept = [word for word, chance in zip(words, rng.random(len(words)), strict=True) if chance >= p]
  return kept or [words[rng.integers(len(words))]]


# What `data.recipes.Recipe.text_operations` may name.
OPERATIONS: dict[str, Callable[[Sequence[str], np.random.Generator], list[str]]] = {
  "replace": replace_synonyms,
  "insert": insert_synonyms,
  "swap": swap_words,
  "delete": delete_words,
}


class AugmentedText(NamedTuple):
  """A varied caption, and the name of the operation in `OPERATIONS`, "" for none."""

  text: str
  operation: str


def augment(
  text: str, rng: np.random.Generator, operations: Sequence[str] = ("replace", "swap", "delete")
) -> AugmentedText:
  """Varies a caption by one operation of EDA, drawn with equal probability; blank text becomes the empty string.

  Words are separated by white space. The time is linear in the length of the text.

  Easy Data Augmentation (Wei and Zou, 2019, arXiv:1901.11196); by default without its random insertion, as in DeCLIP
  (Li et al., 2021, arXiv:2110.05208). DeCLIP's code draws from one global generator, which every process seeds with 1;
  we draw from the `rng` of the example.

  Args:
    text: a caption.
    rng: generator of the example.
    operations: names in `OPERATIONS`; without any, the words are kept.
  """
  words = text.split()
  operation = operations[rng.integers(len(operations))] if operations else ""
  return AugmentedText(" ".join(OPERATIONS[operation](words, rng) if operation else words), operation)


def mlm_slots(context_length: int = 77, probability: float = 0.15) -> int:
  """Returns `k`, the number of slots for masked positions of a caption: 20 for the defaults.

  The number of selected tokens in a caption that fills the context is binomial; the bound is its mean plus three
  standard deviations. A caption of 75 tokens exceeds it once in 360 times, one of 38 once in 10^8.
  """
  n = context_length - 2
  return min(n, math.floor(n * probability + 3 * math.sqrt(n * probability * (1 - probability))))


def mask_tokens(
  row: np.ndarray,
  rng: np.random.Generator,
  tokenizer: tokenizers.Tokenizer,
  *,
  slots: int,
  probability: float = 0.15,
  whole_words: bool = False,
) -> MaskedText:
  """Masks a tokenized caption for masked language modelling (BERT: Devlin et al., 2018, arXiv:1810.04805, section 3.1).

  Each token between start and end of text is selected with `probability`. Of the selected tokens, 80 % become the
  mask, 10 % a random ordinary id, and 10 % do not change. If more than `slots` are selected, a random `slots` of them
  count and the others remain unmasked, so that the loss covers every masked position. A caption may have none.

  The reference draws random ids from the whole vocabulary, in which one in 50,000 is an end of text that truncates the
  caption.

  Args:
    row: int32 `[t]` token ids of `tokenizer`, not modified.
    rng: generator of the example.
    tokenizer: the tokenizer, for its special ids.
    slots: `k`, the number of slots for selected positions; see `mlm_slots`.
    probability: the probability with which a token is selected.
    whole_words: whether whole words are selected, as in BERT's models of May 2019. If more words are selected than fit
      into `slots`, random ones of them count; a word longer than `slots` never does.

  Raises:
    ValueError: the row contains no end of text.
  """
  tokens = np.array(row, np.int32)
  ends = np.flatnonzero(tokens == tokenizer.eot)
  if not ends.size:
    raise ValueError(f"the row {tokens.tolist()} contains no end of text, id {tokenizer.eot}")
  first, end = len(tokenizer.starts), ends[0]
  if whole_words:
    selected = first + _words_within(tokenizer.word_numbers(tokens[first:end]), rng, slots, probability)
  else:
    selected = first + np.flatnonzero(rng.random(end - first) < probability)
    if len(selected) > slots:
      selected = np.sort(rng.choice(selected, slots, replace=False))
  k = len(selected)
  position, target, weight = np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.zeros(slots, np.float32)
  position[:k], target[:k], weight[:k] = selected, tokens[selected], 1
  fate = rng.random(k)
  random_ids = tokenizer.random_ids(rng, k)
  tokens[selected] = np.where(fate < 0.8, tokenizer.mask, np.where(fate < 0.9, random_ids, tokens[selected]))
  return MaskedText(tokens, position, target, weight)


def _words_within(words: np.ndarray, rng: np.random.Generator, slots: int, probability: float) -> np.ndarray:
  """The ascending positions of the tokens of random words, at most `slots`; `words` has the word number of each."""
  lengths = np.bincount(words)
  chosen = rng.permutation(np.flatnonzero((rng.random(len(lengths)) < probability) & (lengths <= slots)))
  chosen = chosen[np.cumsum(lengths[chosen]) <= slots]
  return np.flatnonzero(np.isin(words, chosen))
