"""How results are measured: the protocol, its intervals, the baselines on the same tasks, figures."""
