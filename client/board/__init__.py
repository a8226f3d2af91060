"""A board of a fleet: its configuration file, its node, and the program that keeps the node running."""
