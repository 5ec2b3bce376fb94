"""lm-eval against ``reft serve``: does a harness that nobody here wrote get the right numbers?

A server runs in a process of its own, in float32, and the harness asks it over HTTP, as its users
would: `local-completions` scores given answers (``echo`` with ``logprobs``) and writes its own,
`local-chat-completions` asks the base model and an adapter. Its tasks, ``tasks/*.yaml``, read data
from the folder that ``--data`` names, of which nothing is kept here.

Correctness gate: of every item scored, the log-likelihood that the harness reports agrees with
what transformers computes for the same text without this server, to 1e-3.

The last line printed is JSON; the same goes to ``results/lm-eval.json``.
"""
