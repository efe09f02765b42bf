"""`python -m bench [hold|stops …]`: run the benchmarks named, all by default."""

import sys
from pathlib import Path

# The benchmarks drive the same real agents as the tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from bench.hold import hold
from bench.load import print_rows
from bench.stops import stops

BENCHMARKS = {"hold": hold, "stops": stops}


def main(names: list[str]) -> int:
    """Run them; the exit status is 0 whatever the numbers are: a benchmark is no test."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"bench: no benchmark named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    print_rows(row for name in names or BENCHMARKS for row in BENCHMARKS[name]())
    return 0


sys.exit(main(sys.argv[1:]))
