"""A real server under a crowd of connections, and what HTTP costs it.

``run`` is the whole of it. ``questions`` are prompts under adapters with the one right answer to
each, ``crowd`` is the process that holds the connections, ``wire`` the bytes it speaks, and
``overhead`` compares the server with its engine alone. The server, the model and the judge of
single answers are the soak's (``benchmarks/soak``).
"""
