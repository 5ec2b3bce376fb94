"""The same adapters inside vLLM: a plugin for any of its servers, and an engine for ours."""
