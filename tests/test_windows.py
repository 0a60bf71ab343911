"""Which tokens are scored with which context, on lists written by hand and for all small texts."""

import pytest

from fairseq_alibi.evaluation.windows import Window, batches, windows


def test_blocks_do_not_overlap():
    assert list(windows(10, 4, 4)) == [Window(0, 0, 4), Window(4, 4, 8), Window(8, 8, 10)]
    assert list(windows(8, 4, 4)) == [Window(0, 0, 4), Window(4, 4, 8)]


def test_sliding_window_scores_its_last_tokens():
    """The first window scores all that it holds, the last one what is left."""
    assert list(windows(11, 4, 2)) == [
        Window(0, 0, 4),
        Window(2, 4, 6),
        Window(4, 6, 8),
        Window(6, 8, 10),
        Window(8, 10, 11),
    ]
    assert list(windows(7, 4, 1)) == [Window(0, 0, 4), Window(1, 4, 5), Window(2, 5, 6), Window(3, 6, 7)]


def test_stride_that_does_not_divide_the_length():
    """fairseq's blocks of 3 tokens reach back by up to 5: 0-2, 3-5 with all three before, 6-8 with five of six."""
    assert list(windows(13, 8, 3)) == [Window(0, 0, 6), Window(1, 6, 9), Window(4, 9, 12), Window(7, 12, 13)]
    assert list(windows(9, 5, 3)) == [Window(0, 0, 3), Window(1, 3, 6), Window(4, 6, 9)]


def test_short_texts():
    assert list(windows(0, 4, 2)) == []
    assert list(windows(1, 4, 2)) == [Window(0, 0, 1)]
    assert list(windows(3, 4, 4)) == [Window(0, 0, 3)]


def test_every_token_is_scored_once_in_order_with_the_context_it_should_have():
    for tokens in range(15):
        for length in range(1, 9):
            for stride in range(1, length + 1):
                cut = list(windows(tokens, length, stride))
                assert [n for w in cut for n in range(w.scored, w.end)] == list(range(tokens))
                for w in cut:
                    assert 0 <= w.begin <= w.scored < w.end <= tokens
                    assert w.end - w.begin <= length
                    for n in range(w.scored, w.end):  # as fairseq cuts: blocks of a stride, and what lies before them
                        assert w.begin == max(0, n // stride * stride - (length - stride))


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (4, 0), (-1, 1), (4, 5)])
def test_impossible_windows_are_refused(length, stride):
    with pytest.raises(ValueError, match=rf"{stride}"):
        list(windows(10, length, stride))


def test_batches_hold_windows_of_one_shape():
    cut = list(windows(22, 4, 2))
    found = list(batches(iter(cut), 12))
    assert [window for batch in found for window in batch] == cut
    assert [len(batch) for batch in found] == [1, 3, 3, 3], "the first window scores more than the others"
    assert all(len({window.shape for window in batch}) == 1 for batch in found)
    assert [len(batch) for batch in batches(windows(7, 4, 4), 2)] == [1, 1], "never less than one window"
