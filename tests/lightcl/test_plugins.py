"""Methods and networks from a user's file: by name like built-in ones, also in another process."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from lightcl import plugins
from lightcl.errors import RequestError
from lightcl.methods.base import METHODS
from lightcl.networks import BACKBONES
from lightcl.registry import Registry
from lightcl.scenario import Scenario, load_scenario, scenario_from_json, scenario_keys, scenario_schema
from tests.lightcl import toys

METHOD = '''
from typing import Literal

from pydantic import Field

from lightcl.methods import Method, MethodParameters, register


class ScaledParameters(MethodParameters):
    """`scaled`: SGD on a scaled loss."""

    shareable = False
    name: Literal["scaled"] = "scaled"
    factor: float = Field(default=2.0, gt=0, le=10)
    """Factor of the loss."""


@register(ScaledParameters)
class Scaled(Method):
    parameters: ScaledParameters

    def loss(self, batch, context):
        return self.parameters.factor * super().loss(batch, context)
'''
NETWORK = """
from lightcl.networks import register_backbone
from lightcl.networks.resnet import StagedResNet


@register_backbone("resnet10")
def resnet10(**shape):
    return StagedResNet(blocks_per_layer=(1, 1, 1, 1), **shape)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Loads the text of a plugin, and forgets what it registered afterwards."""
    monkeypatch.setenv(plugins.VARIABLE, "")
    before = [(registry, dict(registry)) for registry in (METHODS, BACKBONES)]

    def load(text: str, name: str = "mine.py") -> Path:
        file = tmp_path / name
        file.write_text(text)
        plugins.load_plugins([file])
        return file

    yield load
    for registry, objects in before:
        registry._objects.clear()
        registry._objects.update(objects)


def test_a_method_from_a_file_is_like_a_built_in_one(plugin, tmp_path):
    plugin(METHOD)
    scenario = toys.scenario(method={"name": "scaled", "factor": 3.0})
    assert scenario.method.factor == 3.0
    assert scenario_from_json(scenario.model_dump_json()) == scenario
    assert list(METHODS)[-2:] == ["lightcl-plus", "scaled"]
    assert "`method.factor`" in scenario_keys()
    assert "ScaledParameters" in scenario_schema()["$defs"]
    plain, scaled = toys.device(tmp_path / "a", method={"name": "sgd"}), toys.device(tmp_path / "b", method={
        "name": "scaled", "factor": 3.0
    })  # fmt: skip
    batch = plain.stream[0].train.load(slice(0, 8))
    context = toys.context(0, [0, 1])
    assert scaled.method.loss(batch, context).item() == pytest.approx(3 * plain.method.loss(batch, context).item())
    assert scaled.train(0, 1).loss > 0


def test_a_plugins_constants_and_keys_are_checked(plugin, tmp_path):
    plugin(METHOD)
    file = tmp_path / "scenario.yaml"
    file.write_text("method:\n  name: scaled\n  facto: 3\n")
    with pytest.raises(RequestError, match=r"line 3: method\.facto: unknown key, did you mean 'factor'\?"):
        load_scenario(file)
    with pytest.raises(RequestError, match="trained tensors of method scaled"):
        load_scenario(Path("quickstart"), ["method.name=scaled", "server.aggregation=suffix"])


def test_a_network_from_a_file(plugin, tmp_path):
    plugin(NETWORK)
    device = toys.device(tmp_path, network={"name": "resnet10", "freeze": "layer3"})
    assert device.network.block_names == ("stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0")
    assert device.train(0, 1).loss > 0
    assert "`resnet10`" in scenario_keys()


def test_an_unknown_network_names_the_nearest():
    with pytest.raises(
        ValueError, match=r'unknown network "resnet19", did you mean \'resnet18\'\? \(allowed: resnet18'
    ):
        Scenario.model_validate({"network": {"name": "resnet19"}})


def test_another_process_loads_the_plugins_that_the_environment_names(plugin):
    file = plugin(METHOD)
    assert os.environ[plugins.VARIABLE] == str(file)
    code = (
        "from lightcl.scenario import Scenario; print(Scenario.model_validate({'method': {'name': 'scaled'}}).method)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "factor=2.0" in answer.stdout, answer.stderr


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1\nraise KeyError('no')\n", r"mine\.py, line 2: KeyError: 'no'"),
    ("def f():\n    return 1 / 0\n\nf()\n", r"mine\.py, line 2: ZeroDivisionError"),
    ("x = 1\n\nx = = 2\n", r"mine\.py, line 3: SyntaxError"),
])  # fmt: skip
def test_a_plugin_that_fails_is_named_with_its_line(plugin, text, message):
    with pytest.raises(RequestError, match=message):
        plugin(text)
    assert os.environ[plugins.VARIABLE] == ""


def test_a_plugin_that_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"plugin .*nothing\.py: no such file"):
        plugins.load_plugins([tmp_path / "nothing.py"])
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "nothing.py"))
    with pytest.raises(RequestError, match="no such file"):
        METHODS.find("sgd")


def test_a_name_is_given_once(plugin):
    with pytest.raises(RequestError, match=r"method 'sgd' is registered twice: by lightcl\.methods\.sgd SGDParameters"):
        plugin(METHOD.replace('"scaled"', '"sgd"'))


def test_a_method_needs_a_name(plugin):
    with pytest.raises(RequestError, match=r"line .*: TypeError: ScaledParameters needs a name"):
        plugin(METHOD.replace('    name: Literal["scaled"] = "scaled"\n', ""))


def test_registry_by_itself():
    colors: Registry[int] = Registry("color", "paint.color")
    colors.register("red", 1)
    colors.register("green", 2)
    assert (colors.find("red"), list(colors), len(colors)) == (1, ["red", "green"], 2)
    with pytest.raises(
        RequestError, match=r"paint\.color: unknown color \"gren\", did you mean 'green'\? \(allowed: red"
    ):
        colors.find("gren")


def test_the_code_of_a_plugin_is_that_of_its_import(plugin):
    file = plugin(NETWORK)
    built = BACKBONES.find("resnet10")
    before = plugins.source_digest(built)
    file.write_text(NETWORK + "# edited while a run goes on\n")
    assert plugins.source_digest(built) == plugins.source_digest(partial(built, width=4)) == before
    assert plugins.from_plugin(built)
    assert not any(map(plugins.from_plugin, (Scenario, torch.nn.Conv2d, Path)))


def test_code_that_is_in_no_file_counts_as_it_was_compiled():
    digests = []
    for factor in ("1", "2", "1"):
        defined = {"__name__": "notebook"}
        exec(compile(f"class Twice:\n    def of(self):\n        return {factor}\n", "<cell>", "exec"), defined)
        digests.append(plugins.source_digest(defined["Twice"]))
    assert digests[0] == digests[2] != digests[1]
