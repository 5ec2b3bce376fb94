"""Traces: whose request this is part of, and, on request, telling a collector about it."""
