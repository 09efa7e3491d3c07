import gc

from metadist.core.garbage import USUAL, look_as_usual, look_rarely
from metadist.fleet.local import LocalFleet


def test_garbage_is_looked_for_rarely_and_then_as_usual():
    before = gc.get_threshold()
    try:
        look_rarely()
        assert gc.isenabled() and gc.get_threshold() == (50_000, *USUAL[1:])
        look_as_usual()
        assert gc.get_threshold() == USUAL
        look_rarely()
        LocalFleet(lambda: None).close()
        assert gc.get_threshold() == USUAL
    finally:
        gc.set_threshold(*before)
