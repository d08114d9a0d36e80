"""Control lines over loopback: who is let in, what goes over them, and that their end is heard at both sides."""

import os
import secrets
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import msgspec
import pytest

from shoal.parallel.control import (
    LENGTH,
    MAX_MESSAGE_BYTES,
    Beat,
    ControlError,
    ControlLine,
    Hello,
    RankStart,
    Wire,
    frame,
    prove,
)
from shoal.parallel.control_server import MAX_GUESTS, ControlServer

SECRET = bytes(range(32))
WIRE = Wire(tp=2, pp=1, wiring=b"w" * 100_000, factory="a.b:c", argument=b"x")


def hello(rank):
    return Hello(rank=rank, node="n", address="127.0.0.1", pid=1, device="cpu", versions={})


def start_of(server, secret=SECRET, rank=0):
    return RankStart(host="127.0.0.1", port=server.port, secret=secret, rank=rank)


@contextmanager
def serving(size=2):
    """A server, and a thread that polls it and keeps what it says."""
    server = ControlServer("127.0.0.1", secret=SECRET, size=size)
    heard, is_over = [], threading.Event()

    def poll():
        while not is_over.is_set():
            for event in server.poll(0.02):
                heard.append(event)
                if isinstance(event[1], Hello):
                    server.send(event[0], WIRE)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield server, heard
    finally:
        is_over.set()
        thread.join()
        server.close()


def eventually(is_so, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_so()


def was_cut(sock):
    """The other side has closed, without a word that we could read."""
    sock.settimeout(5.0)
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def proved(server, *, secret=SECRET):
    """A socket that has done the rank's part of the handshake with this secret, whatever the driver proved."""
    sock = socket.create_connection(("127.0.0.1", server.port))
    mine = secrets.token_bytes(32)
    sock.sendall(mine)
    theirs = sock.recv(32, socket.MSG_WAITALL)
    sock.recv(32, socket.MSG_WAITALL)
    sock.sendall(prove(secret, b"rank", mine, theirs))
    return sock


def test_messages_go_both_ways_and_the_end_is_heard():
    with serving() as (server, heard):
        lines = [ControlLine(start_of(server, rank=rank)) for rank in range(2)]
        for rank, line in enumerate(lines):
            line.send(hello(rank))
            assert line.receive() == WIRE
        lines[1].progress("x" * 10_000)
        lines[1].close()
        assert eventually(lambda: (1, None) in heard)
        assert len(next(message.text for rank, message in heard if rank == 1 and hasattr(message, "text"))) < 10_000
        lines[0].send(Beat("plan", 3))
        assert eventually(lambda: heard[-1] == (0, Beat("plan", 3)))
        assert heard[0] == (0, hello(0))


def test_a_rank_refuses_a_driver_without_the_secret():
    with serving() as (server, heard):
        with pytest.raises(ControlError, match="secret"):
            ControlLine(start_of(server, secret=bytes(32)))
        assert not heard


@pytest.mark.parametrize(
    "words",
    [
        b"",
        frame(Beat("plan", 1)),  # before its Hello
        frame(hello(2)),  # nobody waits for this one
        LENGTH.pack(MAX_MESSAGE_BYTES + 1),
        LENGTH.pack(4) + b"\xc1\xc1\xc1\xc1",
        frame(WIRE),  # not a rank's to say
    ],
    ids=["wrong secret", "no hello", "unknown rank", "too long", "no msgpack", "wrong kind"],
)
def test_whoever_does_not_behave_is_cut_and_disturbs_nobody(words):
    with serving() as (server, heard):
        rank = ControlLine(start_of(server))
        rank.send(hello(0))
        assert rank.receive() == WIRE
        with proved(server, secret=SECRET if words else b"guess") as sock:
            sock.sendall(words or frame(hello(1)))
            assert was_cut(sock)
        rank.send(Beat("plan", 1))
        assert eventually(lambda: heard == [(0, hello(0)), (0, Beat("plan", 1))])


def test_garbage_is_answered_with_nothing_but_a_challenge():
    with serving() as (server, heard), socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
        assert was_cut(sock)
        assert not heard


def test_a_second_rank_of_the_same_number_is_cut_and_the_first_stays():
    with serving() as (server, heard):
        first, second = (ControlLine(start_of(server)) for _ in range(2))
        first.send(hello(0))
        first.receive()
        second.send(hello(0))
        with pytest.raises((ControlError, OSError)):
            second.receive()
        first.send(Beat("plan", 1))
        assert eventually(lambda: heard[-1] == (0, Beat("plan", 1)))


def test_many_silent_guests_do_not_pile_up_and_leave_when_the_door_shuts():
    server = ControlServer("127.0.0.1", secret=SECRET, size=1)
    guests = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(MAX_GUESTS + 3)]
    for _ in range(MAX_GUESTS + 3):
        server.poll(0.0)
    assert all(was_cut(guest) for guest in guests[MAX_GUESTS:])
    server.shut_door()
    assert all(was_cut(guest) for guest in guests)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    server.close()
    server.close()
    for guest in guests:
        guest.close()


def test_the_secret_is_in_no_repr():
    assert "hush" not in repr(RankStart(host="h", port=1, secret=b"hush", rank=0))


def test_a_process_beats_and_ends_with_its_driver():
    """However deep its main thread sleeps."""
    program = """
        import sys, msgspec, signal
        from shoal.parallel.control import ControlLine, Hello, RankStart
        from shoal.parallel.station import Station

        line = ControlLine(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=RankStart))
        line.send(Hello(rank=0, node="n", address=line.address, pid=1, device="cpu", versions={}))
        line.receive()
        station = Station()
        station.at("sleep")
        line.keep(station)
        signal.pause()
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        try:
            with serving() as (server, heard):
                process.stdin.write(msgspec.msgpack.encode(start_of(server)))
                process.stdin.close()
                assert eventually(lambda: heard.count((0, Beat("sleep", 1))) >= 3, seconds=20.0)
                assert process.poll() is None
            assert process.wait(5.0) == 1
        finally:
            process.kill()
