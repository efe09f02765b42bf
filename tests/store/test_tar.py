import io
import tarfile

from hypothesis import example, given, settings
from hypothesis import strategies as st

from zonebundle.store.tar import END_OF_ARCHIVE, entry_header, padding

SIZES = st.integers(0, 2**40) | st.sampled_from([0, 511, 512, 8**11 - 1, 8**11, 2**63 - 1])
SECONDS = st.integers(-(2**40), 2**40) | st.sampled_from([-1, 0, 8**11 - 1, 8**11])
PATHS = st.binary(min_size=1, max_size=300).filter(lambda path: b"\0" not in path and not path.endswith(b"/"))


@settings(deadline=None)
@given(PATHS, SIZES, st.integers(0, 0o7777), SECONDS, st.integers(0, 10**9 - 1))
@example(b"a" * 100, 0, 0, 0, 0)
@example(b"a" * 101, 0, 0, 0, 0)
@example(b"\xff" * 100, 8**11, 0o777, -1, 999_999_999)
def test_a_header_is_tarfiles_own(path: bytes, size: int, mode: int, seconds: int, nanoseconds: int) -> None:
    info = tarfile.TarInfo(path.decode("utf-8", "surrogateescape"))
    info.size, info.mode, info.mtime = size, mode, seconds
    info.uname = info.gname = "root"
    made = entry_header(path, size, mode, seconds * 10**9 + nanoseconds)
    assert made == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")

    with tarfile.open(fileobj=io.BytesIO(made + END_OF_ARCHIVE), encoding="utf-8", errors="surrogateescape") as tar:
        read = tar.next()
    assert read is not None
    assert read.name.encode("utf-8", "surrogateescape") == path
    assert (read.size, read.mode, read.mtime) == (size, mode, seconds)
    assert (read.uid, read.gid, read.uname, read.gname) == (0, 0, "root", "root")
    assert read.isreg()


def test_padding_fills_blocks() -> None:
    assert [len(padding(size)) for size in (0, 1, 511, 512, 513)] == [0, 511, 1, 0, 511]
