"""One process or many: ranks, devices, sharded weights, signals."""
