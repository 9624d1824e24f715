"""What shells share: clocks, retries, signals, background tasks, process identity."""
