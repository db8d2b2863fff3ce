from __future__ import annotations

import torch

from lowmem.measure.tensors import TensorMeter


def test_storages_are_counted_once_and_until_their_end() -> None:
    meter = TensorMeter()
    before = torch.zeros(1000)
    meter.adopt([before])
    with meter:
        a = torch.zeros(500)
        b = a.view(5, 100)[2:]
        assert meter.live_bytes == 6000
        c = torch.ones(250)
        del a
        assert meter.live_bytes == 7000  # the view keeps the storage
        del b, c
    assert meter.live_bytes == 4000
    assert meter.peak_bytes == 7000


def test_it_changes_no_bits() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    plain = layer(x)
    with TensorMeter() as meter:
        metered = layer(x)
    assert torch.equal(plain, metered)
    assert meter.peak_bytes >= metered.numel() * 4
