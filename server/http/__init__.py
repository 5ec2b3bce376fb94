"""The plumbing under every route: connections, bodies, errors, streams, start and end."""
