"""Attacks on the server and on the reader of adapter files, by ``python -m benchmarks.fuzz``.

:mod:`~benchmarks.fuzz.contract` sends what the OpenAPI document allows, and what it does not, and
holds every answer to that document. :mod:`~benchmarks.fuzz.wire` sends bytes that no client would.
:mod:`~benchmarks.fuzz.files` feeds damaged adapter files to the reader and the engine, and
:mod:`~benchmarks.fuzz.conversions` damaged files of other libraries to the converters. All of it is
repeatable by its seed.
"""
