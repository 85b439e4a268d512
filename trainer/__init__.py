"""Training, publishing and release signing on the host."""
