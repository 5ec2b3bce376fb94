from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter

import pytest

from reft_core.adapter import decode_adapter
from reft_core.errors import EngineOverloaded, RequestFailed
from server.adapters.residency import Residency
from tests.server.fakes import FakeEngine, make_adapter, make_tokenizer

FILES = {hashlib.sha256(data).hexdigest(): data for data in map(make_adapter, range(5))}
A, B, C, D, E = FILES
SIZE = len(FILES[A])


class Shelf:
    """Adapter files that count how often they are read."""

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.gate: threading.Event | None = None
        self.failure: Exception | None = None

    def read(self, digest: str) -> bytes:
        self.reads[digest] += 1
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        return FILES[digest]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(make_tokenizer())


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def residency_of(
    engine: FakeEngine, shelf: Shelf, room_for: int = 2, wait_s: float = 0
) -> Residency:
    return Residency(engine, shelf.read, room_for * SIZE, wait_s=wait_s)


def test_the_files_are_equally_large():
    assert {len(data) for data in FILES.values()} == {SIZE}


def test_many_at_once_read_the_file_once(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        await asyncio.gather(*(residency.acquire(A, SIZE) for _ in range(10)))
        assert residency.num_users(A) == 10
        for _ in range(10):
            residency.release(A)
        assert residency.num_users(A) == 0

    asyncio.run(scenario())
    assert shelf.reads == {A: 1}
    assert engine.loads == [A]
    assert engine.adapters == {A}


def test_the_least_recently_used_goes_when_room_is_needed(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        for digest in (A, B, A, C):
            await residency.acquire(digest, SIZE)
            residency.release(digest)
        assert engine.adapters == {A, C}
        assert engine.unloads == [B]
        assert residency.num_bytes == 2 * SIZE

    asyncio.run(scenario())


def test_loads_for_which_another_had_to_leave_are_swaps(engine, shelf):
    async def scenario():
        loads = []
        note = lambda seconds, swapped: loads.append((seconds > 0, swapped))  # noqa: E731
        residency = Residency(engine, shelf.read, 2 * SIZE, note)
        for digest in (A, B, C, C, A):
            await residency.acquire(digest, SIZE)
            residency.release(digest)
        assert loads == [(True, False), (True, False), (True, True), (True, True)]

    asyncio.run(scenario())


def test_what_is_in_use_stays_and_a_full_memory_refuses(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        await residency.acquire(A, SIZE)
        await residency.acquire(B, SIZE)
        with pytest.raises(EngineOverloaded, match="adapter memory is full"):
            await residency.acquire(C, SIZE)
        assert engine.unloads == []
        residency.release(A)
        await residency.acquire(C, SIZE)
        assert engine.adapters == {B, C}

    asyncio.run(scenario())


def test_loads_in_flight_count_against_the_budget(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf, room_for=1)
        shelf.gate = threading.Event()
        first = asyncio.create_task(residency.acquire(A, SIZE))
        await asyncio.sleep(0)
        with pytest.raises(EngineOverloaded):
            await residency.acquire(B, SIZE)
        shelf.gate.set()
        await first
        assert engine.adapters == {A}

    asyncio.run(scenario())


def test_a_failed_load_reaches_all_who_wait_and_is_tried_again(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        shelf.failure = RequestFailed("damaged")
        found = await asyncio.gather(
            *(residency.acquire(A, SIZE) for _ in range(3)), return_exceptions=True
        )
        assert [str(error) for error in found] == ["damaged"] * 3
        assert residency.num_users(A) is None
        assert residency.num_bytes == 0
        shelf.failure = None
        await residency.acquire(A, SIZE)
        assert engine.adapters == {A}

    asyncio.run(scenario())
    assert shelf.reads == {A: 2}


def test_a_waiter_that_is_cancelled_takes_nobody_with_it(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        shelf.gate = threading.Event()
        impatient = asyncio.create_task(residency.acquire(A, SIZE))
        patient = asyncio.create_task(residency.acquire(A, SIZE))
        await asyncio.sleep(0.01)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        shelf.gate.set()
        await patient
        assert residency.num_users(A) == 1
        assert engine.adapters == {A}

    asyncio.run(scenario())


def test_a_deleted_adapter_leaves_at_once_or_with_its_last_user(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        for digest in (A, B):
            await residency.acquire(digest, SIZE)
        residency.release(A)
        residency.forget(A)
        assert engine.adapters == {B}
        residency.forget(B)
        assert engine.adapters == {B}
        residency.release(B)
        assert engine.adapters == set()
        residency.forget(C)  # never was there
        assert engine.unloads == [A, B]

    asyncio.run(scenario())


def test_uploading_again_what_was_just_deleted_keeps_it(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        await residency.acquire(A, SIZE)
        residency.forget(A)
        await residency.acquire(A, SIZE)
        residency.release(A)
        residency.release(A)
        assert engine.adapters == {A}

    asyncio.run(scenario())


def test_deleting_while_loading_leaves_nothing_once_it_is_given_back(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        shelf.gate = threading.Event()
        loading = asyncio.create_task(residency.acquire(A, SIZE))
        await asyncio.sleep(0.01)
        residency.forget(A)
        shelf.gate.set()
        await loading
        assert engine.adapters == {A}
        residency.release(A)
        assert engine.adapters == set()
        assert residency.num_bytes == 0

    asyncio.run(scenario())


def test_deleting_while_loading_for_nobody_leaves_nothing(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        shelf.gate = threading.Event()
        loading = asyncio.create_task(residency.acquire(A, SIZE))
        await asyncio.sleep(0.01)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        residency.forget(A)
        shelf.gate.set()
        for _ in range(200):
            if engine.unloads:
                break
            await asyncio.sleep(0.01)
        assert engine.adapters == set()
        assert residency.num_bytes == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("wait_s", [0, 0.002, 60])
def test_random_use_never_breaks_the_budget_or_the_counts(engine, shelf, wait_s):
    async def worker(residency: Residency, seed: int) -> int:
        refused = 0
        for turn in range(30):
            digest = list(FILES)[(seed * 7 + turn * 3) % 5]
            try:
                async with asyncio.timeout(0.003 if turn % 4 == 0 else 60):
                    await residency.acquire(digest, SIZE)
            except (EngineOverloaded, TimeoutError):
                refused += 1
                continue
            assert engine.has_adapter(digest)
            assert residency.num_bytes <= 3 * SIZE
            await asyncio.sleep(0)
            assert engine.has_adapter(digest)
            residency.release(digest)
        return refused

    async def scenario():
        residency = residency_of(engine, shelf, room_for=3, wait_s=wait_s)
        await asyncio.gather(*(worker(residency, seed) for seed in range(6)))
        while residency.num_bytes != len(engine.adapters) * SIZE:  # loads that nobody waits for
            await asyncio.sleep(0.001)
        assert (residency.num_references, residency.num_waiting) == (0, 0)
        assert {residency.num_users(digest) for digest in FILES} <= {0, None}
        assert len(engine.adapters) <= 3

    asyncio.run(scenario())


# Waiting for room --------------------------------------------------------------------------


def start(residency: Residency, digest: str) -> asyncio.Task[None]:
    return asyncio.create_task(residency.acquire(digest, SIZE))


async def settle() -> None:
    """Let every task run as far as it can without a thread."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_cold_adapter_waits_for_room_and_a_hot_one_does_not(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf, wait_s=60)
        await residency.acquire(A, SIZE)
        await residency.acquire(B, SIZE)
        waiting = start(residency, C)
        await settle()
        assert (residency.num_waiting, residency.num_bytes) == (1, 2 * SIZE)
        await residency.acquire(A, SIZE)
        residency.release(A)
        assert not waiting.done()
        residency.release(B)
        await waiting
        assert engine.adapters == {A, C}
        assert (residency.num_waiting, residency.num_evictions) == (0, 1)

    asyncio.run(scenario())


def test_what_requests_brought_waits_in_as_much_memory_as_there_is_room(engine, shelf):
    adapters = {digest: decode_adapter(data, digest=digest) for digest, data in FILES.items()}

    async def scenario():
        residency = residency_of(engine, shelf, room_for=2, wait_s=60)
        for digest in (A, B):
            await residency.acquire(digest, SIZE)

        def bring(digest: str) -> asyncio.Task[None]:
            return asyncio.create_task(residency.acquire(digest, SIZE, adapters[digest]))

        waiting = [bring(C), bring(D)]
        await settle()
        with pytest.raises(EngineOverloaded, match="brought"):
            await bring(E)
        named = start(residency, E)  # its bytes are not in memory yet
        await settle()
        assert residency.num_waiting == 3
        for digest in (A, B):
            residency.release(digest)
        await asyncio.gather(*waiting)
        for digest in (C, D):
            residency.release(digest)
        await named
        assert engine.adapters == {E}

    asyncio.run(scenario())


def test_room_goes_to_who_waited_first(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf, room_for=1, wait_s=60)
        await residency.acquire(A, SIZE)
        waiting = [start(residency, digest) for digest in (B, C, B, D)]
        await settle()
        residency.release(A)
        for digest, users in ((B, 2), (C, 1), (D, 1)):
            for _ in range(200):
                if engine.adapters == {digest}:
                    break
                await asyncio.sleep(0.005)
            await settle()
            assert residency.num_users(digest) == users
            for _ in range(users):
                residency.release(digest)
        await asyncio.gather(*waiting)

    asyncio.run(scenario())
    assert shelf.reads == {A: 1, B: 1, C: 1, D: 1}


def test_who_waits_too_long_is_refused_and_lets_the_next_one_in(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf, wait_s=0.05)
        await residency.acquire(A, SIZE)
        await residency.acquire(B, SIZE)
        large = asyncio.create_task(residency.acquire(C, 2 * SIZE))
        await asyncio.sleep(0.03)
        small = start(residency, D)
        residency.release(A)
        with pytest.raises(EngineOverloaded, match="adapter memory is full"):
            await large
        await small
        assert engine.adapters == {B, D}
        assert residency.num_users(C) is None
        assert residency.num_bytes == 2 * SIZE

    asyncio.run(scenario())
    assert shelf.reads[C] == 0


def test_who_leaves_while_waiting_gives_its_place_up(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf, room_for=1, wait_s=60)
        await residency.acquire(A, SIZE)
        leaving, staying = start(residency, B), start(residency, C)
        await settle()
        leaving.cancel()
        again = start(residency, B)  # before the first one has noticed
        await settle()
        assert residency.num_waiting == 2
        residency.release(A)
        await staying
        residency.release(C)
        await again
        assert engine.adapters == {B}
        assert residency.num_references == 1

    asyncio.run(scenario())


def test_what_can_never_fit_does_not_wait(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf, wait_s=60)
        with pytest.raises(EngineOverloaded, match="does not fit"):
            await residency.acquire(A, 3 * SIZE)
        assert residency.num_users(A) is None

    asyncio.run(scenario())


def test_a_failed_load_makes_room_for_who_waits(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf, room_for=1, wait_s=60)
        shelf.gate, shelf.failure = threading.Event(), RequestFailed("damaged")
        failing, waiting = start(residency, A), start(residency, B)
        await settle()
        shelf.gate.set()
        with pytest.raises(RequestFailed):
            await failing
        with pytest.raises(RequestFailed):
            await waiting
        shelf.failure = None
        await residency.acquire(C, SIZE)
        assert (engine.adapters, residency.num_bytes) == ({C}, SIZE)

    asyncio.run(scenario())


# Pins --------------------------------------------------------------------------------------


def test_a_pinned_adapter_stays_until_another_takes_its_place(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        for _ in range(2):
            await residency.pin("tone", A, SIZE)
        assert (residency.num_users(A), residency.num_references) == (0, 1)
        for digest in (B, C, D):
            await residency.acquire(digest, SIZE)
            residency.release(digest)
        assert engine.adapters == {A, D}
        await residency.pin("tone", B, SIZE)
        await residency.acquire(C, SIZE)
        assert engine.adapters == {B, C}
        residency.unpin("tone")
        residency.unpin("never pinned")
        assert residency.num_references == 1
        await residency.acquire(D, SIZE)
        assert engine.adapters == {C, D}

    asyncio.run(scenario())


def test_a_pin_that_fails_leaves_the_one_before(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        await residency.pin("tone", A, SIZE)
        shelf.failure = RequestFailed("damaged")
        with pytest.raises(RequestFailed):
            await residency.pin("tone", B, SIZE)
        assert (engine.adapters, residency.num_pinned) == ({A}, 1)

    asyncio.run(scenario())


def test_a_pinned_adapter_that_is_deleted_goes(engine, shelf):
    async def scenario():
        residency = residency_of(engine, shelf)
        await residency.pin("tone", A, SIZE)
        await residency.pin("voice", A, SIZE)
        await residency.acquire(A, SIZE)
        residency.forget(A)
        assert engine.adapters == {A}
        residency.release(A)
        assert (engine.adapters, residency.num_pinned) == (set(), 0)

    asyncio.run(scenario())
