"""A run from its job file to its results."""
