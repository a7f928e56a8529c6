"""What plain torch says about the gradients of a module, for the tests of traced backward passes."""

import copy


def expected_gradients(net, x, *paths, edit=None):
    """Return what `retain_grad` gives for the outputs of modules, and the gradients of all parameters."""
    net = copy.deepcopy(net)
    outputs = {}

    def hook(path):
        def keep(module, args, output):
            output.retain_grad()
            outputs[path] = output
            if edit is not None:
                output.register_hook(lambda gradient: edit(path, gradient))

        return keep

    for path in paths:
        net.get_submodule(path).register_forward_hook(hook(path))
    net(x).sum().backward()
    return [outputs[path].grad for path in paths], {name: one.grad for name, one in net.named_parameters()}


def parameter_gradients(net):
    return {name: one.grad for name, one in net.named_parameters()}
