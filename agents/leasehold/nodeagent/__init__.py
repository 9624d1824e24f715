"""The agent of one host: keeps its worker pools, and speaks for the host to the allocator."""
