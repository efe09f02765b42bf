"""`python -m bench [store|hold|stops|second …]`: run the benchmarks or groups named, all by default."""

import inspect
import sys
from pathlib import Path

# The benchmarks drive the same real agents as the tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bench.download import download
from bench.hold import hold
from bench.listing import listing
from bench.load import print_rows
from bench.memory import memory
from bench.reuse import second, ten
from bench.sealing import seal, small, verify
from bench.stops import stops

STORE = {
    "second": second,
    "small": small,
    "ten": ten,
    "listing": listing,
    "memory": memory,
    "seal": seal,
    "verify": verify,
    "download": download,
}
BENCHMARKS = {"hold": hold, "stops": stops} | STORE
GROUPS = {"store": list(STORE)}


def main(names: list[str]) -> int:
    """Run them; the exit status is 0 whatever the numbers are: a benchmark is no test."""
    unknown = [name for name in names if name not in BENCHMARKS and name not in GROUPS]
    if unknown:
        print(f"bench: no benchmark named {', '.join(unknown)}; there are\n{_overview()}", file=sys.stderr)
        return 2
    chosen = dict.fromkeys(one for name in names or BENCHMARKS for one in GROUPS.get(name, [name]))
    print_rows(row for name in chosen for row in BENCHMARKS[name]())
    return 0


def _overview() -> str:
    lines = [f"  {name:10} {inspect.getdoc(run)}" for name, run in BENCHMARKS.items()]
    lines += [f"  {name:10} all of {', '.join(members)}" for name, members in GROUPS.items()]
    return "\n".join(lines)


sys.exit(main(sys.argv[1:]))
