"""LightCL: continual learning on one edge device within a few dozen megabytes."""
