"""Shared segments and the cells in them: what is published is seen, sleepers are woken, absence is told."""

import threading
import time
import uuid
from pathlib import Path

import pytest

from shoal.parallel import shm
from shoal.parallel.layout import LinePlan
from shoal.parallel.peer import PeerTimeout
from shoal.parallel.shm import CELL_BYTES, Cell, Patience, Segment, unlink
from shoal.parallel.shm_line import LineReader, LineWriter

MODES = [Patience(), Patience(yield_s=0.001), Patience(spin_s=0.001)]


@pytest.fixture
def name():
    name = f"shoal-test-{uuid.uuid4().hex}"
    yield name
    unlink(name)


def test_two_mappings_are_one_memory(name):
    made = Segment.create(name, 4096)
    found = Segment.open(name, 4096, timeout_s=1)
    assert found is not None
    made.memory[100:105] = b"hello"
    assert found.memory[100:105] == b"hello"


def test_memory_outlives_its_name(name):
    made = Segment.create(name, 4096)
    found = Segment.open(name, 4096, timeout_s=1)
    unlink(name)
    unlink(name)
    assert Segment.open(name, 4096, timeout_s=0) is None
    made.memory[0] = 7
    assert found.memory[0] == 7


def test_is_for_this_user_alone(name):
    Segment.create(name, 4096)
    assert (Path("/dev/shm") / name).stat().st_mode & 0o777 == 0o600


def test_what_does_not_fit_says_so_and_leaves_nothing(name):
    with pytest.raises(OSError, match=r"MiB of shared memory do not fit into /dev/shm, which has \d+.* MiB free"):
        Segment.create(name, 2**50)
    assert not (Path("/dev/shm") / name).exists()


@pytest.mark.parametrize("patience", MODES, ids=str)
def test_cell_is_awaited(name, patience):
    segment = Segment.create(name, 4096)
    cell = Cell(segment, 0)
    waiter = Cell(segment, 0, waiter=3, patience=patience)
    threading.Timer(0.05, cell.publish, [5]).start()
    assert not waiter.wait_for(1, 0.001)
    assert waiter.wait_for(5, 30)
    assert waiter.wait_for(4, 0)
    assert not waiter.wait_for(6, 0.01)


def test_no_wake_up_is_lost(name, monkeypatch):
    monkeypatch.setattr(shm, "_LONGEST_SLEEP_S", 60.0)  # else a sleeper that was missed would look around by itself
    segment = Segment.create(name, 4096)
    there, back = Cell(segment, 0), Cell(segment, CELL_BYTES)
    rounds, heard = 3000, []

    def answer():
        for number in range(1, rounds + 1):
            heard.append(there.wait_for(number, 20))
            back.publish(number)

    thread = threading.Thread(target=answer)
    thread.start()
    for number in range(1, rounds + 1):
        there.publish(number)
        assert back.wait_for(number, 20)
    thread.join()
    assert all(heard)


def test_all_sleepers_are_woken(name, monkeypatch):
    monkeypatch.setattr(shm, "_LONGEST_SLEEP_S", 60.0)
    segment = Segment.create(name, 4096)
    came = []
    sleepers = [
        threading.Thread(target=lambda i=i: came.append(Cell(segment, 0, waiter=i).wait_for(1, 20))) for i in range(5)
    ]
    for sleeper in sleepers:
        sleeper.start()
    time.sleep(0.1)
    Cell(segment, 0).publish(1)
    for sleeper in sleepers:
        sleeper.join()
    assert came == [True] * 5


# Lines


def line(name, *, capacity=256, readers=(4,), deadline_s=20.0):
    plan = LinePlan(CELL_BYTES, capacity, writer=9, readers=readers)
    segment = Segment.create(name, plan.end)
    writer = LineWriter(segment, plan, patience=Patience(), deadline_s=deadline_s)
    ends = [LineReader(segment, plan, reader=r, patience=Patience(), deadline_s=deadline_s) for r in readers]
    return writer, ends


def test_messages_of_all_lengths_arrive_in_order_at_every_reader(name):
    writer, readers = line(name, capacity=256, readers=(0, 1, 2))
    # Up to several rings long, through every offset at which the ring can wrap.
    messages = [bytes([i % 251]) * (i * 37 % 700) for i in range(400)]
    got = [[], [], []]

    def read(reader, out):
        for _ in messages:
            out.append(reader.receive())

    threads = [threading.Thread(target=read, args=pair) for pair in zip(readers, got, strict=True)]
    for thread in threads:
        thread.start()
    for message in messages:
        writer.send(message)
    for thread in threads:
        thread.join()
    assert got == [messages] * 3


def test_a_reader_may_poll(name):
    writer, (reader,) = line(name)
    assert not reader.poll(0.0)
    writer.send(b"one")
    writer.send(b"")
    assert reader.poll(0.0)
    assert reader.receive() == b"one"
    assert reader.poll(0.0)
    assert reader.receive() == b""
    assert not reader.poll(0.01)


def test_what_is_sent_may_change_afterwards(name):
    writer, (reader,) = line(name)
    message = bytearray(b"before")
    writer.send(memoryview(message))
    message[:] = b"after."
    assert reader.receive() == b"before"


def test_a_writer_names_the_reader_that_makes_no_room(name):
    writer, (quick, _) = line(name, readers=(4, 6), deadline_s=0.05)
    writer.send(bytes(200))
    quick.receive()
    with pytest.raises(PeerTimeout, match="rank 6") as caught:
        writer.send(bytes(100))
    assert caught.value.peer == 6


def test_a_reader_names_the_writer_that_sends_nothing(name):
    _, (reader,) = line(name, deadline_s=0.05)
    with pytest.raises(PeerTimeout, match="rank 9") as caught:
        reader.receive()
    assert caught.value.peer == 9
