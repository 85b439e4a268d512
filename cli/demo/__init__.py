"""`skiff demo`: the whole loop on real data, every step verified."""
