"""`import nnsight` costs next to nothing, and its public names are all there."""

from __future__ import annotations

import inspect
import sys

import pytest

import nnsight
from nnsight import errors


def test_import_loads_nothing_but_the_standard_library(site):
    loaded = site.run(
        """
        import sys
        before = set(sys.modules)
        import nnsight
        print(*sorted(set(sys.modules) - before))
        """
    ).split()
    foreign = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"nnsight"}
    assert not foreign
    assert [name for name in loaded if name.startswith("nnsight")] == ["nnsight", "nnsight._version"]
    assert "importlib.metadata" not in loaded


def test_import_changes_no_process_state(site):
    out = site.run(
        """
        import sys, builtins, warnings
        def state():
            return list(sys.meta_path), list(sys.path_hooks), sys.excepthook, dir(object), list(warnings.filters)
        before = state()
        import nnsight
        print(state() == before)
        """
    )
    assert out == "True"


def test_import_does_not_touch_a_broken_environment(site):
    config = site.home / "config" / "nnsight" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("this is = = not TOML")
    site.add("broken", {"nnsight": {"broken": "module_that_is_not_there"}, "nnsight.exports": {"Broken": "nowhere:x"}})
    assert site.run("import nnsight; from nnsight import CONFIG; print(nnsight.__version__)") == nnsight.__version__


def test_version_is_that_of_the_distribution(core_version):
    assert nnsight.__version__ == core_version


def test_every_error_and_warning_is_public():
    ours = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert ours == set(nnsight._PUBLIC["nnsight.errors"])
    assert all(getattr(nnsight, name) is getattr(errors, name) for name in ours)


def test_every_error_is_an_nnsight_error_and_a_builtin_one():
    for name in nnsight._PUBLIC["nnsight.errors"]:
        error = getattr(errors, name)
        if issubclass(error, Warning) or error is errors.NNsightError:
            continue
        assert issubclass(error, errors.NNsightError), name
        builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
        assert builtin[0] is not Exception, f"{name} derives from no builtin a caller would expect"


def test_names_for_type_checkers_are_the_names_that_exist():
    source = inspect.getsource(nnsight)
    block = source[source.index("if TYPE_CHECKING:") : source.index("_PUBLIC = ")]
    spelled = {line.split(" as ")[1] for line in block.splitlines() if " as " in line}
    assert spelled == set(nnsight._MODULE_OF)


def test_unknown_name_is_an_attribute_error_that_names_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'NNsigt'; did you mean NNsight"):
        _ = nnsight.NNsigt
    assert not hasattr(nnsight, "nothing_like_it_at_all")


def test_private_and_dunder_names_never_scan(site):
    out = site.run(
        """
        import nnsight, sys
        print(hasattr(nnsight, "__wrapped__"), hasattr(nnsight, "_private"), "nnsight.plugins" in sys.modules)
        """
    )
    assert out == "False False False"


def test_dir_lists_core_names_and_installed_exports(site):
    site.add("extra", {"nnsight.exports": {"Extra": "extra_module:Extra"}})
    out = site.run(
        "import nnsight, sys; print('Extra' in dir(nnsight), 'NNsight' in dir(nnsight), 'extra_module' in sys.modules)"
    )
    assert out == "True True False"


def test_a_name_is_looked_up_once(site):
    out = site.run(
        """
        import nnsight
        first = nnsight.NNsightError
        print(vars(nnsight)["NNsightError"] is first is nnsight.NNsightError)
        """
    )
    assert out == "True"
