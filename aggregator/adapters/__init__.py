"""Where the aggregator keeps control state and telemetry."""
