"""How fast models are on this machine: timed in turns, beside one another."""
