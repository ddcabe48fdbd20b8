"""Batches that are filled up, and records that are cut to length, by hand."""

import numpy as np
import pytest

from alignjax.data import batches, encode
from alignjax.types import TokenBatch


@pytest.mark.parametrize('size', [3, 4, 5])
def test_a_batch_is_filled_up_with_its_first_row_of_weight_0(size):
  """A full batch keeps its weights; a filled one has exactly `size` rows and the same sum of
  weights."""
  tokens = np.arange(6).reshape(3, 2)
  out = batches.fill(
    TokenBatch(tokens, tokens >= 0, np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])), size
  )
  np.testing.assert_array_equal(
    out.tokens, np.concatenate([tokens, [[0, 1]] * (size - 3)]) if size > 3 else tokens
  )
  np.testing.assert_array_equal(out.weights, [[1, 2], [3, 4], [5, 6], [0, 0], [0, 0]][:size])


def test_truncation_keeps_the_end_of_a_prompt_and_the_start_of_a_response():
  limited = encode.limit_lengths(
    [([1, 2, 3, 4, 5], [[6, 7, 8, 9]]), ([1], [[2]])], 3, 2, 'truncate', 'data.x'
  )
  assert limited.rows == [([3, 4, 5], [[6, 7]]), ([1], [[2]])] and limited.index == [0, 1]
  assert (
    limited.note
    == 'data.x: 1 prompts over 3 tokens and 1 responses over 2 truncated; 2 of 2 records stay'
  )


def test_dropping_leaves_out_a_comparison_that_has_one_response_left():
  far, near = [9, 9, 9], [1, 2]
  rows = [
    ([1], [near, near, far]),
    ([2], [near, far]),
    ([3], [near]),
    ([4], [far]),
    ([5] * 4, [near, near]),
  ]
  limited = encode.limit_lengths(rows, 3, 2, 'drop', 'data.x')
  assert limited.index == [0, 2] and limited.kept == [[0, 1], [0]]
  assert limited.rows == [([1], [near, near]), ([3], [near])]


@pytest.mark.parametrize('too_long', encode.TOO_LONG)
def test_what_just_fits_stays_as_it_is(too_long):
  rows = [([1, 2, 3], [[4, 5], [6, 7]]), ([8, 9, 1], [[2, 3]])]
  limited = encode.limit_lengths(rows, 3, 2, too_long, 'data.x')
  assert limited.rows == rows and limited.kept == [[0, 1], [0]] and limited.note == ''
