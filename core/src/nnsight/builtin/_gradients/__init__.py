"""Gradients inside a block: where they are taken, who runs backward, and what checkpointing needs for them."""
