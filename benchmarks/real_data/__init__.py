"""What `skiff backtest` says about recorded rows in which people had found, or we measured, what changed."""
