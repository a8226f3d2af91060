"""The server of a fleet of boards: its folder, its certificates, its devices, Flower's SuperLink and the runs on it."""
