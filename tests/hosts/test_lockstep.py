"""Several stacks, one of them running at a time, in the order that their owner decides."""

from __future__ import annotations

import _thread
import ctypes
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evenkeel.hosts.pipeline.strand import Abandoned, Finished, Strand


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    """Every test must leave the threads that it found."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.001)  # a finished strand still has to return from its last line
    assert set(threading.enumerate()) - before == set()


def counting(name: str, pauses: int, log: list[str]) -> Any:
    def body(strand: Strand) -> str:
        for k in range(pauses):
            log.append(f"{name}{k}")
            log.append(f"{name} was told {strand.pause((name, k))}")
        return f"{name} is done"

    return body


# ---- order


def test_nothing_runs_before_the_first_resume() -> None:
    log: list[str] = []
    strand = Strand(counting("a", 1, log))
    time.sleep(0.01)
    assert log == []
    assert strand.resume() == ("a", 0)
    assert log == ["a0"]
    strand.abandon()


def test_shown_values_answers_and_the_result_pass_in_both_directions() -> None:
    log: list[str] = []
    strand = Strand(counting("a", 2, log))
    assert [strand.resume(), strand.resume("x")] == [("a", 0), ("a", 1)]
    end = strand.resume("y")
    assert isinstance(end, Finished) and end.result == "a is done"
    assert log == ["a0", "a was told x", "a1", "a was told y"]


def test_the_owner_decides_who_is_next() -> None:
    log: list[str] = []
    a, b = Strand(counting("a", 2, log)), Strand(counting("b", 2, log))
    for strand in (b, a, a, b, b, a):
        strand.resume(0)
    told = [entry for entry in log if "told" not in entry]
    assert told == ["b0", "a0", "a1", "b1"]


def test_a_strand_runs_in_a_stack_of_its_own() -> None:
    def body(strand: Strand) -> int:
        strand.pause(threading.get_ident())
        return threading.get_ident()

    strand = Strand(body)
    first = strand.resume()
    assert first != threading.get_ident()
    assert strand.resume().result == first


# ---- memory


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc"
)
def test_what_a_strand_frees_it_does_not_keep() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    kept = []

    def body(strand: Strand) -> None:
        # Blocks that glibc takes from the thread's own share; the last one holds its end in place.
        blocks = [torch.ones(25_000) for _ in range(1_000)]
        kept.append(blocks.pop())
        most = resident()
        del blocks
        strand.pause(most)

    before = resident()
    strand = Strand(body)
    at_most = strand.resume()
    assert at_most - before > 80e6
    after = resident()
    strand.abandon()
    assert after - before < 40e6


# ---- nothing runs concurrently


class Witness:
    """Notices when two stacks are between ``enter`` and ``leave`` at the same time."""

    def __init__(self) -> None:
        self.inside = 0
        self.worst = 0

    def work(self) -> None:
        self.inside += 1
        self.worst = max(self.worst, self.inside)
        time.sleep(0.0005)  # lets any other thread that may run do so
        self.inside -= 1


def test_only_one_stack_runs_at_any_time() -> None:
    witness = Witness()

    def body(strand: Strand) -> None:
        for _ in range(5):
            witness.work()
            strand.pause(None)
            witness.work()

    strands = [Strand(body) for _ in range(6)]
    order = [k for k in range(6) for _ in range(6)]
    random.Random(0).shuffle(order)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for k in order:
            strands[k].resume()
            witness.work()
    finally:
        sys.setswitchinterval(interval)
    assert witness.worst == 1


def test_plain_threads_would_be_noticed() -> None:
    witness = Witness()
    threads = [threading.Thread(target=lambda: [witness.work() for _ in range(20)]) for _ in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert witness.worst > 1


# ---- errors


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("pauses", [0, 2])
def test_what_the_body_raises_reaches_the_owner(error: type[BaseException], pauses: int) -> None:
    def body(strand: Strand) -> None:
        for k in range(pauses):
            strand.pause(k)
        raise error("from inside")

    strand = Strand(body)
    assert [strand.resume() for _ in range(pauses)] == list(range(pauses))
    with pytest.raises(error, match="from inside") as caught:
        strand.resume()
    assert "body" in [entry.name for entry in caught.traceback]
    strand.abandon()


def finished() -> Strand:
    strand = Strand(lambda _: 1)
    strand.resume()
    return strand


def failed() -> Strand:
    strand = Strand(lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        strand.resume()
    return strand


def abandoned() -> Strand:
    strand = Strand(lambda s: s.pause(0))
    strand.resume()
    strand.abandon()
    return strand


@pytest.mark.parametrize("end", [finished, failed, abandoned])
def test_resuming_what_has_ended_is_an_error_and_no_deadlock(end: Any) -> None:
    strand = end()
    with pytest.raises(RuntimeError, match="has ended"):
        strand.resume()


# ---- abandoning


def test_abandoning_unwinds_the_body_at_its_pause() -> None:
    log: list[str] = []

    def body(strand: Strand) -> None:
        try:
            strand.pause("here")
            log.append("went on")
        except Exception:
            log.append("swallowed")  # Abandoned is no Exception
        finally:
            log.append("cleaned up")

    strand = Strand(body)
    strand.resume()
    strand.abandon()
    assert log == ["cleaned up"]


def test_abandoning_raises_abandoned_inside() -> None:
    seen: list[BaseException] = []

    def body(strand: Strand) -> None:
        try:
            strand.pause(None)
        except BaseException as error:
            seen.append(error)
            raise

    strand = Strand(body)
    strand.resume()
    strand.abandon()
    assert [type(error) for error in seen] == [Abandoned]


def test_a_pause_while_unwinding_does_not_wait_for_anyone() -> None:
    def body(strand: Strand) -> None:
        try:
            strand.pause("first")
        finally:
            strand.pause("in a finally clause")

    strand = Strand(body)
    strand.resume()
    closer = threading.Thread(target=strand.abandon, daemon=True)
    closer.start()
    closer.join(timeout=5)
    alive = closer.is_alive()
    strand._go.release()  # frees it, should it wait after all
    assert not alive


def test_abandoning_is_harmless_before_the_start_after_the_end_and_twice() -> None:
    ran: list[int] = []
    never = Strand(lambda _: ran.append(1))
    never.abandon()
    for strand in (finished(), failed(), abandoned()):
        strand.abandon()
    assert ran == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Background processes start with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_wait_leaves_a_strand_that_can_be_abandoned() -> None:
    """Ctrl-C arrives while the strand works: it runs to its next pause and no further."""
    log: list[str] = []

    def body(strand: Strand) -> None:
        _thread.interrupt_main()
        time.sleep(0.05)
        log.append("worked")
        strand.pause(None)
        log.append("went on")

    strand = Strand(body)
    with pytest.raises(KeyboardInterrupt):
        strand.resume()
    strand.abandon()
    assert log == ["worked"]
