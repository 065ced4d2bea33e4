"""The engine: gradients arrive, buckets are cut, collectives are launched in one order on every rank."""
