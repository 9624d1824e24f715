"""The allocator: replicas elect a leader, which leases budgets over gRPC."""
