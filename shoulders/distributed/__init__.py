"""One process or many: ranks, devices, shards, signals."""
