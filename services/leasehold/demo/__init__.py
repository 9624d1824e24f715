"""The main job on one machine: workers share one provider's limits, and an independent verdict on it.

`python -m leasehold.demo` runs it; `provider` is a local server that enforces limits as a provider does,
`worker` replays a trace against it, and `run` plays the scenes and prints the table.
"""
