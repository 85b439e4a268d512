"""`skiff backtest`: raw rows through the device's own windowing and the aggregator's own engine."""
