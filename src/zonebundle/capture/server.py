"""The hold server: a small process that forks the hold workers.

A worker has to be killable (a /proc read or an open on a hung file system cannot be interrupted in a thread) and has to
be there at once when a hundred zones stop together. Starting an interpreter takes 100 ms of CPU, forking this one a
millisecond or two, and it may fork safely because it has one thread and no event loop.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
from types import FrameType

from zonebundle.capture import worker
from zonebundle.host import syscalls
from zonebundle.host.channel import ChannelClosed, receive_message
from zonebundle.host.collector import collect_seldom


def main(open_index: worker.OpenIndex | None = None, arguments: list[str] | None = None) -> None:
    """Serve `{"fork": n}` requests, each with the worker's socket as a descriptor, until the agent's end closes.

    `open_index` is given by whoever knows stores, which a hold does not.
    """
    parser = argparse.ArgumentParser(prog="hold server")
    parser.add_argument("--fd", type=int, required=True, help="the control socket")
    parser.add_argument("--agent", type=int, required=True, help="the agent's PID")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    syscalls.die_with_parent(options.agent, signal.SIGKILL)
    # The terminal's Ctrl-C is for the agent: it ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _reap)
    control = socket.socket(fileno=options.fd)
    # Its workers are forked: they share what is imported by now, and collect as seldom.
    collect_seldom()
    while True:
        try:
            _, descriptors = receive_message(control)
        except ChannelClosed:
            sys.exit(0)
        for descriptor in descriptors:
            _fork(control, descriptor, open_index)


def _fork(control: socket.socket, descriptor: int, open_index: worker.OpenIndex | None) -> None:
    server = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        # The agent sees its end closed. All workers die with this process, so it must not end for one failed fork.
        sys.stderr.write(f"hold server: cannot fork a worker: {error}\n")
        child = -1
    if child != 0:
        os.close(descriptor)
        return
    # In the worker: nothing of the server may run on, whatever happens.
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        syscalls.die_with_parent(server, signal.SIGKILL)
        worker.serve(socket.socket(fileno=descriptor), open_index)
    except BaseException:
        worker.report_crash()
        os._exit(1)
    os._exit(0)


def _reap(_number: int, _frame: FrameType | None) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main()
