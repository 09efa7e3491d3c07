"""`python -m metadist`, the same as the `metadist` command."""

from metadist.cli.main import main

main()
