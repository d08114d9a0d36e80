"""Plans and results over the network: in order, both ways, for those alone who were told the key."""

import socket

import pytest
import zmq

from shoal.parallel.channel import Hub, Spoke
from shoal.parallel.peer import PeerTimeout

LOOPBACK = "127.0.0.1"


@pytest.fixture
def hub():
    hub = Hub(LOOPBACK, [2, 3], deadline_s=20.0)
    yield hub
    hub.close()


@pytest.fixture
def spokes(hub):
    spokes = [Spoke(LOOPBACK, hub.port, hub.key, rank=rank, deadline_s=20.0) for rank in (2, 3)]
    hub.await_ranks()
    yield spokes
    for spoke in spokes:
        spoke.close()


def test_every_rank_gets_every_message_in_order(hub, spokes):
    messages = [b"%d" % i * i for i in range(200)] + [b"", bytes(2**21)]
    for message in messages:
        hub.send(message)
    for spoke in spokes:
        assert [spoke.receive() for _ in messages] == messages


def test_answers_come_back_in_order(hub, spokes):
    assert not hub.poll(0.01)
    for i in range(50):
        spokes[1].send(b"answer %d" % i)
    for i in range(50):
        assert hub.poll(20)
        assert hub.receive() == b"answer %d" % i


def test_what_was_sent_last_gets_out_before_the_end(hub, spokes):
    spokes[0].send(bytes(2**20))
    spokes[0].close()
    assert hub.poll(20)
    assert len(hub.receive()) == 2**20


def test_who_has_another_key_is_not_heard(hub):
    stranger = Spoke(LOOPBACK, hub.port, zmq.curve_keypair()[0], rank=2, deadline_s=0.2)
    stranger.send(b"result")
    assert not hub.poll(0.5)
    stranger.close()


def test_who_has_no_key_is_not_heard(hub):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(f"tcp://{LOOPBACK}:{hub.port}")
        socket.send(b"result")
        assert not hub.poll(0.5)


def test_an_absent_rank_is_named():
    hub = Hub(LOOPBACK, [2, 3], deadline_s=0.5)
    spoke = Spoke(LOOPBACK, hub.port, hub.key, rank=2, deadline_s=0.5)
    with pytest.raises(PeerTimeout, match="rank 3") as caught:
        hub.await_ranks()
    assert caught.value.peer == 3
    with pytest.raises(PeerTimeout, match="rank 3"):
        hub.send(b"plan")
    spoke.close()
    hub.close()
    hub.close()


def test_listens_on_its_own_address_alone(hub):
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", hub.port), timeout=5):
        pass
    socket.create_connection((LOOPBACK, hub.port), timeout=5).close()
