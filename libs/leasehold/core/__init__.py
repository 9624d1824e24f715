"""Pure logic: events in, effects out; time and randomness are inputs."""
