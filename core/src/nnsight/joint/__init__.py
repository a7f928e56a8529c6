"""Captured blocks in a run: invokes joined into one batch, their rows, and steps. Uses kernel and capture."""
