"""The `metadist` command."""
