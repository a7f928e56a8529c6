"""Plugins that ship with core, written on the public protocols only. Each can be disabled like any other."""
