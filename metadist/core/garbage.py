"""How often Python looks for cyclic garbage.

Imports make half a million objects that stay, and looking through all of them again and again takes a fifth of a
command's start. Computing does leave garbage behind, though little memory with it.
"""

import gc

RARELY = 50_000
_usual = gc.get_threshold()


def look_rarely() -> None:
    """While a command starts: once there are 50,000 objects more."""
    global _usual
    _usual = gc.get_threshold()
    gc.set_threshold(RARELY, *_usual[1:])


def look_as_usual() -> None:
    """As often as before `look_rarely`, where that was called: from when a fleet computes, or speed is measured."""
    if gc.get_threshold()[0] == RARELY:
        gc.set_threshold(*_usual)
