"""REST, metrics and an OpenAPI document for people and programs that speak HTTP. It keeps nothing."""
