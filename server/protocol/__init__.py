"""The bodies of OpenAI's API, as pydantic models: what is accepted and what is answered."""
