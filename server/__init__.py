"""The server of a fleet as a Flower ServerApp."""
