"""A plugin under test is there while it is loaded, in every group, and gone without a trace afterwards."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

import nnsight
from nnsight import NNsight, PluginConflictError, PluginError, UnknownPluginError, plugins
from nnsight.testing import loaded_plugin
from nnsight.testing.fixtures import load_plugin as load_plugin
from nnsight.testing.tiny import Net, rows, seeded

PROJECT = """
    [project]
    name = "nnsight-sample"
    version = "1.0"

    [project.entry-points."nnsight"]
    sample = "nnsight_sample.hooks"

    [project.entry-points."nnsight.exports"]
    Sample = "nnsight_sample:Sample"

    [project.entry-points."nnsight.modeling"]
    sample = "nnsight_sample"

    [project.entry-points."nnsight.envoy"]
    doubled = "nnsight_sample:doubled"

    [project.entry-points."nnsight.tracer"]
    halved = "nnsight_sample:halved"
    """
PACKAGE = """
    from nnsight import NNsight

    class Sample(NNsight):
        number = 1

    def doubled(envoy):
        return envoy.output * 2

    def halved(tracer):
        return tracer.result / 2
    """
HOOKS = """
    wrapped = []

    def nnsight_wrapped(envoy):
        wrapped.append(envoy.path)
    """


@pytest.fixture
def sample(tmp_path):
    folder = tmp_path / "nnsight-sample"
    package = folder / "src" / "nnsight_sample"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(textwrap.dedent(PROJECT))
    (package / "__init__.py").write_text(textwrap.dedent(PACKAGE))
    (package / "hooks.py").write_text(textwrap.dedent(HOOKS))
    return folder


def state():
    """What the process knows of plugins."""
    own = sorted(name for name in sys.modules if name.startswith(("nnsight.modeling", "nnsight_sample")))
    groups = ("nnsight", "nnsight.exports", "nnsight.modeling", "nnsight.envoy", "nnsight.tracer")
    implemented = plugins.hooks.implemented()
    return (
        list(sys.path),
        own,
        {group: plugins.names(group) for group in groups},
        implemented,
        "Sample" in vars(nnsight),
    )


def test_everything_it_serves_is_there_and_gone_afterwards(sample):
    import nnsight.modeling

    net = seeded(Net)
    before = state()
    with loaded_plugin(sample) as plugin:
        assert plugin.name == "nnsight-sample"
        from nnsight import Sample
        from nnsight.modeling.sample import Sample as Same

        assert Sample is Same is plugin.object_of("nnsight.exports", "Sample")
        model = Sample(net)
        assert sys.modules["nnsight_sample.hooks"].wrapped == ["model"]
        with model.trace(rows()) as tracer:
            doubled = model.h[0].doubled
            halved = tracer.halved()
        assert torch.equal(doubled, net.h[0](net.emb(rows())) * 2)
        assert torch.equal(halved, net(rows()) / 2)
    assert state() == before
    with pytest.raises(AttributeError, match="no attribute 'Sample'"):
        nnsight.Sample
    with pytest.raises(AttributeError, match="doubled"):
        NNsight(net).doubled
    with pytest.raises(UnknownPluginError):
        plugins.resolve("nnsight.tracer", "halved")


def test_it_is_gone_after_an_error_too(sample):
    before = state()
    with pytest.raises(KeyError):
        with loaded_plugin(sample):
            raise KeyError
    assert state() == before


def test_what_was_edited_is_loaded_anew(sample):
    file = sample / "src" / "nnsight_sample" / "__init__.py"
    with loaded_plugin(sample):
        assert nnsight.Sample.number == 1
    file.write_text(file.read_text().replace("number = 1", "number = 22"))
    with loaded_plugin(sample):
        assert nnsight.Sample.number == 22


def test_the_fixture_loads_until_the_test_is_over(load_plugin, sample):
    load_plugin(sample)
    assert nnsight.Sample.number == 1


def test_after_the_fixture_nothing_is_left():
    assert not hasattr(nnsight, "Sample")
    assert "nnsight_sample" not in sys.modules


def test_a_single_file_and_entry_points_are_enough(load_plugin, tmp_path):
    (tmp_path / "one_file.py").write_text("def tripled(envoy): return envoy.output * 3")
    load_plugin(tmp_path, name="one-file", entry_points={"nnsight.envoy": {"tripled": "one_file:tripled"}})
    net = seeded(Net)
    model = NNsight(net)
    with model.trace(rows()):
        tripled = model.emb.tripled
    assert torch.equal(tripled, net.emb(rows()) * 3)


def test_the_installed_copy_stands_back(load_plugin, tmp_path):
    import nnsight_source as installed

    (tmp_path / "nnsight_source.py").write_text("def source(envoy): return 'mine'")
    with loaded_plugin(
        tmp_path, name="nnsight-source", entry_points={"nnsight.envoy": {"source": "nnsight_source:source"}}
    ):
        assert NNsight(seeded(Net)).source == "mine"
    assert sys.modules["nnsight_source"] is installed
    assert plugins.resolve("nnsight.envoy", "source") is installed.source


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from nnsight import NNsight", "import not_there_at_all", "plugin 'sample'.*not_there_at_all"),
        ("class Sample", "class Simple", "plugin 'Sample'.*has no attribute 'Sample'"),
    ],
)
def test_a_plugin_that_does_not_load_says_so_at_once(sample, old, new, message):
    file = sample / "src" / "nnsight_sample" / "__init__.py"
    file.write_text(file.read_text().replace(old, new))
    before = state()
    with pytest.raises(PluginError, match=message):
        with loaded_plugin(sample):
            pass
    assert state() == before


def test_a_misspelt_hook_says_so_at_once(sample):
    file = sample / "src" / "nnsight_sample" / "hooks.py"
    file.write_text(file.read_text().replace("nnsight_wrapped", "nnsight_wraped"))
    with pytest.raises(PluginError, match="did you mean nnsight_wrapped"):
        with loaded_plugin(sample):
            pass


def test_a_name_that_is_taken_is_a_conflict(tmp_path):
    (tmp_path / "mine.py").write_text("def cache(tracer): pass")
    with pytest.raises(PluginConflictError, match="'cache' in group nnsight.tracer is claimed by mine .* nnsight-core"):
        with loaded_plugin(tmp_path, name="mine", entry_points={"nnsight.tracer": {"cache": "mine:cache"}}):
            pass


def test_a_folder_that_is_no_plugin_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        with loaded_plugin(tmp_path / "nowhere"):
            pass
    with pytest.raises(FileNotFoundError, match="has no pyproject.toml.*name= and entry_points="):
        with loaded_plugin(tmp_path):
            pass
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[project.entry-points."nnsight.export"]\nA = "a"\n'
    )
    with pytest.raises(
        PluginError, match=r"no entry points in any of the groups of nnsight: nnsight, nnsight\.exports"
    ):
        with loaded_plugin(tmp_path):
            pass
