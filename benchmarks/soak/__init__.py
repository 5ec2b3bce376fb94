"""A real server under random traffic for minutes, and then a count of everything.

``run`` is the whole of it. ``world`` makes a model and adapter files, ``server`` runs the process
and looks at it from outside, ``traffic`` decides what is asked when, ``client`` asks and says how
it ended, ``names`` knows what a name may have meant at the time, ``oracle`` what the answer had to
be, and ``audit`` what a server at rest must not have left.
"""
