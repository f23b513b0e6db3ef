from __future__ import annotations

import pytest

from hostel.errors import SpecError
from hostel.spec import Limits, Rate
from hostel.virtio.limit import Limiter, TokenBucket


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    clock = Clock()
    bucket = TokenBucket(Rate(per_second=1000, burst=500), clock)
    assert bucket.take(500) == 0
    assert bucket.take(100) == pytest.approx(0.1)
    clock.now += 0.1
    assert bucket.take(0) == 0
    assert bucket.take(1) == pytest.approx(0.001)
    assert bucket.take(0) == pytest.approx(0.001), "asking costs nothing"


def test_tokens_never_exceed_the_burst() -> None:
    clock = Clock()
    bucket = TokenBucket(Rate(per_second=10, burst=5), clock)
    clock.now += 1000
    assert bucket.take(6) == pytest.approx(0.1)


def test_without_a_burst_a_second_may_come_at_once() -> None:
    bucket = TokenBucket(Rate(per_second=7), Clock())
    assert bucket.take(7) == 0
    assert bucket.take(7) == pytest.approx(1)


def test_a_request_larger_than_the_burst_is_slow_not_impossible() -> None:
    clock = Clock()
    bucket = TokenBucket(Rate(per_second=100, burst=10), clock)
    wait = bucket.take(1010)
    assert wait == pytest.approx(10)
    clock.now += wait
    assert bucket.take(0) == 0


def test_who_obeys_gets_the_rate_on_average() -> None:
    clock = Clock()
    bucket = TokenBucket(Rate(per_second=1_000_000, burst=64 << 10), clock)
    sent = 0
    while clock.now < 110:
        sent += 1500
        clock.now += bucket.take(1500)
    assert sent == pytest.approx(10 * 1_000_000 + (64 << 10), rel=0.01)


def test_the_tighter_of_two_limits_decides() -> None:
    limits = Limits(bytes=Rate(per_second=1000), operations=Rate(per_second=10))
    limiter = Limiter(limits, Clock())
    assert limiter.active
    assert limiter.take(1500) == pytest.approx(0.5)
    assert limiter.take(0, operations=19) == pytest.approx(1)


def test_no_limits_no_wait() -> None:
    limiter = Limiter(Limits(), Clock())
    assert not limiter.active
    assert limiter.take(1 << 40) == 0


@pytest.mark.parametrize("rate", [(0, 0), (-1, 0), (5, -1)])
def test_what_is_no_rate_is_refused(rate: tuple[int, int]) -> None:
    with pytest.raises(SpecError, match="not a rate"):
        Rate(per_second=rate[0], burst=rate[1])
