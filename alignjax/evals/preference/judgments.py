"""Files of judgments of responses, and the blinded sheets that people fill in.

A file of judgments is JSON lines (gzip too), each of them one

  a comparison   {"prompt_id", "a", "b", "choice", "labeler_id"}: a and b are policies; choice is
                 "a", "b", "tie", or the probability that a is better. Optional, where the responses
                 are not ours: "response_a", "response_b", whose lengths are reported then, and
                 "prompt", so that other judges can be asked too
  a ranking      {"prompt_id", "ranking": {policy: rank}, "labeler_id"}: the lowest number is the
                 best, equal numbers are a tie; or a record of comparisons with its policies named,
                 {"prompt", "responses", "ranks", "policies", "labeler_id"}. A ranking of K policies
                 is a comparison of each of the K(K - 1)/2 pairs. Optional: "responses": {policy:
                 text}, "prompt"
  a rating       {"prompt_id", "policy", "likert", "flags", "labeler_id"}: the overall quality from
                 1 to 7 and the metadata of the paper's Table 3, either of them or both; flags is a
                 list of those that apply (judgment_rows.FLAGS), or {flag: true or false}
  a sheet's row  as `export` writes it, with "choice" 1, 2 or "tie" (null: not judged yet), and, if
                 they were asked for, "likert_1", "likert_2", "flags_1", "flags_2"

A policy may have several responses to a prompt, where the judgments name their texts. labeler_id
may be left out: then it is the name of the file, as where every labeler fills in a sheet of his
own. prompt_id may be left out where "prompt" is there: then it is made of it.
"""

from __future__ import annotations

import glob
import itertools
import json
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from alignjax.data import mappings
from alignjax.evals.preference import judgment_rows as rows
from alignjax.evals.preference import verdicts
from alignjax.evals.preference.judgment_rows import prompt_id
from alignjax.evals.preference.verdicts import Judged, Pair, Rating, Verdict
from alignjax.runtime import files, textfiles


def export(pairs: Sequence[Pair], path: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """Writes a blinded sheet for people, with the pairs and the two sides of each pair in random
  order. Returns the path of its key, a file beside the sheet that records which policies they are.
  An existing sheet is never overwritten, because somebody may have filled it in."""
  path = files.folder(path)
  key = path.with_suffix('.key.json')
  for existing in (path, key):
    if existing.exists():
      raise ValueError(
        f'--export={path}: {existing} is there already, perhaps with judgments in it; choose '
        f'another name.'
      )
  rng = np.random.default_rng(seed)
  items, lines = {}, []
  for number, index in enumerate(rng.permutation(len(pairs)), 1):
    pair = pairs[index]
    sides = [(pair.a, pair.response_a.text), (pair.b, pair.response_b.text)]
    first, second = sides if rng.random() < 0.5 else sides[::-1]
    items[str(number)] = {'prompt_id': pair.record['prompt_id'], '1': first[0], '2': second[0]}
    lines.append(
      json.dumps(
        dict(
          item=number,
          prompt=pair.record['prompt'],
          response_1=first[1],
          response_2=second[1],
          choice=None,
          likert_1=None,
          likert_2=None,
          flags_1=None,
          flags_2=None,
        ),
        ensure_ascii=False,
      )
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(key, json.dumps(items, indent=1))
  files.write(path, '\n'.join(lines) + '\n')
  return key


def read(
  pattern: str,
  *,
  judge: str,
  mapping: str | None = None,
  policies: Collection[str] | None = None,
  prompts: Collection[str] | None = None,
  key: str | None = None,
  into: Judged | None = None,
) -> Judged:
  """Reads people's judgments from one file, or from several if the pattern has a `*`.

  Responses of one policy to one prompt may differ between the judgments of a file, where `prompts`
  is None (verdicts.add).

  Args:
    pattern: the path of the file, or a pattern.
    judge: the name of the judge in the verdicts.
    mapping: converts their records to the rows above. It is a function of this file,
      'module:function' or 'ours=theirs,...'.
    policies: the policy names that may occur. None allows any.
    prompts: the prompt ids that may occur. None allows any.
    key: the key of a sheet. None means SHEET.key.json beside the sheet.
    into: judgments that were read before (verdicts.empty), to which these are added.
  """
  pattern = str(files.folder(pattern))
  paths = (
    sorted(p for p in glob.glob(pattern) if not p.endswith('.key.json'))
    if '*' in pattern
    else [pattern]
  )
  if not paths:
    raise FileNotFoundError(f'--judge=file:{pattern}: there are no such files.')
  # In data/mappings.py, the mapping of this name makes comparisons.
  change = pandalm if mapping == 'pandalm' else mappings.find(mapping, '--judge_mapping')
  judged, waiting = verdicts.empty() if into is None else into, 0
  before = len(judged.verdicts)
  for path in paths:
    labeler = pathlib.Path(path.removesuffix('.gz')).stem
    sheet = None
    for where, row in _rows(path, change):
      if 'item' in row:
        sheet = _key(path, key) if sheet is None else sheet
      made = _judgments(row, where, judge, labeler, sheet)
      waiting += made is None
      for verdict in made.verdicts if made else ():
        _known(where, verdict.prompt_id, (verdict.a, verdict.b), policies, prompts)
        if verdict.a == verdict.b:
          raise ValueError(f'{where}: the judgment compares {verdict.a!r} with itself.')
      for rating in made.ratings if made else ():
        _known(where, rating.prompt_id, (rating.policy,), policies, prompts)
      if made:
        verdicts.add(judged, made, where, repeated=prompts is None)
  if waiting:
    judged.notes.append(f'{judge}: {waiting} rows are not judged yet')
  if len(judged.verdicts) == before:
    raise ValueError(
      f'--judge=file:{pattern} holds no comparison'
      + (f'; {waiting} rows are not judged yet.' if waiting else '.')
    )
  return judged


def pandalm(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Maps WeOpenML/PandaLM's test set: the answers of two models and the choices (1, 2, 0 = tie) of
  three annotators."""
  a, b = raw['cmp_key'].split('_')
  # Some answers are booleans.
  texts = dict(response_a=str(raw['response1']), response_b=str(raw['response2']))
  prompt = f'{raw["instruction"]}\n\n{raw["input"]}'.strip()
  choices = {1: 'a', 2: 'b', 0: 'tie'}
  return [
    dict(
      prompt_id=prompt_id(prompt),
      prompt=prompt,
      a=a,
      b=b,
      choice=choices[int(raw[f'annotator{n}'])],
      labeler_id=f'annotator{n}',
      **texts,
    )
    for n in (1, 2, 3)
  ]


def _rows(path: str, change: Callable | None) -> Iterable[tuple[str, dict]]:
  for where, raw in textfiles.Records(textfiles.read(path, '--judge=file:'), path):
    if not isinstance(raw, dict):
      raise ValueError(f'{where}: a judgment must be an object, not {textfiles.kind(raw)}.')
    yield from ((where, row) for row in mappings.apply(change, raw, where, '--judge_mapping'))


def _key(path: str, key: str | None) -> dict[str, dict[str, str]]:
  found = (
    files.folder(key) if key else files.folder(path.removesuffix('.gz')).with_suffix('.key.json')
  )
  if not found.exists():
    raise FileNotFoundError(
      f'{path} is a blinded sheet; its key {found} is not there. Name it: --judge_key=FILE.'
    )
  made = textfiles.parse(textfiles.read(found), str(found))

  def whole(item):
    return isinstance(item, dict) and all(
      isinstance(item.get(k), str) for k in ('prompt_id', '1', '2')
    )

  if not isinstance(made, dict) or not all(map(whole, made.values())):
    raise ValueError(
      f'{found} is not a sheet key: {{item: {{"prompt_id", "1", "2"}}}}, as --export writes it.'
    )
  return made


def _judgments(
  row: Mapping[str, Any], where: str, judge: str, labeler: str, sheet: Mapping | None
) -> Judged | None:
  """Returns the judgments of a row, or None if it is not judged yet."""
  labeler = str(
    labeler if row.get('labeler_id') in (None, '') else rows.name(row, 'labeler_id', where)
  )
  if 'item' in row:
    return _of_sheet(row, where, judge, labeler, sheet)
  if 'ranking' in row or 'ranks' in row:
    return _of_ranking(row, where, judge, labeler)
  required = ('policy',) if 'policy' in row else ('a', 'b', 'choice')
  missing = [k for k in required if k not in row] + ['prompt_id'] * (
    'prompt_id' not in row and 'prompt' not in row
  )
  if missing:
    raise ValueError(
      f'{where} lacks {", ".join(missing)}; a comparison has prompt_id, a, b and choice, a '
      f'ranking prompt_id and '
      f'ranking, a rating prompt_id, policy and likert or flags; this has {sorted(row)}. Others: '
      f'--judge_mapping.'
    )
  name = rows.prompt_name(row, where)
  if 'policy' in row:
    rating = Rating(
      name,
      rows.text(row, 'policy', where),
      judge,
      labeler,
      rows.likert(row.get('likert'), where),
      rows.flags(row.get('flags'), where),
    )
    if rating.likert is None and not rating.flags:
      raise ValueError(f'{where}: a rating has "likert" or "flags".')
    return Judged([], [rating])
  a, b = rows.text(row, 'a', where), rows.text(row, 'b', where)
  texts = {
    (name, row[side]): rows.text(row, f'response_{side}', where)
    for side in 'ab'
    if row.get(f'response_{side}') is not None
  }
  return Judged(
    [Verdict(name, a, b, rows.probability(row['choice'], where), judge, labeler)],
    [],
    texts,
    _prompt(row, name),
  )


def _of_sheet(
  row: Mapping[str, Any], where: str, judge: str, labeler: str, sheet: Mapping
) -> Judged | None:
  """Returns the judgments of a row of a blinded sheet, with its policies from the key."""
  item = sheet.get(str(row['item']))
  if item is None:
    raise ValueError(f'{where}: the key has no item {row["item"]!r}.')
  ratings = [
    Rating(
      item['prompt_id'],
      item[side],
      judge,
      labeler,
      rows.likert(row.get(f'likert_{side}'), where),
      rows.flags(row.get(f'flags_{side}'), where),
    )
    for side in '12'
  ]
  ratings = [r for r in ratings if r.likert is not None or r.flags]
  texts = {
    (item['prompt_id'], item[side]): rows.text(row, f'response_{side}', where)
    for side in '12'
    if f'response_{side}' in row
  }
  choice, prompts = row.get('choice'), _prompt(row, item['prompt_id'])
  if choice is None:
    return Judged([], ratings, texts, prompts) if ratings else None
  values = {'1': 1.0, '2': 0.0, 'tie': 0.5}
  if str(choice) not in values:
    raise ValueError(f'{where}: "choice" of a sheet is 1, 2 or "tie", not {choice!r}.')
  return Judged(
    [Verdict(item['prompt_id'], item['1'], item['2'], values[str(choice)], judge, labeler, 'a')],
    ratings,
    texts,
    prompts,
  )


def _of_ranking(row: Mapping[str, Any], where: str, judge: str, labeler: str) -> Judged | None:
  """Converts a labeler's ranking of K policies to one verdict on each of its pairs."""
  found, name = rows.ranking(row, where), rows.prompt_name(row, where)
  if found is None:
    return None
  ranks, responses = found
  made = [
    Verdict(name, a, b, 0.5 + 0.5 * ((ranks[a] < ranks[b]) - (ranks[a] > ranks[b])), judge, labeler)
    for a, b in itertools.combinations(ranks, 2)
  ]
  return Judged(
    made, [], {(name, policy): text for policy, text in responses.items()}, _prompt(row, name)
  )


def _prompt(row: Mapping[str, Any], name: str) -> dict[str, Any]:
  return {name: row['prompt']} if isinstance(row.get('prompt'), (str, list)) else {}


def _known(
  where: str,
  name: str,
  policies: Sequence[str],
  known: Collection[str] | None,
  prompts: Collection[str] | None,
) -> None:
  for policy in policies:
    if known is not None and policy not in known:
      raise ValueError(
        f'{where}: the policy {policy!r} is none of --policies ({", ".join(known)}).'
      )
  if prompts is not None and name not in prompts:
    raise ValueError(
      f'{where}: the prompt {name!r} is none of the {len(prompts)} prompts of --prompts (with '
      f'this --limit and --seed).'
    )
