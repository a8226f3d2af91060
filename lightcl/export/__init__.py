"""Trained models outside a run: found in a folder (`folders`), read from a device's state (`model`), written to files
for other runtimes (`formats`) and compared with PyTorch (`checked`)."""
