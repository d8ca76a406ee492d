"""One folder per storage format, each with its reference and its fast implementations; see registry.py."""
