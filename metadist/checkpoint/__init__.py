"""Checkpoints and the journal: what a run leaves on disk so that nothing is lost."""
