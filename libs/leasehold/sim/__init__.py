"""Traces, auditors, and a deterministic world with faults for the budget core."""
