"""Jobs: their lives, and the CPUs and memory of nodes that they have."""
