"""Taking the body of a `with` block out of its frame: find it, compile it as a closure, leave it where it stands.

Needed where a block must wait for its turn, be repeated, or travel. Pure Python: nothing here
knows torch or the kernel.
"""
