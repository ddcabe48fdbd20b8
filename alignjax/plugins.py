"""Functions that the config names: dict(fn='module:name', coefficient=...). This is how losses,
rewards, advantage estimators, optimizers and stages are chosen, ours and a fork's alike. There is
no registry: the name is the import path."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

# Configs and results of earlier versions name functions by where they were then: the module then ->
# the module now.
MOVED_MODULES = {
  'alignjax.evals.bias': 'alignjax.evals.safety.bias',
  'alignjax.evals.public': 'alignjax.evals.public.nlp',
  'alignjax.evals.scorers': 'alignjax.evals.safety.scorers',
  'alignjax.evals.selection': 'alignjax.evals.reward.selection',
  'alignjax.evals.task_functions': 'alignjax.evals.public.task_functions',
  'alignjax.evals.toxicity': 'alignjax.evals.safety.toxicity',
  'alignjax.evals.truthfulness': 'alignjax.evals.safety.truthfulness',
}
MOVED = {
  'alignjax.host:reward': 'alignjax.rewards:host_reward',
  'alignjax.rollout:model_reward': 'alignjax.rewards:model_reward',
}


def current_names(value: Any) -> Any:
  """A config, or any part of one, in which the functions of alignjax have their present names."""
  return _renamed(value, MOVED, MOVED_MODULES)


def earlier_names(value: Any) -> Any:
  """The same with the names that the functions had in version 0.1.0."""
  inverse = [{now: then for then, now in moved.items()} for moved in (MOVED, MOVED_MODULES)]
  return _renamed(value, *inverse)


def _renamed(value: Any, functions: Mapping[str, str], modules: Mapping[str, str]) -> Any:
  if isinstance(value, Mapping):
    return {key: _renamed(child, functions, modules) for key, child in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(_renamed(child, functions, modules) for child in value)
  if not isinstance(value, str) or not value.startswith('alignjax.'):
    return value
  module, colon, function = value.partition(':')
  return functions.get(value) or f'{modules.get(module, module)}{colon}{function}'


def find(name: str, where: str) -> Callable:
  """The function 'module:name'.

  Args:
    name: its name; one of an earlier version is understood too.
    where: the config key, for the error message.

  Raises:
    ValueError: the name has another form, or there is no such module or function.
  """
  module_name, _, attribute = str(current_names(name)).partition(':')
  if not attribute or not all(part.isidentifier() for part in module_name.split('.')):
    raise ValueError(
      f"{where}={name!r} must have the form 'module:function', such as 'alignjax.losses:sft'."
    )
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    raise ValueError(
      f'{where}={name!r}: no module named {error.name!r}; is its folder on PYTHONPATH?'
    ) from error
  if not callable(getattr(module, attribute, None)):
    near = difflib.get_close_matches(attribute, dir(module), 3)
    hint = f'; did you mean {" or ".join(near)}?' if near else '.'
    raise ValueError(f'{where}={name!r}: {module_name} has no function {attribute!r}{hint}')
  return getattr(module, attribute)


def bind(
  spec: Mapping[str, Any],
  where: str,
  given: Iterable[str] = (),
  facts: Mapping[str, Any] = MappingProxyType({}),
) -> Callable:
  """The function of a spec with its coefficients bound, which are its keyword-only arguments.

  An entry that the function does not take is an error here, before anything is compiled. A
  coefficient without effect can therefore not exist.

  Args:
    spec: dict(fn='module:name', **coefficients).
    where: the config key, for error messages.
    given: the names of keyword arguments that the caller will pass itself.
    facts: what the caller knows, such as the stage's samples_per_prompt. A function that has a
      keyword argument of such a name receives the value. In the spec it is an error, because two
      entries could disagree.

  Raises:
    ValueError: an entry is unknown, missing, or passed by the caller.
  """
  if spec is None or 'fn' not in spec:
    raise ValueError(
      f"{where} needs an entry fn='module:function'; it has {sorted(spec or {}) or 'none'}."
    )
  function = find(spec['fn'], f'{where}.fn')
  coefficients = {key: value for key, value in spec.items() if key != 'fn'}
  passed = {*given, *facts}
  for key in coefficients:
    if key in passed:
      value = f', {facts[key]!r} here' if isinstance(facts.get(key), (int, float, str)) else ''
      raise ValueError(
        f'{where}.{key}: the stage passes {key!r} itself{value}, to a function that has a keyword '
        f'argument of that name. Remove this entry.'
      )
  parameters = inspect.signature(function).parameters.values()
  takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
  own = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in passed]
  if not takes_any:
    names = [p.name for p in own]
    for key in coefficients:
      if key not in names:
        near = difflib.get_close_matches(key, names, 1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        raise ValueError(
          f'{where}.{key}: {spec["fn"]} takes {names or "no coefficients"}, not {key!r}.{hint}'
        )
  required = [p.name for p in own if p.default is p.empty and p.name not in coefficients]
  if required:
    raise ValueError(f'{where}: {spec["fn"]} needs {", ".join(required)}.')
  return functools.partial(
    function, **coefficients, **{k: v for k, v in facts.items() if k in keywords(spec['fn'])}
  )


def keywords(name: str) -> list[str]:
  """The names of the keyword-only arguments of the function 'module:name'."""
  parameters = inspect.signature(find(name, name)).parameters.values()
  return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
