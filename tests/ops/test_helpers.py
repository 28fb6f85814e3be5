"""The checks of the other tests are able to fail."""

import pytest
import torch

from tests.ops.helpers import INF, NAN, assert_close, assert_no_worse_than_reference, strided


@pytest.mark.parametrize("wrong", [[1.0, 2.001], [1.0, NAN], [1.0, INF], [2.0, 1.0], [1.0]])
def test_assert_close_fails(wrong: list[float]) -> None:
    assert_close(torch.tensor([1.0, 2.0]), [1.0, 2.0])
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(wrong), [1.0, 2.0])


def test_assert_close_wants_the_same_infinity() -> None:
    assert_close(torch.tensor([INF, 1.0]), [INF, 1.0])
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([-INF, 1.0]), [INF, 1.0])


def test_assert_no_worse_than_reference_fails() -> None:
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = truth.float() + 1e-6
    assert_no_worse_than_reference(truth.float() - 1e-6, plain, truth)
    with pytest.raises(AssertionError):
        assert_no_worse_than_reference(truth.float() - 4e-6, plain, truth)
    with pytest.raises(AssertionError):
        assert_no_worse_than_reference(torch.tensor([1.0, NAN]), plain, truth)


def test_strided_keeps_values_and_is_not_contiguous() -> None:
    tensor = torch.randn(2, 3, 5)
    assert torch.equal(strided(tensor), tensor)
    assert not strided(tensor).is_contiguous()


def test_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(2).isnan().all()
    assert torch.empty_like(torch.zeros(2)).isnan().all()
