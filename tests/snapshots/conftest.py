import os
from collections.abc import Callable

import pytest

from support.users import OrdinaryUser


@pytest.fixture
def as_user() -> Callable[[OrdinaryUser, Callable[[], str]], str]:
    """A function that calls another one as an ordinary user, in a child, and gives what it returns."""
    return _call_as


def _call_as(user: OrdinaryUser, work: Callable[[], str]) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(user.gid, user.gid, user.gid)
                os.setresuid(user.uid, user.uid, user.uid)
            os.write(writing, work().encode())
        except BaseException as error:
            os.write(writing, f"raised {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert not answer.startswith("raised "), answer
    return answer
