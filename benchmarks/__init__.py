"""Peers side by side, one run, ratios. Never installed."""
