"""How often the interpreter looks for reference cycles."""

import gc

_OBJECTS = 50_000


def collect_seldom() -> None:
    """For a process that makes very many small objects and hardly any cycles: call it when all is imported.

    By default every 700 objects begin a look; of a seal of small files, these looks are a tenth of the CPU. What is
    there by now is never looked at again, nor is its memory, which forked workers share, written to.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS)
