"""Who calls: keys with their tenants, scopes and rates, and what each request may do."""

from server.keys.door import Door
from server.keys.key import Key, NewKey
from server.keys.principal import ANYONE, Limits, Principal
from server.keys.rates import FREE, Caller, Rates
from server.keys.store import KeyStore

__all__ = [
    "ANYONE",
    "FREE",
    "Caller",
    "Door",
    "Key",
    "KeyStore",
    "Limits",
    "NewKey",
    "Principal",
    "Rates",
]
