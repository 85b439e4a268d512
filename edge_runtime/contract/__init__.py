"""Everything two parties must agree on bit for bit. Needs numpy and msgpack, nothing else."""
