"""A device as a Flower ClientApp."""
