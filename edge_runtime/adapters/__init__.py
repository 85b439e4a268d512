"""What the device core asks for, performed: slots, outbox, probes and sources."""
