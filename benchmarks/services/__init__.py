"""Real programs that the server works with, run in temporary folders for tests and benchmarks."""
