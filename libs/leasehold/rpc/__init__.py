"""gRPC, set up once: servers, channels, and core errors as statuses."""
