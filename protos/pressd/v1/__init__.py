"""The promise: generated protobuf and gRPC code of package `pressd.v1` (built, never committed)."""
