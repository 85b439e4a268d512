"""One MQTT connection that trusts its broker with nothing; `edge_runtime.link` keeps one up."""
