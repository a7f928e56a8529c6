"""The shape of the repository: who may import whom, how long things are, and what no file may contain."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from pathlib import Path

import pytest

import nnsight

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "src" / "nnsight"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
SOURCES = sorted([*CORE.rglob("*.py"), *(path for plugin in PLUGINS for path in (plugin / "src").rglob("*.py"))])

LAYERS = ["errors", "_words", "protocols", "kernel", "capture", "joint", "tracing", "payload", "builtin"]
FOREIGN = {"accelerate", "diffusers", "httpx", "tokenizers", "transformers", "vllm"}
# Importing either package installs the alias finder: that is what they are for.
SIDE_EFFECTS = {"nnsight/modeling/__init__.py": ["install()"], "nnsight/intervention/__init__.py": ["install()"]}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def by_path(paths):
    return pytest.mark.parametrize("path", paths, ids=relative)


def tree_of(path):
    return ast.parse(path.read_text("utf-8"), str(path))


def imports_of(nodes):
    """Every module imported below some nodes, with the name taken from it: `nnsight` + `NNsight`, `torch` + None."""
    for node in nodes:
        for found in ast.walk(node):
            if isinstance(found, ast.Import):
                yield from ((alias.name, None) for alias in found.names)
            elif isinstance(found, ast.ImportFrom):
                assert found.level == 0, "imports are absolute"
                yield from ((found.module, alias.name) for alias in found.names)


def home_of(module, name):
    """The module of this library that an import reaches, `nnsight.kernel.mediator` for `nnsight` + `Mediator`."""
    if module == "nnsight" and name is not None:
        return nnsight._MODULE_OF.get(name, f"nnsight.{name}")
    return module


def layer_of(module):
    """The index of a module's layer, None outside of the layers."""
    part = module.removeprefix("nnsight.").partition(".")[0]
    return LAYERS.index(part) if part in LAYERS else None


def is_for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


# --- Who imports whom


@by_path(
    [
        path
        for path in sorted(CORE.rglob("*.py"))
        if layer_of(f"nnsight.{path.relative_to(CORE).parts[0].removesuffix('.py')}") is not None
    ]
)
def test_layers_import_one_way(path):
    own = layer_of(f"nnsight.{path.relative_to(CORE).parts[0].removesuffix('.py')}")
    for module, name in imports_of([tree_of(path)]):
        home = home_of(module, name)
        if home.partition(".")[0] != "nnsight":
            continue
        layer = layer_of(home)
        if layer is None:
            assert own >= LAYERS.index("joint"), f"{LAYERS[own]} knows of no plugins, but imports {home}"
        else:
            assert layer <= own, f"{LAYERS[own]} imports {home}, which is above it"


@by_path([path for path in sorted(CORE.glob("*.py")) if path.stem not in LAYERS])
def test_modules_beside_the_layers_load_none_of_them(path):
    """Plugins, settings and the package itself reach the layers through names only, so that importing them is cheap."""
    loaded = [node for node in tree_of(path).body if not is_for_types(node) and not isinstance(node, ast.FunctionDef)]
    for module, name in imports_of(loaded):
        layer = layer_of(home_of(module, name))
        assert layer is None or layer <= LAYERS.index("protocols"), f"imports {module} when it is loaded"


@by_path(sorted(CORE.rglob("*.py")))
def test_core_knows_no_model_library_and_no_plugin(path):
    used = {module.partition(".")[0] for module, _ in imports_of([tree_of(path)])}
    assert not used & FOREIGN
    assert not {name for name in used if name.startswith("nnsight_")}


@by_path([path for path in SOURCES if CORE not in path.parents])
def test_plugins_import_public_names_and_no_other_plugin(path):
    own = path.relative_to(ROOT / "plugins").parts[2]
    public = {*nnsight._MODULE_OF, *nnsight._SUBMODULES, "__version__"}
    for module, name in imports_of([tree_of(path)]):
        package = module.partition(".")[0]
        if package == "nnsight":
            assert module in ("nnsight", "nnsight.protocols"), f"{module} is not public"
            assert name is None or not name.startswith("_") or name == "__version__"
            assert module != "nnsight" or name is None or name in public, f"nnsight.{name} is not one of core's names"
        assert not package.startswith("nnsight_") or package == own, f"imports another plugin: {module}"


# --- How long things are


def lines_of_code(path):
    """How many lines of a file hold code: no blank lines, comments or docstrings (docs/decisions/0001)."""
    text = path.read_text("utf-8")
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for t in tokens if t.type not in ignored for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize(("parts", "limit"), [(("kernel", "tracing"), 2500), (("capture", "joint"), 2000)])
def test_kernel_and_tracing_stay_small(parts, limit):
    counts = {relative(path): lines_of_code(path) for part in parts for path in (CORE / part).rglob("*.py")}
    assert sum(counts.values()) <= limit, counts


@by_path(SOURCES)
def test_file_is_at_most_400_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


@by_path(SOURCES)
def test_functions_are_at_most_50_lines(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} at line {node.lineno}"


# --- What a module does when it is imported


@by_path(SOURCES)
def test_importing_a_module_only_defines_things(path):
    """No calls for their effect, no loops, no `with`: a name may be bound, under a condition or in a `try`."""
    allowed = SIDE_EFFECTS.get("/".join(path.parts[-3:]), [])
    todo = list(tree_of(path).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If):
            if ast.unparse(node.test) != "__name__ == '__main__'":
                todo += node.body + node.orelse
        elif isinstance(node, ast.Try):
            todo += node.body + node.orelse + node.finalbody + [n for handler in node.handlers for n in handler.body]
        elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            assert ast.unparse(node) in allowed, f"line {node.lineno}: {ast.unparse(node)}"
        else:
            harmless = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign
            assert isinstance(node, harmless | ast.AnnAssign | ast.Expr | ast.Pass | ast.Delete), f"line {node.lineno}"


@by_path(SOURCES)
def test_module_says_what_it_is_for(path):
    docstring = ast.get_docstring(tree_of(path))
    assert docstring, "a module needs a docstring"
    assert len(docstring.splitlines()) <= 16


# --- What no file may contain


def tracked_files():
    """What git knows of or would take; everything outside of hidden and built folders where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    names = listed.stdout.decode().split("\0")[:-1] if listed.returncode == 0 else []
    files = [ROOT / name for name in names] or [
        path for path in ROOT.rglob("*") if not {".venv", ".git", "outputs", "dist"} & set(path.relative_to(ROOT).parts)
    ]
    return [path for path in files if path.is_file()]


# Each is written with a bracket in it, so that this file passes its own test.
ADDRESSES = [
    r"py[p]i\.(org|python)", "python[h]osted", r"download\.[p]ytorch", "npm[j]s", r"ana[c]onda\.(org|com)",
    "index-[u]rl", "find-[l]inks", "trusted-[h]ost",
]  # fmt: skip
FOLDERS = ["w[o]rk", "r[o]ot", "o[p]t", "h[o]me", "t[m]p", "U[s]ers", "m[n]t"]
REGISTRY = "|".join(ADDRESSES)
MACHINE = rf"(?<![\w.~$}}*])/({'|'.join(FOLDERS)})/\w"


@pytest.mark.parametrize(
    ("what", "pattern"), [("a registry address", REGISTRY), ("a machine path", MACHINE)], ids=["address", "path"]
)
def test_no_file_names(what, pattern):
    found = []
    for path in tracked_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # pictures and the like
        found += [
            f"{relative(path)}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}" for m in re.finditer(pattern, text)
        ]
    assert not found, f"{what}: {found}"


# --- Packaging


def project_of(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_plugin_has_an_extra_of_its_short_name():
    extras = project_of(ROOT / "core")["optional-dependencies"]
    assert extras.pop("testing")[0].startswith("pytest")
    assert {"hf", "vllm", "diffusers", "ndif", "source", "all"} <= set(extras)
    assert sorted(extras["all"]) == sorted(name for extra, names in extras.items() if extra != "all" for name in names)
    for plugin in PLUGINS:
        assert extras[plugin.name] == [project_of(plugin)["name"]] == [f"nnsight-{plugin.name}"]


@pytest.mark.parametrize("folder", [ROOT / "core", *PLUGINS], ids=lambda folder: folder.name)
def test_package_is_typed_and_its_entry_points_exist(folder):
    (package,) = [path for path in (folder / "src").iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    assert (package / "py.typed").exists()
    for points in project_of(folder).get("entry-points", {}).values():
        for value in points.values():
            module, _, attribute = value.partition(":")
            path = (folder / "src").joinpath(*module.split("."))
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert source.exists(), value
            assert not attribute or re.search(rf"\b{attribute}\b", source.read_text("utf-8")), value
