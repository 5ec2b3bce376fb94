"""``reft compare``: many methods on one task under equal data, steps and search effort."""
