"""The microkernel: one run of a model, and the blocks that take turns with it. README.md shows a run.

Nothing here knows about tracing syntax, plugins or model libraries.
"""
