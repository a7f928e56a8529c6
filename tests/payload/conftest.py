"""Sending values through the tables of a payload, as JSON text, without a container."""

from __future__ import annotations

import json

import pytest

from nnsight.payload.defining import Definitions
from nnsight.payload.describing import Descriptions
from nnsight.payload.packing import Packer
from nnsight.payload.unpacking import Unpacker
from nnsight.payload.views import Views


@pytest.fixture
def send():
    """A function that returns what arrives of a value; of several values, a list."""

    def send(*values, root=None):
        packer = Packer(root, "prog.py:7")
        packer.descriptions = Descriptions(packer)
        data = [packer.named("The variable 'x'", value) for value in values]
        definitions = packer.descriptions.finish()
        pieces = []

        def put(piece):
            pieces.append(piece.clone())
            return len(pieces) - 1

        text = json.dumps([data, packer.shared, definitions, packer.tensors.lay(put)])
        data, shared, definitions, tensors = json.loads(text)
        modules = {} if root is None else {path: envoy._module for path, envoy in root.named_modules()}
        find = None if root is None else root.get
        unpacker = Unpacker(shared, Views(tensors, lambda number: pieces[number].clone()), find, modules.__getitem__)
        unpacker.definitions = Definitions(definitions, unpacker, lambda name: f"<{name}, sent>")
        arrived = [unpacker.value(value) for value in data]
        unpacker.definitions.fill()
        send.bytes = sum(len(piece) for piece in pieces)
        return arrived if len(arrived) > 1 else arrived[0]

    return send
