"""Tensors without data: what they say of themselves, and when their storage ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.measure.outline import Outline, OutlineStorage, geometry, is_outline, outline
from lowmem.simulate import OutlineMode


class _Ends:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def outline_gone(self, storage: OutlineStorage) -> None:
        self.sizes.append(storage.nbytes)


def _counted(tensor: torch.Tensor) -> _Ends:
    assert isinstance(tensor, Outline)
    ends = _Ends()
    tensor._outline_storage.counter = ends
    return ends


def test_it_says_what_it_is() -> None:
    made = outline(geometry((2, 3), (1, 2), 4, torch.bfloat16), OutlineStorage(20))
    assert (made.shape, made.stride(), made.storage_offset(), made.dtype) == ((2, 3), (1, 2), 4, torch.bfloat16)
    assert (made.device.type, made.nbytes, made.is_contiguous()) == ("cpu", 12, False)
    assert is_outline(made)
    assert not is_outline(torch.empty(2))
    assert repr(made) == "Outline([2, 3], torch.bfloat16)"


def test_equal_geometries_are_one_object() -> None:
    one = geometry((2, 3), (3, 1), 0, torch.float32)
    assert geometry((2, 3), (3, 1), 0, torch.float32) is one
    assert geometry((2, 3), (3, 1), 1, torch.float32) is not one
    assert (one.nbytes, one.storage_bytes) == (24, 24)
    assert geometry((2, 3), (0, 1), 2, torch.float32).storage_bytes == 20


def test_nothing_can_be_computed_outside_of_the_mode() -> None:
    with OutlineMode():
        x = torch.empty(2)
    with pytest.raises(RuntimeError, match="outside of an OutlineMode"):
        x + 1


def test_a_storage_ends_with_its_last_view() -> None:
    with OutlineMode():
        x = torch.empty(4, 4)
        ends = _counted(x)
        part = x[1:].t()
        del x
        assert not ends.sizes
        del part
        assert ends.sizes == [64]


def test_what_autograd_has_saved_lives_as_long_as_the_graph() -> None:
    """The tensor's Python object dies and comes back; its storage stays."""
    with OutlineMode():
        leaf = nn.Parameter(torch.empty(8))
        x = leaf * 2
        ends = _counted(x)
        y = (x * x).sum()
        del x
        assert not ends.sizes
        y.backward()
        assert ends.sizes == [32]  # the graph's tensors go with the backward pass
        assert leaf.grad is not None
        assert is_outline(leaf.grad)


def test_a_result_that_is_saved_shares_the_storage() -> None:
    with OutlineMode():
        x = torch.empty(8, requires_grad=True)
        y = torch.relu(x)  # saved for its own backward
        ends = _counted(y)
        z = y.sum()
        del y
        assert not ends.sizes
        del z
        assert ends.sizes == [32]


def test_a_parameter_without_data_is_a_parameter() -> None:
    with OutlineMode():
        layer = nn.Linear(3, 4)
    assert all(is_outline(parameter) and isinstance(parameter, nn.Parameter) for parameter in layer.parameters())
