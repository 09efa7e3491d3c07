"""How often Python looks for cyclic garbage.

Imports make half a million objects that stay, and looking through all of them again and again takes a fifth of a
command's start. Computing does leave garbage behind, with tensors in it.
"""

import gc

USUAL = gc.get_threshold()


def look_rarely() -> None:
    """While a process starts: every 50,000 objects."""
    gc.set_threshold(50_000, *USUAL[1:])


def look_as_usual() -> None:
    """As often as Python does, from when tasks are computed."""
    gc.set_threshold(*USUAL)
