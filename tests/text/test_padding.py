"""The mask comes from the rows' lengths: ids that look like padding stay counted."""

from __future__ import annotations

from tlcr.text.padding import pad_right


def test_rows_become_a_rectangle_whose_mask_ignores_the_ids():
    ids_BL, mask_BL = pad_right([(5, 0, 0), (7,), ()], pad_token_id=0)
    assert ids_BL.tolist() == [[5, 0, 0], [7, 0, 0], [0, 0, 0]]
    assert mask_BL.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
