"""What talks to a running server: the chat in a terminal, the benchmark, the admin's commands.

They know OpenAI's API and what this server adds to it, and nothing of its insides.
"""
