"""The control plane's decisions: pure. Time, randomness and events come in as arguments, actions go out."""
