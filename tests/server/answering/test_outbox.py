from __future__ import annotations

import asyncio
import threading

import pytest

from reft_core.engine.interface import Output
from server.answering.outbox import Outbox


def test_outputs_of_many_threads_all_come_and_in_order() -> None:
    async def main() -> dict[int, list[str]]:
        outbox = Outbox(asyncio.get_running_loop())
        came: dict[int, list[str]] = {place: [] for place in range(4)}

        def put(place: int) -> None:
            for i in range(2000):
                outbox.put(
                    lambda output: came[place].append(output.request_id), Output(str(i), None)
                )

        threads = [threading.Thread(target=put, args=(place,)) for place in came]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        return came

    for ids in asyncio.run(main()).values():
        assert ids == [str(i) for i in range(2000)]


def test_outputs_put_before_the_loop_looks_come_in_one_call() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        outbox, calls, came = Outbox(loop), 0, []
        call = loop.call_soon_threadsafe

        def counting(*args):
            nonlocal calls
            calls += 1
            return call(*args)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        for i in range(64):
            outbox.put(lambda output: came.append(output.request_id), Output(str(i), None))
        await asyncio.sleep(0.01)
        assert (calls, len(came)) == (1, 64)

    asyncio.run(main())


def test_one_receiver_that_fails_keeps_nothing_from_the_others(caplog) -> None:
    async def main() -> list[str]:
        outbox, came = Outbox(asyncio.get_running_loop()), []

        def fail(_: Output) -> None:
            raise ValueError("broken")

        outbox.put(fail, Output("broken", None))
        outbox.put(lambda output: came.append(output.request_id), Output("whole", None))
        await asyncio.sleep(0.01)
        return came

    assert asyncio.run(main()) == ["whole"]
    assert "could not be handed over" in caplog.text


def test_a_closed_loop_is_told_each_time() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    outbox = Outbox(loop)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            outbox.put(lambda _: None, Output("x", None))
