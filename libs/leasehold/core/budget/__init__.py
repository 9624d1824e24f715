"""Budget leases: fair sharing, the allocator's lease machine, the holder's limiter."""
