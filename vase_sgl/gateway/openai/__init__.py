"""An OpenAI-compatible HTTP door: the same tenants, limits, records and replay as over gRPC."""
