"""The timeline of gradients on their way: against sums done by hand, limits, and a clock that ticks."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks.scaling_model import (
    ETHERNET_1G,
    ETHERNET_10G,
    Link,
    Message,
    desktop_link,
    exchange,
    pack,
    server_link,
)
from lowmem.core.units import KIB, MIB
from lowmem.distributed.reducer import ALONE_BYTES, PACK_BYTES

SECOND_A_BYTE = Link(name="slow", bytes_per_second=1.0, latency_seconds=0.0)  # with two processes


def link(bytes_per_second: float, latency_seconds: float = 0.0) -> Link:
    return Link(name="some", bytes_per_second=bytes_per_second, latency_seconds=latency_seconds)


def sent(*sizes: tuple[int, int]) -> list[Message]:
    """(stage, bytes)."""
    return [Message(stage=stage, size_bytes=size, packed=False) for stage, size in sizes]


def test_a_ring() -> None:
    one = link(1e6, 0.5)
    assert one.all_reduce_seconds(8_000_000, 2) == 8 + 2 * 0.5
    assert one.all_reduce_seconds(8_000_000, 4) == 12 + 6 * 0.5
    assert one.all_reduce_seconds(8_000_000, 1) == 0
    assert link(math.inf).all_reduce_seconds(8_000_000, 8) == 0


@pytest.mark.parametrize(
    ("bandwidth", "latency"), [(0, 0), (-1, 0), (math.nan, 0), (1, -1), (1, math.nan), (1, math.inf)]
)
def test_what_is_no_link(bandwidth: float, latency: float) -> None:
    with pytest.raises(ValueError, match="bandwidth above 0"):
        link(bandwidth, latency)


def test_large_gradients_go_alone_and_small_ones_together() -> None:
    small, large = 3 * MIB // 4, ALONE_BYTES
    messages = pack([[small, small], [large, small], [small] * 4], [KIB])
    assert [(one.stage, one.size_bytes, one.packed) for one in messages] == [
        (1, large, False),  # overtakes the four small ones that wait for their pack to fill
        (1, 5 * small, True),  # the sixth will not fit in: it goes with its own last
        (0, 2 * small, True),
        (0, KIB, True),
    ]


def test_a_pack_that_is_exactly_full_and_statistics_of_their_own() -> None:
    half = MIB // 2
    messages = pack([[half] * 9], [PACK_BYTES - 1, 2])
    assert [one.size_bytes for one in messages] == [PACK_BYTES, half, PACK_BYTES + 1]
    assert pack([[], []]) == ()


def test_every_byte_goes_once_and_in_order() -> None:
    rng = random.Random(1)
    for _ in range(50):
        gradients = [[rng.randint(1, 2 * MIB) for _ in range(rng.randint(0, 6))] for _ in range(rng.randint(1, 9))]
        statistics = [rng.randint(1, 64 * KIB) for _ in range(rng.randint(0, 6))]
        messages = pack(gradients, statistics)
        assert sum(one.size_bytes for one in messages) == sum(map(sum, gradients)) + sum(statistics)
        assert [one.stage for one in messages] == sorted((one.stage for one in messages), reverse=True)
        for one in messages[: -1 if statistics else None]:
            assert one.size_bytes <= PACK_BYTES if one.packed else one.size_bytes >= ALONE_BYTES


def test_a_timeline_by_hand() -> None:
    # stage 2 ends at 2, 1 at 3, 0 at 10: its two messages take 2..7 and 7..8, the last one waits for the backward
    result = exchange(sent((2, 5), (1, 1), (0, 4)), (10.0, 3.0, 2.0), SECOND_A_BYTE, 2)
    assert (result.communication_seconds, result.exposed_seconds, result.exposed_share) == (10, 4, 0.4)
    assert (result.messages, result.size_bytes) == (3, 10)
    # the first is still on its way when the backward is over
    assert exchange(sent((2, 12), (0, 4)), (10.0, 3.0, 2.0), SECOND_A_BYTE, 2).exposed_seconds == 8
    # everything is hidden but what comes last
    assert exchange(sent((2, 8)), (10.0, 3.0, 2.0), SECOND_A_BYTE, 2).exposed_seconds == 0


def test_latency_counts_for_each_message() -> None:
    one = exchange(sent((0, 6)), (1.0,), link(1.0, 0.25), 4)
    three = exchange(sent((0, 2), (0, 2), (0, 2)), (1.0,), link(1.0, 0.25), 4)
    assert one.communication_seconds == 9 + 6 * 0.25
    assert three.communication_seconds == 9 + 3 * 6 * 0.25


def test_limits() -> None:
    messages, ends = sent((1, 10**9), (0, 10**9)), (2.0, 1.0)
    alone = exchange(messages, ends, ETHERNET_1G, 1)
    assert (alone.messages, alone.communication_seconds, alone.exposed_seconds, alone.exposed_share) == (0, 0, 0, 0)
    assert exchange(messages, ends, link(math.inf), 8).exposed_seconds == 0
    assert exchange((), ends, ETHERNET_1G, 8).communication_seconds == 0
    with pytest.raises(ValueError, match="0 is not a number of processes"):
        exchange(messages, ends, ETHERNET_1G, 0)


def random_step(rng: random.Random) -> tuple[list[Message], tuple[float, ...]]:
    """Whole seconds and bytes."""
    stages = rng.randint(1, 8)
    ends = sorted((float(rng.randint(0, 30)) for _ in range(stages)), reverse=True)
    order = sorted((rng.randrange(stages) for _ in range(rng.randint(0, 12))), reverse=True)
    return sent(*((stage, rng.randint(1, 9)) for stage in order)), tuple(ends)


def tick(messages: list[Message], ends: tuple[float, ...]) -> tuple[int, int]:
    """Second by second, a byte each -> seconds with something on its way, and those of them after the backward."""
    queue, left, clock, busy, late = list(messages), 0, 0, 0, 0
    while queue or left:
        if not left and ends[queue[0].stage] <= clock:
            left = queue.pop(0).size_bytes
        if left:
            left -= 1
            busy += 1
            late += clock >= max(ends)
        clock += 1
    return busy, late


def test_against_a_clock_that_ticks() -> None:
    rng = random.Random(2)
    exposed = 0
    for _ in range(300):
        messages, ends = random_step(rng)
        result = exchange(messages, ends, SECOND_A_BYTE, 2)
        assert (result.communication_seconds, result.exposed_seconds) == tick(messages, ends)
        exposed += 0 < result.exposed_seconds < result.communication_seconds
    assert exposed > 100  # hidden in part: the cases that tell something


def test_more_bandwidth_and_less_latency_never_expose_more() -> None:
    rng = random.Random(3)
    for _ in range(100):
        messages, ends = random_step(rng)
        for processes in (2, 8):
            by_rate = [exchange(messages, ends, link(10.0**k), processes).exposed_seconds for k in range(-2, 4)]
            by_wait = [exchange(messages, ends, link(1.0, 0.1 * k), processes).exposed_seconds for k in range(5)]
            assert by_rate == sorted(by_rate, reverse=True)
            assert by_wait == sorted(by_wait)


def test_cards_of_one_host_divide_its_lanes() -> None:
    lane = 1e9
    rates = [desktop_link(lane, 16, cards).bytes_per_second for cards in (1, 2, 8)]
    assert rates == [0.76 * 16e9, 0.76 * 8e9, 0.76 * 2e9]
    assert desktop_link(lane, 4, 2).bytes_per_second == 0.76 * 4e9  # the card itself has no more
    assert server_link(lane, 8, 8).bytes_per_second == 0.76 * 8e9
    assert server_link(2 * lane, 16, 8).bytes_per_second == 10e9  # from one processor to the other


def test_the_slowdown_that_was_reported_for_1_gbit() -> None:
    # horovod issue 752: four GTX 1080 Ti in two machines, ResNet-50 (25.6 million parameters) at 171 pictures a second
    backward = 32 / 171 * 2 / 3
    ends = tuple(backward * (stage + 1) / 16 for stage in reversed(range(16)))
    messages = sent(*((stage, 4 * 25_600_000 // 16) for stage in reversed(range(16))))
    slower = {
        one.name: 1 + exchange(messages, ends, one, 4).exposed_seconds / (32 / 171)
        for one in (ETHERNET_1G, ETHERNET_10G)
    }
    assert 7 < slower[ETHERNET_1G.name] < 8
    assert slower[ETHERNET_10G.name] < 1.5
