"""Payloads changed at random, in a process that may take 200 MB more: `python fuzz.py 10000`.

Each is an honest payload with bytes changed, cut or repeated; or its header with values replaced, moved or dropped and
packed again; or bytes of any kind. Reading must end in a `PayloadError` or in a payload that can be opened, never in
another error, a crash or a hang. No block is run, but functions and classes are made: the texts among the values that
replace others are harmless.
"""

from __future__ import annotations

import copy
import resource
import sys
import time

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sent import Sent
from torch import nn

from nnsight import NNsight, PayloadError, payload
from nnsight.payload import container

ROOM = 200 << 20
SECONDS = 5


class Setting:
    def __init__(self):
        self.size, self.me = 2, self

    def get(self):
        return self.size


def plus(value, by=1):
    return value + by


def make(model):
    count, table, flags, setting, layer = 0, torch.arange(6.0), torch.tensor([True, False]), Setting(), model[0]
    array, many = table.numpy()[::2], [{"a": (1, 2.5)}, {3}, slice(1), 1j, b"x", range(3), torch.float16]
    many.append(many[0])

    def bump():
        nonlocal count
        count += 1

    sent = Sent(model, torch.ones(2, 4))
    with sent:
        bump()
        layer.output = plus(layer.output) * setting.get() + table[0] + flags.sum() + float(array.sum()) + len(many)
    return sent.bytes


words = [
    "decimal", "path", "given", "alias",
    "list", "dict", "shared", "tensor", "array", "function", "class", "instance", "namespace", "float32", "model.0",
    "with _:\n  pass\n", "def f(): pass\n", "class C: pass\n", "lambda: 0", "x = 1\n",
]  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 12), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8), st.sampled_from(words),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
numbers = st.integers(0, 1 << 20)
ways = st.sampled_from(["replace", "drop", "move", "grow"])
changes = st.lists(st.tuples(numbers, ways, values), min_size=1, max_size=3)
bites = st.lists(
    st.tuples(numbers, st.sampled_from(["set", "cut", "again", "end"]), st.binary(max_size=9)), min_size=1, max_size=4
)
headers = st.tuples(st.just("header"), changes)
cases = st.one_of(
    headers, headers, st.tuples(st.just("results"), changes), st.tuples(st.sampled_from(["bytes", "content"]), bites),
    st.tuples(st.just("any"), st.binary(max_size=200)),
)  # fmt: skip


def places(value, found):
    """Every place in some JSON: a container and a key."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        found.append((value, key))
        if isinstance(value[key], list | dict):
            places(value[key], found)
    return found


def change_header(header, pieces, todo):
    header = copy.deepcopy(header)
    for number, how, new in todo:
        sent = header.get("sent")
        known = places(sent if number % 5 and isinstance(sent, dict | list) else header, [])
        if not known:
            break
        where, key = known[(number // 5) % len(known)]
        if how == "replace":
            where[key] = new
        elif how == "drop":
            del where[key]
        elif how == "move":
            other, name = known[(number // 7) % len(known)]
            where[key] = copy.deepcopy(other[name])
        elif isinstance(where, list):
            where.insert(key, new)
    return header, pieces


def change_bytes(data, todo):
    for number, how, new in todo:
        at = number % (len(data) + 1)
        if how == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "cut":
            data = data[:at] + data[at + len(new) :]
        elif how == "again":
            data = data[:at] + data[at // 2 :]
        else:
            data = data[:at]
    return data


def main(count):
    torch.set_num_threads(1)
    model = NNsight(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    honest = make(model)
    header, pieces = container.read(honest)
    content = container.zstd().decompress(honest[6:])
    table = torch.arange(6.0)
    saved = {"a": [table, table[1:], {"b": (1, 2.5, None)}], "s": {3}, "m": model[0], "r": range(3), "n": table.numpy()}
    honest_headers = {
        "header": (header, pieces),
        "results": container.read(b"".join(payload.write_results(saved, model))),
    }
    tally = {"read": 0, "refused": 0}
    slowest = [0.0]

    def receive(case):
        kind, what = case
        if kind in ("header", "results"):
            try:
                data = b"".join(container.write(*change_header(*honest_headers[kind], what)))
            except (UnicodeEncodeError, ValueError):
                return
        elif kind == "bytes":
            data = change_bytes(honest, what)
        elif kind == "content":
            data = honest[:6] + container.zstd().compress(change_bytes(content, what))
        else:
            data = what
        start = time.process_time()  # a busy machine is no slow payload; what waits for ever ends with the test
        try:
            if kind == "results":
                payload.Results(data, model, limit=100 << 20)
            else:
                run = payload.Run(data, limit=100 << 20)
                run.check(model)
                run.open(model.get, lambda path: model.get(path)._module, called=lambda name: f"<{name}>")
            tally["read"] += 1
        except PayloadError:
            tally["refused"] += 1
        taken = time.process_time() - start
        assert taken < SECONDS, f"it took {taken:.1f} seconds"
        slowest[0] = max(slowest[0], taken)

    receive(("bytes", [(0, "set", honest[:1])]))
    assert tally["read"] == 1, "the honest payload must be read"
    # What hypothesis makes once, of all characters there are, is not ours to pay for.
    settings(max_examples=1, database=None)(given(cases)(lambda case: None))()
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    checks = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    run_all = settings(max_examples=count, deadline=None, database=None, suppress_health_check=checks)
    run_all(given(cases)(receive))()
    told = f"{tally['read']} read, {tally['refused']} refused, the slowest took {slowest[0] * 1e3:.0f} ms"
    print(f"{count} payloads: {told}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
