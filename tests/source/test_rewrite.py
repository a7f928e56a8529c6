"""Rewriting changes nothing that code computes: modules of the standard library with every function rewritten."""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import difflib
import fractions
import graphlib
import importlib.util
import inspect
import io
import ipaddress
import json.decoder
import json.encoder
import pickle
import pprint
import random
import shlex
import statistics
import string
import sys
import textwrap
import tokenize
import typing
import urllib.parse
from types import CellType, FunctionType

import pytest
from torch import nn

from nnsight_source.errors import SourceError
from nnsight_source.rewrite import OPERATORS, rewritten
from nnsight_source.syntax import CALL, VALUE

TEXT = inspect.getsource(textwrap)


class Visits:
    """What rewritten functions pass through, without a run: everything goes on as it is, and is counted."""

    def __init__(self):
        self.count = 0
        cells = {CALL: self.call, VALUE: self.value, **OPERATORS}
        self.cells = {name: CellType(function) for name, function in cells.items()}

    def call(self, index, function, /, *args, **kwargs):
        self.count += 1
        return function(*args, **kwargs)

    def value(self, index, value, /):
        self.count += 1
        return value

    def rewrite(self, function):
        """Return a function rewritten; itself where it is none, or has no source."""
        if not isinstance(function, FunctionType):
            return function
        try:
            code = rewritten(function).code
        except SourceError:
            return function
        own = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        closure = tuple(self.cells.get(name) or own[name] for name in code.co_freevars)
        new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        new.__kwdefaults__ = function.__kwdefaults__
        new.__dict__.update(function.__dict__)
        return new

    def rewrite_all(self, holder, module):
        """Rewrite every function of a module, and every method of its classes, in place."""
        for name, found in list(vars(holder).items()):
            if isinstance(found, FunctionType) and found.__module__ == module.__name__:
                setattr(holder, name, self.rewrite(found))
            elif isinstance(found, staticmethod | classmethod) and isinstance(found.__func__, FunctionType):
                setattr(holder, name, type(found)(self.rewrite(found.__func__)))
            elif isinstance(found, property):
                parts = (part and self.rewrite(part) for part in (found.fget, found.fset, found.fdel))
                setattr(holder, name, property(*parts, found.__doc__))
            elif isinstance(found, type) and found.__module__ == module.__name__ and holder is module:
                self.rewrite_all(found, module)


def second(module):
    """Import a module of the standard library once more, beside the one that everybody uses."""
    name = f"second_{module.__name__.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    try:
        spec.loader.exec_module(made)
    finally:
        del sys.modules[name]
    return made


def diffs(module):
    left, right = TEXT.splitlines(), TEXT.replace("width", "breadth").splitlines()
    matcher = module.SequenceMatcher(None, TEXT[:300], TEXT[100:500])
    table = module.HtmlDiff().make_table(left[:20], right[:20])
    near = module.get_close_matches("wrapp", TEXT.split())
    return list(module.unified_diff(left, right)), list(module.ndiff(left, right)), matcher.ratio(), table, near


def unparsed(module):
    source = "\n".join(inspect.getsource(one) for one in (ast, textwrap, difflib))
    return module.unparse(ast.parse(source)), module.dump(ast.parse(TEXT), indent=1)


def encoded(module):
    module.c_make_encoder = None
    value = {"a": [1, 2.5, None, True, {"b": "\u1234\n"}], "c": {}, "d": [float("inf")], "e": []}
    return [module.JSONEncoder(indent=indent, sort_keys=True).encode(value) for indent in (None, 2)]


def decoded(module):
    decoder = module.JSONDecoder(parse_float=fractions.Fraction)
    decoder.parse_string, decoder.scan_once = module.py_scanstring, json.scanner.py_make_scanner(decoder)
    errors = []
    for wrong in ("[1,", '{"a" 1}', '"\\x"', "nul"):
        with pytest.raises(ValueError) as raised:
            decoder.decode(wrong)
        errors.append(str(raised.value))
    return decoder.decode('{"a": [1, 2.50, "\\u00e4\\n"], "b": {"c": null}}'), errors


def wrapped(module):
    text = module.dedent("    one two three\n      four five, six-seven\n" * 4)
    return module.wrap(text, 17), module.fill(text, 30, initial_indent="> "), module.shorten(text, 25), text


def scattered(module):
    source = module.Random(3)
    drawn = [
        source.gauss(0, 1),
        source.sample(range(50), 7),
        source.choices("abc", [1, 2, 3], k=9),
        source.randbytes(4),
    ]
    shuffled = list(range(9))
    source.shuffle(shuffled)
    draws = (source.triangular, source.betavariate, source.vonmisesvariate, source.gammavariate)
    return drawn, shuffled, [draw(1.5, 2.5) for draw in draws], source.randrange(1, 99, 7)


def measured(module):
    data = [1.5, 2.5, 2.5, 2.75, 3.25, 4.75]
    normal = module.NormalDist.from_samples(data)
    kinds = ("mean", "median", "mode", "stdev", "pvariance", "harmonic_mean", "geometric_mean", "multimode")
    fits = module.linear_regression(data, data[::-1]), normal.cdf(3), (normal + 1).inv_cdf(0.3), normal.quantiles(5)
    return [getattr(module, kind)(data) for kind in kinds], [*map(str, fits)], module.quantiles(data)


def divided(module):
    one, other = module.Fraction("3.1415926535"), module.Fraction(22, 7)
    results = (
        one + other,
        one * other,
        one // other,
        divmod(one, other),
        one**2,
        round(one, 3),
        one.limit_denominator(9),
    )
    return [*map(str, results)], one < other, hash(one), float(other), other == 22 / 7


def printed(module):
    value = {"name": ["x" * 30] * 4, ("t",): {1, 2, 3}, "deep": {"deep": {"deep": [*range(30)]}}, "text": "y z " * 40}
    return module.pformat(value, width=40), module.pformat(value, compact=True, depth=2), module.saferepr(value)


def tokens(module):
    read = io.BytesIO(TEXT.encode()).readline
    found = [tuple(token)[:4] for token in module.tokenize(read)]
    return found, module.untokenize(token[:2] for token in found)


def shell(module):
    lexer = module.shlex('a \'b c\' "d\\"e" # no\n f=g', posix=True, punctuation_chars=True)
    return module.split('x \'y z\' "w\\" v"'), list(lexer), module.join(["a b", "c'd"])


def addresses(module):
    network = module.ip_network("10.1.0.0/22")
    six = module.ip_address("2001:db8::1:0")
    parts = list(network.subnets(new_prefix=24)), network.supernet(), list(network.hosts())[:3], six.exploded
    collapsed = module.collapse_addresses([module.ip_network("1.0.0.0/25"), module.ip_network("1.0.0.128/25")])
    return [*map(str, parts)], [*map(str, collapsed)], six.is_private, str(module.summarize_address_range)[:3]


def parsed_arguments(module):
    parser = module.ArgumentParser("prog", description="what it does " * 9)
    parser.add_argument("names", nargs="+", type=int)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--up", action="store_true")
    group.add_argument("--down", choices=["a", "b"], default="a", help="which way %(default)s")
    below = parser.add_subparsers
    return vars(parser.parse_args(["1", "2", "--down", "b"])), parser.format_help(), callable(below)


def pickled(module):
    shared = [1, 2.5, "three"]
    value = {"a": shared, "b": (shared, {4, 5}, b"bytes" * 90), "c": 2**90, "d": fractions.Fraction(1, 3)}
    data = io.BytesIO()
    module._Pickler(data, 4).dump(value)
    return data.getvalue(), module._Unpickler(io.BytesIO(data.getvalue())).load()


def formatted(module):
    rows = module.Formatter().format("{0:>5}|{name!r:<6}|{1[0]}|{2.real}", 1, [2], 3j, name="n")
    template = module.Template("$a ${b} $$ $c")
    return rows, template.safe_substitute(a=1, b=2), template.get_identifiers(), module.capwords("a b")


def links(module):
    parts = module.urlsplit("http://u:p@h:80/p/../q;x?a=1&b=2&a=3#f")
    joined = module.urljoin("http://a/b/c/d", "../e?f=g")
    quoted = module.quote("a b/\u00e4"), module.unquote("a%20%C3%A4"), module.urlencode({"a": [1, 2]}, doseq=True)
    return parts, parts.port, joined, quoted, module.parse_qs("a=1&b=2&a=3"), module.urlunsplit(parts)


def sorted_graph(module):
    found = [*module.TopologicalSorter({"d": "bc", "b": "a", "c": "a"}).static_order()]
    with pytest.raises(module.CycleError) as raised:
        module.TopologicalSorter({"a": "b", "b": "a"}).prepare()
    return found[0], set(found[1:3]), found[3], raised.value.args[0]


def managed(module):
    seen = []

    @module.contextmanager
    def manager(name):
        seen.append(name)
        try:
            yield name
        except KeyError:
            seen.append("handled")
        finally:
            seen.append(f"-{name}")

    with module.ExitStack() as stack, module.suppress(ZeroDivisionError):
        seen.append([stack.enter_context(manager(name)) for name in "abc"])
        stack.callback(seen.append, "called")
        raise KeyError
    with pytest.raises(ValueError, match="inside") as raised:
        with manager("d"):
            raise ValueError("inside")
    return seen, [entry.name for entry in raised.traceback][-1:]


def sniffed(module):
    sample = "a;b;c\n'x;y';2;3\n'z';5;6\n"
    dialect = module.Sniffer().sniff(sample)
    rows = list(module.DictReader(io.StringIO(sample), dialect=dialect))
    return dialect.delimiter, dialect.quotechar, dialect.__qualname__, rows, module.Sniffer().has_header(sample)


def hinted(module):
    class Pair(module.Generic[module.TypeVar("T")]):
        pass

    Pair.__annotations__ = {"one": module.Optional[int], "two": "int"}
    named = module.NamedTuple("Named", [("x", int)])
    return str(module.get_type_hints(Pair)), named(3), str(module.Union[int, str, int]), str(Pair[int])[-11:]


WORK = {
    diffs: difflib, unparsed: ast, encoded: json.encoder, decoded: json.decoder, wrapped: textwrap, scattered: random,
    measured: statistics, divided: fractions, printed: pprint, tokens: tokenize, shell: shlex, addresses: ipaddress,
    parsed_arguments: argparse, pickled: pickle, formatted: string, links: urllib.parse,
    sorted_graph: graphlib, managed: contextlib, sniffed: csv, hinted: typing,
}  # fmt: skip


@pytest.mark.parametrize("work", WORK, ids=lambda work: WORK[work].__name__)
def test_library_with_every_function_rewritten_does_the_same(work):
    expected = work(second(WORK[work]))
    module, visits = second(WORK[work]), Visits()
    visits.rewrite_all(module, module)
    found = work(module)
    assert repr(found) == repr(expected)
    assert visits.count > 50


def test_every_forward_of_torch_is_rewritten():
    kinds = [kind for kind in vars(nn).values() if isinstance(kind, type) and "forward" in vars(kind)]
    forwards = [kind.forward for kind in kinds if isinstance(kind.forward, FunctionType)]
    assert len(forwards) > 100
    for forward in forwards:
        found = rewritten(forward)
        assert found.code.co_qualname == forward.__qualname__
        assert len(found.spots["return"]) + len(found.spots["call"]) > 0


class Items:
    """Counts what is asked of it, in order."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getitem__(self, key):
        self.log.append(("get", self.name, key))
        return Items(self.log, f"{self.name}[{key}]")

    def __delitem__(self, key):
        self.log.append(("delete", self.name, key))

    def __setitem__(self, key, value):
        self.log.append(("set", self.name, key, str(value)))

    def __getattr__(self, name):
        self.log.append(("read", self.name, name))
        return Items(self.log, f"{self.name}.{name}")

    def __setattr__(self, name, value):
        if name in ("log", "name"):
            object.__setattr__(self, name, value)
        else:
            self.log.append(("write", self.name, name, str(value)))

    def __iadd__(self, other):
        self.log.append(("add", self.name, str(other)))
        return self

    def __call__(self, *args):
        self.log.append(("call", self.name, *args))
        return self

    def __repr__(self):
        return self.name


def assigning(x, y, values):
    """Every kind of assignment, of what notes the order in which it is asked."""
    x[y(1)] += y(2)
    x[1:2, ..., y(3) :] += 1
    x.a.b += y.c
    x[0][y(4)] += 2
    y.f(1).g += x[2]
    x[3], y.h = values
    x[y(5)] = y.i = z = 3
    (p, x[6]), *q = values, 4, 5
    a = b = y(7)
    [c, d] = values
    x[c], c = 8, 9
    e: int = z
    x.j: int = 5
    del x[9:], a
    return p, q, b is y, c, d, e, sorted(locals())


def test_assignments_evaluate_their_parts_once_and_in_order():
    logs, visits = [], Visits()
    for function in (assigning, visits.rewrite(assigning)):
        log = []
        result = function(Items(log, "x"), Items(log, "y"), (10, 20))
        logs.append((log, result))
    assert repr(logs[0]) == repr(logs[1])
    assert len(logs[0][0]) > 30
    assert [spot.name for spot in rewritten(assigning).spots["variable"].values()] == [
        "item_x_0", "item_x_1", "x_a_b_0", "item_x_2", "g_0", "item_x_3", "y_h_0", "item_x_4", "y_i_0", "z_0", "p_0",
        "item_x_5", "q_0", "a_0", "b_0", "c_0", "d_0", "item_x_6", "c_1", "e_0", "x_j_0",
    ]  # fmt: skip
