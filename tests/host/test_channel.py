import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zonebundle.host import channel
from zonebundle.host.channel import Channel, ChannelClosed, channel_pair, receive_message, send_message

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = channel_pair()
    yield one, other
    one.close()
    other.close()


Ends = tuple[socket.socket, socket.socket]


def test_messages_keep_their_borders_and_their_order(ends: Ends) -> None:
    sent: list[dict[str, Any]] = [{"n": 1}, {}, {"text": "é\n\udcff"}, {"list": [None, True, 1.5]}]
    for message in sent:
        send_message(ends[0], message)
    assert [receive_message(ends[1])[0] for _ in sent] == sent


def test_descriptors_travel_and_are_closed_on_exec(ends: Ends, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    send_message(ends[0], {"take": "this"}, (descriptor, descriptor))
    os.close(descriptor)
    message, received = receive_message(ends[1])
    try:
        assert message == {"take": "this"}
        assert len(received) == 2
        assert os.pread(received[0], 100, 0) == b"content"
        assert not any(map(os.get_inheritable, received))
    finally:
        for descriptor in received:
            os.close(descriptor)


def test_both_ends_are_private_to_this_process(ends: Ends) -> None:
    assert not any(end.get_inheritable() for end in ends)


def test_the_peers_end_is_told_on_both_sides(ends: Ends) -> None:
    send_message(ends[0], {"last": "words"})
    ends[0].close()
    assert receive_message(ends[1]) == ({"last": "words"}, [])
    with pytest.raises(ChannelClosed):
        receive_message(ends[1])
    with pytest.raises(ChannelClosed):
        send_message(ends[1], {})


def test_a_peer_that_closes_with_messages_unread_is_closed_too(ends: Ends) -> None:
    send_message(ends[1], {"never": "read"})
    ends[0].close()
    with pytest.raises(ChannelClosed):
        receive_message(ends[1])


def test_a_send_to_the_dead_raises_no_signal() -> None:
    # SIGPIPE would end a process that has not asked Python to ignore it.
    script = (
        "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "from zonebundle.host.channel import *\n"
        "one, other = channel_pair(); other.close()\n"
        "try: send_message(one, {})\n"
        "except ChannelClosed: print('told')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n")


def test_a_peer_that_does_not_read_blocks_nobody(ends: Ends) -> None:
    end = Channel(ends[0])
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            end.send({"number": sent, "filler": "x" * 1000})
            sent += 1
    assert sent > 10
    for number in range(sent):
        assert receive_message(ends[1])[0]["number"] == number
    end.send({"number": sent})


def test_a_message_that_the_other_end_could_not_take_is_not_sent(ends: Ends) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        send_message(ends[0], {}, (0,) * (channel._DESCRIPTORS + 1))
    ends[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        receive_message(ends[1])


@pytest.mark.usefixtures("leak_check")
def test_a_message_longer_than_the_socket_takes_arrives_with_its_descriptors(ends: Ends) -> None:
    message = {"text": "x" * (4 * channel._MESSAGE)}
    reader, writer = os.pipe()
    send_message(ends[0], message, (writer,))
    os.close(writer)
    received, descriptors = receive_message(ends[1])
    assert received == message
    os.write(descriptors[0], b"x")
    assert os.read(reader, 1) == b"x"
    for descriptor in (reader, *descriptors):
        os.close(descriptor)


def test_the_longest_message_that_the_socket_takes_arrives(ends: Ends) -> None:
    message = {"text": "x" * (channel._MESSAGE - len('{"text":""}'))}
    send_message(ends[0], message)
    assert receive_message(ends[1])[0] == message


@pytest.mark.parametrize("data", [b"{", b"\xff", b'{"a": 1}' + b" " * (256 << 10)])
def test_a_broken_message_leaves_no_descriptor(ends: Ends, data: bytes) -> None:
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    socket.send_fds(ends[0], [data[:180_000]], [0])
    with pytest.raises(ValueError, match=r"\S"):
        receive_message(ends[1])


def test_descriptors_that_cannot_be_taken_are_an_error_and_not_forgotten() -> None:
    script = """
import os, resource
from zonebundle.host.channel import *
one, other = channel_pair()
send_message(one, {"take": "these"}, (0, 1, 2))
limit = max(map(int, os.listdir("/proc/self/fd")))
before = os.listdir("/proc/self/fd")
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try: receive_message(other)
except OSError as error: print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "too many are open" in done.stdout


async def test_a_channel_waits_for_the_next_message(ends: Ends) -> None:
    end = Channel(ends[0])
    waiting = asyncio.ensure_future(end.receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    send_message(ends[1], {"n": 1})
    assert await waiting == ({"n": 1}, [])


async def test_a_cancelled_wait_loses_no_message(ends: Ends) -> None:
    end = Channel(ends[0])
    waiting = asyncio.ensure_future(end.receive())
    await asyncio.sleep(0)
    send_message(ends[1], {"n": 1})
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await end.receive() == ({"n": 1}, [])


async def test_the_death_of_the_peer_wakes_the_wait() -> None:
    ours, theirs = channel_pair()
    end = Channel(ours)
    child = subprocess.Popen(["sleep", "1000"], pass_fds=[theirs.fileno()])  # noqa: ASYNC220
    theirs.close()
    waiting = asyncio.ensure_future(end.receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    child.kill()
    child.wait()
    with pytest.raises(ChannelClosed):
        await waiting
    end.close()


async def test_closing_leaves_whoever_gets_the_descriptors_number_next_alone(ends: Ends) -> None:
    end = Channel(ends[0])
    number = ends[0].fileno()
    receiving = asyncio.create_task(end.receive())
    await asyncio.sleep(0)
    receiving.cancel()
    end.close()
    reader, writer = os.pipe()
    if reader != number:
        os.dup2(reader, number)
        os.close(reader)
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(number, readable.set)
    try:
        await asyncio.gather(receiving, return_exceptions=True)
        os.write(writer, b"x")
        await asyncio.wait_for(readable.wait(), 5)
    finally:
        loop.remove_reader(number)
        os.close(number)
        os.close(writer)


async def test_closing_ends_the_receiver(ends: Ends) -> None:
    end = Channel(ends[0])
    receiving = asyncio.create_task(end.receive())
    await asyncio.sleep(0)
    end.close()
    with pytest.raises(ChannelClosed):
        await asyncio.wait_for(receiving, 5)
