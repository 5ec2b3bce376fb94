"""What talks to a running server: the chat in a terminal, and the benchmark.

Both know OpenAI's API and what this server adds to it, and nothing of its insides.
"""
