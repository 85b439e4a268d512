"""Pure fleet logic: time, randomness and events come in as arguments, actions go out."""
