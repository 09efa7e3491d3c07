"""Who computes which chunk: the controller, the dispatcher, workers and server, in one process or as Ray actors."""
