"""The command line: `leasehold`."""
