"""The virtqueue from the driver's side: good chains, hostile ones, and the arithmetic of events."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostel.abi import virtio as abi
from hostel.errors import QueueError
from hostel.memory import GuestMemory
from hostel.virtio.mock import DriverQueue
from hostel.virtio.queue import Fault, Queue, VirtqueueError, take, total
from virtio.malice import HEAP, INDIRECT, NEXT, OUTSIDE, RINGS, WRITE, indirect

BASE = 0x1000


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(4 << 20) as memory:
        yield memory


def pair(memory: GuestMemory, size: int = 16, **keywords: Any) -> tuple[DriverQueue, Queue]:
    driver = DriverQueue(memory, BASE, size, **keywords)
    return driver, device_queue(driver)


def device_queue(driver: DriverQueue, **keywords: Any) -> Queue:
    rings = {"desc": driver.desc, "avail": driver.avail, "used": driver.used}
    keywords = {"features": driver.features, **rings, **keywords}
    return Queue(driver.memory, driver.size, **keywords)


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_goes_there_and_back(memory: GuestMemory, indirect: bool) -> None:
    driver, queue = pair(memory)
    head = driver.add([b"abc", b"defg"], [5, 3], indirect=indirect)
    chain = queue.pop()
    assert chain is not None
    assert b"".join(chain.readable) == b"abcdefg"
    assert [len(buffer) for buffer in chain.writable] == [5, 3]
    assert queue.pop() is None
    chain.writable[0][:] = b"hello"
    chain.writable[1][:2] = b"!!"
    queue.push(chain, 7)
    (done,) = driver.completed()
    assert (done.head, done.written, done.data) == (head, 7, b"hello!!")


def test_the_indexes_wrap(memory: GuestMemory) -> None:
    driver, queue = pair(memory, 4, event_index=True)
    for turn in range(70_000):
        driver.add([b"x"])
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
        assert queue.needs_interrupt(), turn
        assert len(driver.completed()) == 1
    assert queue.position == (70_000 & 0xFFFF, 70_000 & 0xFFFF)


def test_unpop_gives_the_same_chain_again(memory: GuestMemory) -> None:
    driver, queue = pair(memory)
    driver.add([b"one"])
    driver.add([b"two"])
    first, second = queue.pop(), queue.pop()
    assert first is not None
    assert second is not None
    queue.unpop(1)
    again = queue.pop()
    assert again is not None
    assert again.head == second.head


def test_room_that_lies_side_by_side_is_one_view(memory: GuestMemory) -> None:
    driver, queue = pair(memory)
    heads = [
        driver.add([], [size]) for size in (64, 32, 40, 16)
    ]  # 8 bytes are left behind the third
    found, lengths, views = queue.pop_room(16)
    assert (found, lengths) == (heads, [64, 32, 40, 16])
    assert [len(view) for view in views] == [136, 16]
    assert queue.pop_room(16) == ([], [], [])


def test_room_in_pieces_comes_alone(memory: GuestMemory) -> None:
    driver, queue = pair(memory)
    driver.add([], [64])
    driver.add([b"not for us"], [3, 5], indirect=True)
    driver.add([], [64])
    popped = [queue.pop_room(16) for _ in range(4)]
    assert [lengths for _, lengths, _ in popped] == [[64], [8], [64], []]
    assert [len(view) for view in popped[1][2]] == [3, 5]


def test_used_entries_around_the_end_of_the_ring(memory: GuestMemory) -> None:
    driver, queue = pair(memory, 4)
    for count in (3, 4, 2, 4):
        heads = [driver.add([], [16]) for _ in range(count)]
        found, _, _ = queue.pop_room(4)
        queue.push_used(array("I", found), array("I", range(count)))
        done = driver.completed()
        assert [(one.head, one.written) for one in done] == list(
            zip(heads, range(count), strict=True)
        )


def test_more_chains_than_descriptors(memory: GuestMemory) -> None:
    """Taken little by little, while none has come back."""
    driver, queue = pair(memory, 4)
    for _ in range(4):
        driver.offer(0)
        driver.set_descriptor(0, driver.heap, 16, WRITE)
        assert len(queue.pop_room(1)[0]) == 1
    driver.offer(0)
    with pytest.raises(VirtqueueError) as caught:
        queue.pop_room(1)
    assert caught.value.fault is Fault.INDEX_JUMP


def test_a_direct_chain_may_end_in_an_indirect_table(memory: GuestMemory) -> None:
    """§2.7.5.3.2: a device has to take normal descriptors before the indirect one."""
    driver, queue = pair(memory)
    table = driver.heap
    memory.write(table, abi.DESC.pack(driver.heap + 64, 8, WRITE, 0))
    driver.set_descriptor(0, driver.heap + 128, 4, NEXT, 1)
    driver.set_descriptor(1, table, 16, INDIRECT)
    driver.offer(0)
    chain = queue.pop()
    assert chain is not None
    assert (total(chain.readable), total(chain.writable)) == (4, 8)


def test_position_goes_on_in_another_queue(memory: GuestMemory) -> None:
    driver, queue = pair(memory)
    driver.add([b"one"])
    chain = queue.pop()
    assert chain is not None
    queue.push(chain, 0)
    driver.add([b"two"])
    again = device_queue(driver, position=queue.position)
    chain = again.pop()
    assert chain is not None
    assert bytes(chain.readable[0]) == b"two"
    again.push(chain, 0)
    assert len(driver.completed()) == 2


# --- Hostile drivers ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", RINGS)
def test_a_hostile_chain_is_named(memory: GuestMemory, case: str) -> None:
    fault, play = RINGS[case]
    driver, queue = pair(memory)
    play(driver)
    with pytest.raises(VirtqueueError) as caught:
        queue.pop()
    assert caught.value.fault is fault
    assert str(caught.value).startswith(fault)


def test_too_many_buffers(memory: GuestMemory) -> None:
    """A full indirect table after direct descriptors is longer than one preadv takes."""
    driver, queue = pair(memory)
    indirect(*[(HEAP, 1, NEXT, at + 1) for at in range(1023)], (HEAP, 1, 0, 0))(driver)
    driver.set_descriptor(1, BASE, 1, NEXT, 0)
    driver.offer(1)
    assert queue.pop() is not None
    with pytest.raises(VirtqueueError) as caught:
        queue.pop()
    assert caught.value.fault is Fault.TOO_LONG


def test_indirect_has_to_be_negotiated(memory: GuestMemory) -> None:
    driver = DriverQueue(memory, BASE)
    queue = device_queue(driver, features=0)
    driver.add([b"x"], indirect=True)
    with pytest.raises(VirtqueueError) as caught:
        queue.pop()
    assert caught.value.fault is Fault.INDIRECT_NOT_NEGOTIATED


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"size": 0}, Fault.SIZE_ZERO),
        ({"size": 12}, Fault.SIZE_NOT_POWER_OF_TWO),
        ({"size": 65536}, Fault.SIZE_TOO_LARGE),
        ({"desc": BASE + 8}, Fault.DESC_MISALIGNED),
        ({"avail": BASE + 1}, Fault.AVAIL_MISALIGNED),
        ({"used": BASE + 2}, Fault.USED_MISALIGNED),
        ({"desc": OUTSIDE}, Fault.RING_OUTSIDE),
        ({"avail": (4 << 20) - 4}, Fault.RING_OUTSIDE),
        ({"used": (4 << 20) - 8}, Fault.RING_OUTSIDE),
    ],
)
def test_a_bad_ring_is_named(memory: GuestMemory, change: dict[str, int], fault: Fault) -> None:
    rings: dict[str, Any] = {
        "size": 16,
        "desc": BASE,
        "avail": BASE + 256,
        "used": BASE + 512,
        **change,
    }
    with pytest.raises(VirtqueueError) as caught:
        Queue(memory, **rings)
    assert caught.value.fault is fault


def test_every_fault_has_a_case() -> None:
    """The table above is complete."""
    seen = {fault for fault, _ in RINGS.values()} | {
        Fault.TOO_LONG,
        Fault.INDIRECT_NOT_NEGOTIATED,
        Fault.SIZE_ZERO,
        Fault.SIZE_NOT_POWER_OF_TWO,
        Fault.SIZE_TOO_LARGE,
        Fault.DESC_MISALIGNED,
        Fault.AVAIL_MISALIGNED,
        Fault.USED_MISALIGNED,
        Fault.RING_OUTSIDE,
    }
    assert seen == set(Fault)


ADDRESSES = st.one_of(
    st.integers(0, 1 << 16),
    st.integers((1 << 16) - 64, (1 << 16) + 64),
    st.integers(0, 2**64 - 1),
)
DESCRIPTORS = st.tuples(
    ADDRESSES,
    st.one_of(st.integers(0, 64), st.sampled_from([16, 32, 4096]), st.integers(0, 2**32 - 1)),
    st.integers(0, 7),
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFF)),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    descriptors=st.lists(DESCRIPTORS, min_size=8, max_size=16),
    heads=st.lists(st.integers(0, 9), max_size=8),
    index=st.integers(0, 12),
    features=st.sampled_from([0, 1 << 28, 1 << 29, 3 << 28]),
)
def test_whatever_the_driver_writes(
    descriptors: list[tuple[int, int, int, int]], heads: list[int], index: int, features: int
) -> None:
    """Only ``QueueError``, and every buffer handed out lies inside guest memory."""
    with GuestMemory(1 << 16) as memory:
        driver = DriverQueue(memory, 0, 8, heap=1 << 14)
        queue = device_queue(driver, features=features)
        table = b"".join(abi.DESC.pack(*descriptor) for descriptor in descriptors)
        memory.write(driver.desc, table[:128])
        memory.write(driver.heap, table)
        for slot, head in enumerate(heads):
            memory.write_u16(driver.avail + 4 + 2 * slot, head)
        driver.set_available_index(index)
        before = memory.read(0, 1 << 16)
        try:
            while (chain := queue.pop()) is not None:
                assert chain.readable or chain.writable
                for buffer in chain.readable + chain.writable:
                    assert 0 < len(buffer) <= 1 << 16
        except QueueError:
            pass
        assert memory.read(0, 1 << 16) == before, "pop writes nothing"
        queue.close()


def chain_or_fault(driver: DriverQueue) -> tuple[Any, ...]:
    queue = device_queue(driver)
    try:
        chain = queue.pop()
    except VirtqueueError as error:
        return (error.fault,)
    assert chain is not None
    lengths = [list(map(len, buffers)) for buffers in (chain.readable, chain.writable)]
    return chain.head, chain.size, lengths, list(map(bytes, chain.readable + chain.writable))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    buffers=st.lists(
        st.tuples(st.integers(0, 1 << 14), st.integers(1, 64)), min_size=1, max_size=9
    ),
    readable=st.integers(0, 9),
    wrong=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 3), st.one_of(ADDRESSES, st.integers(0, 16))),
        max_size=2,
    ),
    rest=st.sampled_from([0, 0, 0, 1, 15, 16]),
)
def test_a_table_in_order_is_taken_apart_as_any_other(
    buffers: list[tuple[int, int]],
    readable: int,
    wrong: list[tuple[int, int, int]],
    rest: int,
) -> None:
    """As drivers write it, and with one or two fields that are anything: the same chain or fault by both
    ways of reading it."""
    last = len(buffers) - 1
    fields = [
        [address, length, (at < last) * NEXT | (at >= readable) * WRITE, (at + 1) * (at < last)]
        for at, (address, length) in enumerate(buffers)
    ]
    for at, field, value in wrong:
        fields[at % len(fields)][field] = value & (2**64 - 1, 2**32 - 1, 7, 0xFFFF)[field]
    table = b"".join(abi.DESC.pack(*entry) for entry in fields)
    with GuestMemory(1 << 16) as memory:
        driver = DriverQueue(memory, 0x4000, 8, heap=1 << 14)
        memory.write(0, bytes(range(256)) * 64)
        memory.write(driver.heap, table)
        driver.set_descriptor(0, driver.heap, len(table) + rest, INDIRECT)
        driver.offer(0)
        as_a_whole = chain_or_fault(driver)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Queue, "_table_in_order", lambda *_: None)
            assert chain_or_fault(driver) == as_a_whole


def test_what_a_driver_writes_is_taken_apart_as_a_whole(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, queue = pair(memory)
    monkeypatch.setattr(Queue, "_walk", lambda *_, **__: pytest.fail("entry by entry"))
    for readable, writable in (
        ([b"a"], [4, 1]),
        ([b"a", b"bc"], [1]),
        ([b"a", b"b"], []),
        ([], [3]),
    ):
        driver.add(readable, writable, indirect=True)
        chain = queue.pop()
        assert chain is not None
        assert list(map(bytes, chain.readable)) == readable
        assert list(map(len, chain.writable)) == writable


# --- Notification ------------------------------------------------------------------------------


def test_without_event_index_flags_rule(memory: GuestMemory) -> None:
    driver, queue = pair(memory)
    queue.disable_notifications()
    driver.add([b"x"])
    assert not driver.wants_kick
    assert queue.enable_notifications(), "one came in while notifications were off"
    driver.add([b"x"])
    assert driver.wants_kick

    def use_one() -> bool:
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 0)
        return queue.needs_interrupt()

    assert use_one()
    assert not queue.needs_interrupt(), "nothing new was used"
    driver.set_flags(abi.AVAIL_F_NO_INTERRUPT)
    assert not use_one()


def test_with_event_index_the_driver_kicks_once(memory: GuestMemory) -> None:
    driver, queue = pair(memory, event_index=True)
    assert not queue.enable_notifications()
    kicks = []
    for _ in range(5):
        driver.add([b"x"])
        kicks.append(driver.wants_kick)
    assert kicks == [True, False, False, False, False]
    while queue.pop() is not None:
        pass
    assert not queue.enable_notifications()
    driver.add([b"x"])
    assert driver.wants_kick


def test_the_mock_driver_sees_what_no_interrupt_tells_of(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device uses a chain when the driver has looked at the ring and has not yet said so (§2.7.10)."""
    driver, queue = pair(memory, event_index=True)
    heads = [driver.add([b"x"]) for _ in range(3)]
    interrupts = []

    def use_one() -> None:
        if (chain := queue.pop()) is not None:
            queue.push(chain, 0)
            interrupts.append(queue.needs_interrupt())

    def late(value: int) -> None:
        use_one()
        DriverQueue.set_used_event(driver, value)

    use_one()
    monkeypatch.setattr(driver, "set_used_event", late)
    assert [done.head for done in driver.completed()] == heads
    assert interrupts == [True, False, False]


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(0, 0xFFFF),
    batches=st.lists(st.integers(0, 8), min_size=1, max_size=12),
    wanted=st.integers(0, 40),
)
def test_an_interrupt_comes_exactly_when_used_event_is_passed(
    start: int, batches: list[int], wanted: int
) -> None:
    """§2.7.7.2: interrupt if and only if the entry that used_event names is in the batch."""
    with GuestMemory(1 << 16) as memory:
        driver = DriverQueue(memory, 0, 8, heap=4096, event_index=True)
        queue = device_queue(driver, position=(start, start))
        for slot in range(8):
            driver.set_descriptor(slot, driver.heap, 1)
            memory.write_u16(driver.avail + 4 + 2 * slot, slot)
        driver.set_used_event(start + wanted)
        done = 0
        for batch in batches:
            driver.set_available_index(start + done + batch)
            for _ in range(batch):
                chain = queue.pop()
                assert chain is not None
                queue.push(chain, 0)
            assert queue.needs_interrupt() == (done <= wanted < done + batch)
            done += batch


@given(
    lengths=st.lists(st.integers(1, 9), max_size=6),
    at=st.integers(0, 60),
)
def test_take_splits_anywhere(lengths: list[int], at: int) -> None:
    buffers = [memoryview(bytes([n]) * n) for n in lengths]
    whole = b"".join(buffers)
    head, tail = take(buffers, at)
    assert (b"".join(head), b"".join(tail)) == (whole[:at], whole[at:])
    assert all(len(buffer) for buffer in head + tail)
