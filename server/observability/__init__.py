"""What is learnt of requests and of the engine: metrics, records, logs, traces."""
