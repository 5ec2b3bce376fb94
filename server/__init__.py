"""The OpenAI-compatible HTTP server: adapters chosen per request by ``model``."""
