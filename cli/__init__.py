"""The `skiff` command: the composition root of the host."""
