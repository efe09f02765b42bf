"""The program that supervises one zone: `python -I -S supervise.py ZONE`; what it does is in supervisor.py.

Two files, because a program's own file is compiled at every start and a module once: 6 ms and 1 MB for each zone.
"""

import os
import sys

if __name__ == "__main__":
    # -I and -S keep the interpreter from everything but the standard library; this package has to be shown to it.
    sys.path.append(__file__.rpartition("/zonebundle/")[0])
    from zonebundle.runtimes.supervisor import main

    # Whoever stops the zone waits for this process: nothing in it needs the interpreter's own end, which takes 2 ms.
    os._exit(main())
