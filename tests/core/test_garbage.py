import gc

import pytest

from metadist.core.garbage import look_as_usual, look_rarely
from metadist.fleet.local import LocalFleet


@pytest.mark.parametrize("then", [look_as_usual, lambda: LocalFleet(lambda: None).close()])
@pytest.mark.parametrize("own", [(700, 10, 10), (123, 4, 5)])
def test_garbage_is_looked_for_rarely_until_tasks_are_computed(own, then):
    before = gc.get_threshold()
    try:
        gc.set_threshold(*own)
        then()
        assert gc.get_threshold() == own
        look_rarely()
        assert gc.isenabled() and gc.get_threshold() == (50_000, *own[1:])
        then()
        assert gc.get_threshold() == own
    finally:
        gc.set_threshold(*before)
