"""Measures what a user of an engine waits for: a load of requests, the times of their tokens, percentiles."""
