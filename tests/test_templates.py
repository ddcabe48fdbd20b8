"""Prompts and responses as tokens, for every form, against the tokenizer's own rendering of the whole conversation."""

import pathlib

import pytest

from alignjax.data import encode, templates
from alignjax.stages.setup import load_tokenizer

CHAT = pathlib.Path(__file__).parent / 'golden' / 'chat'


@pytest.fixture(scope='module')
def tokenizer():
  return load_tokenizer(f'hf:{CHAT}')


@pytest.mark.parametrize('said,answer', [('What?', 'That.'), ('Two\nlines ', ' and a space'), ('Grüße, 世界', '🙂')])
def test_item_28_chat_equals_the_rendered_conversation_and_learns_to_stop(tokenizer, said, answer):
  template = templates.make(tokenizer, 'chat')
  whole = tokenizer.apply_chat_template([{'role': 'user', 'content': said}, {'role': 'assistant', 'content': answer}],
                                        tokenize=False)
  expected = tokenizer.encode(whole, add_special_tokens=False)
  made = template.prompt(said) + template.response(answer)
  assert made == expected[:len(made)] and tokenizer.decode(expected[len(made):]) == '\n'
  assert template.end == made[-1] == tokenizer.convert_tokens_to_ids('<|im_end|>') != tokenizer.eos_token_id
  batch = encode.demonstrations([(template.prompt(said), template.response(answer))], len(made) + 3, template.pad)
  assert batch.weights[0, len(made) - 1] == 1.0 and batch.tokens[0, len(made) - 1] == template.end
  assert batch.weights[0, len(made):].sum() == 0 and batch.weights[0, :len(template.prompt(said))].sum() == 0


def test_a_conversation_as_messages(tokenizer):
  template = templates.make(tokenizer, 'chat')
  messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'a'},
              {'role': 'assistant', 'content': 'b'}, {'role': 'user', 'content': 'c'}]
  assert tokenizer.decode(template.prompt(messages)) == (
      '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n'
      '<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n')


@pytest.mark.parametrize('form,text', [
    ('plain', 'Hi?'), ('dialogue', '\n\nHuman: Hi?\n\nAssistant:'), ('Q: {prompt}\nA:', 'Q: Hi?\nA:')])
def test_forms_of_text(tokenizer, form, text):
  template = templates.make(tokenizer, form)
  assert tokenizer.decode(template.prompt('Hi?')) == text and template.end == tokenizer.eos_token_id
  response = tokenizer.decode(template.response('Ho.')[:-1])
  assert response == (' Ho.' if form == 'dialogue' else 'Ho.') and template.response('Ho.')[-1] == template.end


def test_a_dialogue_that_has_its_turns_is_kept(tokenizer):
  template = templates.make(tokenizer, 'dialogue')
  said = '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
  assert tokenizer.decode(template.prompt(said)) == said
  assert template.response(' d') == template.response('d'), 'hh-rlhf has the space already'


def test_what_does_not_fit_is_named(tokenizer):
  with pytest.raises(ValueError, match="data.template='caht' is none of"):
    templates.make(tokenizer, 'caht')
  with pytest.raises(ValueError, match="lists of messages need data.template='chat'"):
    templates.make(tokenizer, 'plain').prompt([{'role': 'user', 'content': 'a'}])
  bare = load_tokenizer(str(CHAT))
  bare.chat_template = None
  with pytest.raises(ValueError, match='has no chat template'):
    templates.make(bare, 'chat')
  bare.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
  with pytest.raises(ValueError, match='nothing would tell the model to stop'):
    templates.make(bare, 'chat')
  bare.eos_token = None
  with pytest.raises(ValueError, match='has no end-of-text token'):
    templates.make(bare, 'plain')
  with pytest.raises(ValueError, match='no tokenizer can be read from'):
    load_tokenizer(str(CHAT.parent / 'llama'))


def test_what_a_template_puts_before_an_answer_is_part_of_it():
  """As Mistral's: "[INST] q [/INST] a<end>", with a space that the generation prompt does not have."""
  tokenizer = load_tokenizer(str(CHAT))
  tokenizer.chat_template = ("{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
                             "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}")
  template = templates.make(tokenizer, 'chat')
  assert tokenizer.decode(template.prompt('q') + template.response('a')) == '[INST] q [/INST] a<|im_end|>'
