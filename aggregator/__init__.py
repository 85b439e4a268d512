"""The central drift aggregator and rollout coordinator."""
