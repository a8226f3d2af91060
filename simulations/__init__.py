"""The command line, the scenarios, the Flower runtime and the reports."""
