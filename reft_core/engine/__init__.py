"""The embedded engine: continuous batching on slots, one KV store, no edit code in decode."""
