"""What an operator may set: the settings, where they come from, and their page."""

from server.settings.settings import Settings, is_loopback

__all__ = ["Settings", "is_loopback"]
