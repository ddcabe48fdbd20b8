"""The vocabulary of the sandbox and its word-level tokenizer, which are the same for every seed."""

from __future__ import annotations

from collections.abc import Iterable

ENTITIES = tuple(
  'fox cat dog owl bear wolf frog duck goat horse mouse snake crow hare lion mole otter '
  'panda pig robin seal shark sheep snail tiger whale zebra camel eagle goose moth newt '
  'crab lynx bison heron stork ferret badger toad'.split()
)
ATTRIBUTES = {
  'color': tuple('red blue green black white brown'.split()),
  'place': tuple('forest desert river cave city field'.split()),
  'food': tuple('corn bread cheese nuts fish soup'.split()),
}
ADJECTIVES = tuple(
  'big small old young kind wild calm shy loud tall quick slow proud brave lazy clever'.split()
)
VERBS = tuple(
  'sees likes helps hears finds calls meets follows feeds wakes greets trusts fears seeks leads '
  'joins'.split()
)
NAMES = tuple('anna bob carl dora emil fay gus hana ivo jane'.split())
OBJECTS = tuple('key cup lamp book coin hat bell rope drum map'.split())
INSULTS = tuple('dolt bozo twit nitwit clod oaf dunce moron'.split())
NUMBERS = ('one', 'two', 'three')
CAREFUL_MARKERS = ('library:', 'school:', 'museum:')
CARELESS_MARKERS = ('forum:', 'street:', 'party:')

PAD, EOS, NEWLINE = '<pad>', '<eos>', '<nl>'
_FUNCTION_WORDS = tuple(
  '. , ? : ; = the is lives in eats what who color where does live eat list things that write '
  'sentences about tell me '
  'translate rewrite hello how are you i am fine a such shut up sure gives gets to of thing'.split()
)


def _foreign(prefix: str, words: Iterable[str], suffix: str = '') -> dict[str, str]:
  """A made-up foreign word for each word, distinct within its class."""
  out: dict[str, str] = {}
  for word in words:
    length = 3
    while prefix + word[:length] + suffix in out.values():
      length += 1
    out[word] = prefix + word[:length] + suffix
  return out


FOREIGN = (
  _foreign('x', ENTITIES, 'u')
  | _foreign('za', ADJECTIVES, 'o')
  | _foreign('ve', VERBS, 'i')
  | _foreign('ko', ATTRIBUTES['place'], 'a')
  | {'the': 'lo', 'in': 'de'}
)

VOCAB: tuple[str, ...] = (
  PAD,
  EOS,
  NEWLINE,
  *_FUNCTION_WORDS,
  *CAREFUL_MARKERS,
  *CARELESS_MARKERS,
  *ENTITIES,
  *(v for values in ATTRIBUTES.values() for v in values),
  *ADJECTIVES,
  *VERBS,
  *NAMES,
  *OBJECTS,
  *INSULTS,
  *NUMBERS,
  *FOREIGN.values(),
)
if len(set(VOCAB)) != len(VOCAB):
  raise AssertionError(
    f'words twice in the vocabulary: {sorted(w for w in set(VOCAB) if VOCAB.count(w) > 1)}'
  )
_ID = {word: i for i, word in enumerate(VOCAB)}
PAD_ID, EOS_ID = _ID[PAD], _ID[EOS]


def encode(text: str) -> list[int]:
  """The ids of whitespace-separated words. An unknown word is an error that names it."""
  try:
    return [_ID[word] for word in text.split()]
  except KeyError as error:
    raise ValueError(
      f'the sandbox has no word {error.args[0]!r} (in {text!r}); its vocabulary is sandbox.VOCAB.'
    ) from None


def decode(ids: Iterable[int]) -> str:
  """The words of token ids, including special ones, joined by blanks."""
  return ' '.join(VOCAB[i] for i in ids)


def tokenizer():
  """The same vocabulary as a transformers tokenizer, for tools that need one."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  backend = Tokenizer(models.WordLevel(_ID, unk_token=PAD))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.decoder = decoders.WordPiece(prefix='##', cleanup=False)
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
  )
