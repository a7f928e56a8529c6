"""Programs of the 0.6 series find their names where they used to be."""

from __future__ import annotations

import importlib
import sys

import pytest

import nnsight
from nnsight import _compat
from nnsight.errors import MissingPluginError


def test_object_can_be_used_in_unions():
    from nnsight.intervention.tracing.globals import Object

    assert Object is nnsight.Object
    assert isinstance(None, Object | None)

    def annotated(hidden: Object | None = None) -> Object:
        return hidden

    assert annotated() is None
    with pytest.raises(TypeError, match="only serves in annotations"):
        Object()


def test_plain_import_of_the_package_reaches_every_old_module(site):
    out = site.run(
        """
        import nnsight
        print(nnsight.intervention.tracing.globals.Object is nnsight.Object)
        import nnsight.intervention.tracing.tracer as tracer
        print(tracer is nnsight.intervention.tracing.tracer, tracer.__name__)
        from nnsight.intervention import backends
        print(backends.__name__, dir(nnsight.intervention.backends))
        """
    )
    assert out.splitlines() == [
        "True",
        "True nnsight.intervention.tracing.tracer",
        "nnsight.intervention.backends ['remote']",
    ]


@pytest.mark.parametrize("path", [path for path in _compat.PATHS if path != "nnsight.ndif"])
def test_every_old_module_can_be_imported_and_listed(path):
    module = importlib.import_module(path)
    assert module.__name__ == path
    assert set(_compat.PATHS[path]) <= set(dir(module))
    assert sys.modules[path] is module


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in _compat.PATHS.items() for name in names])
def test_every_old_name_is_the_new_object_or_says_what_is_missing(path, name):
    home, _, attribute = _compat.PATHS[path][name].partition(":")
    module = importlib.import_module(path)
    try:
        expected = getattr(importlib.import_module(home), attribute)
    except MissingPluginError:
        with pytest.raises(MissingPluginError, match=f"'{attribute}'.* pip install"):
            getattr(module, name)
    except ImportError:
        with pytest.raises(ImportError, match=f"{name} stands for '{attribute}' of '{home}', which this version"):
            getattr(module, name)
    else:
        assert getattr(module, name) is expected


def test_ndif_names_come_from_the_plugin_or_say_how_to_install_it(site):
    program = (
        "import nnsight; from nnsight.ndif import register; print(register('a/b'), nnsight.ndif.register is register)"
    )
    assert site.fail(program).endswith(
        "MissingPluginError: 'register' is provided by nnsight-ndif, which is not installed: "
        'pip install "nnsight-core[ndif]"'
    )
    site.add(
        "nnsight-ndif",
        {"nnsight.exports": {"register": "remote_side:register"}},
        {"remote_side": "def register(x): return 'registered ' + x"},
    )
    assert site.run(program) == "registered a/b True"


def test_language_model_at_its_old_path(site):
    site.add(
        "nnsight-hf",
        {
            "nnsight.modeling": {"language": "languages"},
            "nnsight.exports": {"LanguageModel": "languages:LanguageModel"},
        },
        {"languages": "class LanguageModel: pass"},
    )
    out = site.run(
        """
        from nnsight.modeling.language import LanguageModel
        import nnsight
        print(LanguageModel is nnsight.LanguageModel, LanguageModel.__module__)
        """
    )
    assert out == "True languages"


def test_misspelt_old_path_names_the_nearest():
    with pytest.raises(ModuleNotFoundError, match=r"globls'; did you mean nnsight.intervention.tracing.globals"):
        importlib.import_module("nnsight.intervention.tracing.globls")
    with pytest.raises(AttributeError, match="no attribute 'Envy'; did you mean Envoy"):
        _ = importlib.import_module("nnsight.intervention.envoy").Envy
