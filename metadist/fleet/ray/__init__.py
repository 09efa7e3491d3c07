"""The fleet as Ray actors: the only room that imports Ray."""
