"""Trains ReFT adapters on a frozen base model: config in, adapter file and report out."""
