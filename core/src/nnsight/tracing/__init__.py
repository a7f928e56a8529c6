"""Opening a block: the tracer, the model classes, saving. Built on the kernel."""
