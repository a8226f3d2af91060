"""The configuration: the paper's defaults, and errors that name file, line, key and what is allowed."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from lightcl.data.sources import SourceRequest
from lightcl.errors import RequestError
from lightcl.methods.ewc import EWCParameters
from lightcl.methods.lightcl import LightCLParameters
from lightcl.methods.sgd import SGDParameters
from lightcl.scenario import Scenario, load_scenario, scenario_from_json, scenario_schema


@pytest.fixture
def load(tmp_path):
    """Loads YAML text from `tmp_path/scenario.yaml` with changes as given after --set."""

    def from_text(text: str, *changes: str) -> Scenario:
        file = tmp_path / "scenario.yaml"
        file.write_text(text)
        return load_scenario(file, changes)

    return from_text


@pytest.fixture
def refused(load, tmp_path):
    """The error's text for YAML text and changes; the file's folder is cut off."""

    def text_of(text: str, *changes: str) -> str:
        with pytest.raises(RequestError) as caught:
            load(text, *changes)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return text_of


# -- values --------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers_values(load):
    scenario = load("{}")
    assert scenario == Scenario()
    training = scenario.training
    assert (training.epochs, training.batch_size, training.learning_rate) == (50, 32, 0.01)
    assert (training.momentum, training.weight_decay) == (0.0, 0.0)
    assert (scenario.stream.tasks, scenario.stream.classes_per_task, scenario.stream.held_out) == (5, 2, 0.1)
    method = scenario.method
    assert isinstance(method, LightCLParameters)
    assert (method.beta, method.ratio, method.memory_size, method.reduction) == (2e-4, 0.15, 15, "sum")
    assert method.default_freeze == "layer3"
    assert scenario.data.crop_padding == 4


@pytest.mark.parametrize(("source", "augmentation"), [("digits", "none"), ("cifar10", "crop-flip")])
def test_automatic_augmentation_spares_the_digits(load, source, augmentation):
    assert load(f"data: {{source: {source}}}").augmentation == augmentation
    assert load(f"data: {{source: {source}, augmentation: crop}}").augmentation == "crop"


def test_values_are_read_from_their_sections(load):
    scenario = load(
        """
        name: mine
        seed: 7
        stream: {tasks: 2, class_order: [3, 1, 0, 2]}
        method: {name: sgd, loss_classes: all}
        training:
        server: {strategy: FedAvgM, strategy_options: {server_momentum: 0.9}}
        """
    )
    assert (scenario.name, scenario.seed) == ("mine", 7)
    assert scenario.stream.class_order == (3, 1, 0, 2)
    assert scenario.method == SGDParameters(loss_classes="all")
    assert scenario.training.epochs == 50  # an empty section is the default one
    assert scenario.server.strategy_options == {"server_momentum": 0.9}


def test_method_is_lightcl_where_the_section_does_not_name_one(load):
    assert load("method: {beta: 0.5}").method == LightCLParameters(beta=0.5)


def test_paper_preset_fills_its_keys_and_explicit_keys_win(load):
    assert load("method: {preset: paper}").method == LightCLParameters(
        preset="paper", vital_selection="paper", memory_batch_norm="train"
    )
    explicit = load("method: {preset: paper}", "method.vital_selection=exact").method
    assert (explicit.vital_selection, explicit.memory_batch_norm) == ("exact", "train")


@pytest.mark.parametrize(
    ("epochs", "rounds", "until"), [(50, 1, [50]), (50, 5, [10, 20, 30, 40, 50]), (5, 3, [1, 3, 5]), (2, 2, [1, 2])]
)
def test_epochs_are_spread_over_the_rounds_of_a_task(load, epochs, rounds, until):
    scenario = load(f"training: {{epochs: {epochs}}}\nserver: {{rounds_per_task: {rounds}}}")
    assert [scenario.epochs_until(part) for part in range(1, rounds + 1)] == until


def test_source_request_holds_what_decides_the_images(load):
    scenario = load(
        """
        seed: 3
        data: {source: parquet, path: /data/x, image_size: 32, image_column: a, label_column: b, test_fraction: 0.3}
        """
    )
    assert scenario.source_request() == SourceRequest("parquet", Path("/data/x"), 32, "a", "b", 0.3, 3, True)


def test_relative_paths_are_settled_where_they_were_typed(load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    scenario = load("data: {source: parquet, path: sub/a.parquet}\nnetwork: {weights: own.safetensors}")
    assert scenario.data.path == tmp_path / "sub" / "a.parquet"
    assert scenario.network.weights == str(tmp_path / "own.safetensors")
    assert load("data: {source: image-folder, path: ~/x}").data.path == Path("/home/someone/x")
    for known in ("builtin", "imagenet", "none"):
        assert load(f"network: {{weights: {known}}}").network.weights == known


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "method: {preset: paper, ratio: 0.2}",
        "method: {name: sgd}",
        "stream: {tasks: 1, class_order: [4, 2]}",
        "fleet: {partition: pathological}",
        "data: {source: parquet, path: /x}",
    ],
)
def test_a_scenario_survives_json_and_yaml(load, text):
    scenario = load(text)
    assert scenario_from_json(scenario.model_dump_json()) == scenario
    assert load(scenario.to_yaml()) == scenario


def test_scenarios_cannot_be_changed():
    scenario = Scenario()
    with pytest.raises(ValidationError, match="frozen"):
        scenario.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        scenario.training.epochs = 3


def test_schema_knows_every_section_and_every_method():
    schema = scenario_schema()
    assert set(schema["properties"]) == set(Scenario.model_fields)
    assert {"LightCLParameters", "SGDParameters"} <= set(schema["$defs"])
    assert "dimensionless drift" in json.dumps(schema["$defs"]["LightCLParameters"])


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("seed: 1\ntrainig: {epochs: 3}", "line 2: trainig", "did you mean 'training'?"),
        ("training:\n  batch_size: 8\n  epoch: 3", "line 3: training.epoch", "did you mean 'epochs'?"),
        ("method:\n  betta: 1", "line 2: method.betta", "did you mean 'beta'?"),
        ("method:\n  name: sgd\n  beta: 1", "line 3: method.beta", "(allowed here: name, loss_classes)"),
        ("stream: {zzz: 1}", "line 1: stream.zzz", "(allowed here: tasks, classes_per_task, class_order,"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_known_one(refused, text, where, said):
    message = refused(text)
    assert message.startswith(f"scenario.yaml, {where}: unknown key")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  epochs: many", "line 2: training.epochs: input should be a valid integer, not \"many\""),
        ("training: {epochs: 0}", "line 1: training.epochs: input should be greater than or equal to 1, not 0"),
        ("training: {batch_size: 1}", "line 1: training.batch_size: .* greater than or equal to 2, not 1"),
        ("training: {learning_rate: 0}", "line 1: training.learning_rate: .* greater than 0, not 0"),
        ("training: 3", "line 1: training is a section with keys of its own, not 3; write training: {epochs: 3}"),
        ("data: {source: cifar11}",
         r"line 1: data.source is 'cifar11': unknown, did you mean 'cifar10'\? \(allowed: digits, "),
        ("server: {strategy: FedBest}", "line 1: server.strategy: input should be 'FedAvg', .*, not \"FedBest\""),
        ("server: {aggregation: all}", "line 1: server.aggregation: input should be 'none', 'suffix' or '"),
        ("fleet: {devices: 1.5}", "line 1: fleet.devices: input should be a valid integer, not 1.5"),
        ("stream:\n  tasks: true", "line 2: stream.tasks: input should be a valid integer, not true"),
        ("stream: {tasks: '2'}", "line 1: stream.tasks: input should be a valid integer, not \"2\""),
        ("stream: {tasks: 2.0}", "line 1: stream.tasks: input should be a valid integer, not 2.0"),
        ("stream: {tasks: 1:30}", "line 1: stream.tasks: input should be a valid integer, not \"1:30\""),
        ("stream: {tasks: 010}", "line 1: stream.tasks: input should be a valid integer, not \"010\""),
        ("method: {memory_size: true}", "line 1: method.memory_size: input should be a valid integer, not true"),
        ("data: {download: 1}", "line 1: data.download: input should be a valid boolean, not 1"),
        ("training: {learning_rate: true}", "line 1: training.learning_rate: input should be a valid number, not true"),
        ("training: {learning_rate: 1e300}", "line 1: training.learning_rate: .* less than or equal to 1000000"),
        ("training: {epochs: 100000000000000000000}", "line 1: training.epochs: .* less than or equal to 1000000, not"),
        ("method: {name: ewc, strength: 1e300}", "line 1: method.strength: .* less than or equal to 1000000000, not"),
        ("device: {threads: 100000}", "line 1: device.threads: .* less than or equal to 1024, not 100000"),
        ("simulation: {workers: 100000}", "line 1: simulation.workers: .* less than or equal to 1024, not 100000"),
        ("simulation: {engine: spark}", "line 1: simulation.engine: input should be 'ray' or 'flower', not \"spark\""),
        ("simulation: {address: there}", r"line 1: simulation.address is 'there' \(allowed: null, auto, HOST:PORT or"),
        ("simulation: {address: 'host:70000'}", r"line 1: simulation.address is 'host:70000' \(allowed: .* to 65535"),
        ("simulation: {address: 'http://host:6379'}", "line 1: simulation.address is 'http://host:6379'"),
        ("simulation: {address: 'host:6379 '}", "line 1: simulation.address is 'host:6379 '"),
        ("simulation: {keep_states: some}", "line 1: simulation.keep_states: input should be 'all' or 'none', not"),
        ("simulation:\n  engine: flower\n  address: auto", r"line \d: simulation.address is 'auto', but simulation"),
        ("data: {crop_padding: 100000}", "line 1: data.crop_padding: .* less than 1024, not 100000"),
        ("server: {strategy_options: {eta: -1}}", "line 1: server.strategy_options.eta: .* or equal to 0, not -1"),
        ("data: {augmentation: blur}", "line 1: data.augmentation: input should be 'auto', .*, not \"blur\"$"),
        ("name: a/b", "line 1: name is \"a/b\" .allowed: 1 to 80 letters"),
        ("seed: -1", "line 1: seed: input should be greater than or equal to 0, not -1"),
        ("method: {ratio: 2}", "line 1: method.ratio: input should be less than or equal to 1, not 2"),
        ("method: {name: sgdd}", r"line 1: method.name: unknown method \"sgdd\", did you mean 'sgd'\?"),
        ("method: {name: joint}\nstream: {settings: cil}", "line 2: stream.settings: input should be 'auto', 'til' or"),
        ("method: sgd", "line 1: method is a section .*, not \"sgd\"; write method: {name: sgd}, or --set method.nam"),
        ("network: {width: 3}", "line 1: network.width: input should be greater than or equal to 4, not 3"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_with_what_is_allowed(refused, text, message):
    assert re.match(f"scenario.yaml, {message}", refused(text)), refused(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stream: {tasks: 2, class_order: [0, 1, 2]}",
         "stream.class_order lists 3 classes, but 2 tasks x 2 classes need 4"),
        ("stream: {tasks: 1, class_order: [1, 1]}",
         "line 1: stream.class_order is [1, 1]; allowed: natural, shuffled, or a list of different class numbers"),
        ("stream: {tasks: 1, class_order: [-1, 1]}", "stream.class_order is [-1, 1]; allowed"),
        ("stream: {tasks: 1, class_order: [0, true]}", "stream.class_order is [0, true]; allowed"),
        ("stream: {class_order: random}", "stream.class_order is \"random\"; allowed: natural, shuffled, or a list"),
        ("stream: {class_order: []}", "stream.class_order is []; allowed"),
        ("stream: {tasks: 1, class_order: [0, 1], per_device_order: true}",
         "stream.per_device_order needs stream.class_order: shuffled, not a list"),
        ("stream: {per_device_order: true}",
         "stream.per_device_order needs stream.class_order: shuffled, not natural"),
        ("training: {epochs: 3}\nserver: {rounds_per_task: 4}",
         "server.rounds_per_task is 4, but training.epochs gives only 3 epochs to spread over them"),
        ("fleet: {classes_per_device: 2}",
         "fleet.classes_per_device is for partition: pathological or distribution, not iid"),
        ("method: {preset: paper, memory_size: 1}",
         "method.memory_size is 1, but batch-norm in training mode (method.memory_batch_norm is train, "
         "network.frozen_batch_norm train) has no variance over a single sample: at least 2"),
        ("method: {memory_batch_norm: train, memory_size: 1}", "network.frozen_batch_norm eval) has no variance"),
        ("network: {frozen_batch_norm: train}\nmethod: {name: lightcl-sparse, memory_size: 1}", "at least 2"),
        ("stream: {held_out: 0, evaluate_on: held-out}",
         "stream.evaluate_on: held-out needs stream.held_out above 0"),
        ("stream: {tasks: 1}\ntraining: {epochs: 3}\nserver: {rounds_per_task: 4}",
         "scenario.yaml, line 3: server.rounds_per_task is 4"),
        ("data: {path: photos}", "data.path is given, but data.source is digits, which ships with scikit-learn"),
        ("data: {source: image-folder, path: photos, label_column: kind}",
         "data.label_column is for data.source: parquet, not image-folder"),
        ("server: {strategy: FedAvgM, strategy_options: {server_momentum: 5}}",
         "server.strategy_options.server_momentum is 5; input should be less than 1"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_refused(refused, text, message):
    given = refused(text)
    assert given.startswith("scenario.yaml")
    assert message in given
    assert "\n" not in given


def test_every_problem_is_listed_once(refused):
    lines = refused("seed: x\ntraining: {epochs: 0, foo: 1}\n").splitlines()
    assert len(lines) == 3
    assert all(line.startswith("scenario.yaml, line ") for line in lines)


def test_a_value_that_fits_no_member_of_a_union_is_explained_without_the_library(refused):
    message = refused("stream: {class_order: 3}")
    assert message.endswith(
        "stream.class_order is 3; allowed: natural, shuffled, or a list of different class numbers (from 0 on)"
    )


def test_long_values_are_cut(refused):
    endless = "training:\n  epochs: &a [*a]"
    for text in (f"training:\n  epochs: {'x' * 10_000}", f"training: {{epochs: {list(range(5000))}}}", endless):
        assert len(refused(text)) < 200


def test_numbers_in_names_stay_texts(load):
    assert load("training: {learning_rate: 1e-2}\nfleet: {alpha: 1}").training.learning_rate == 0.01
    scenario = load("name: '1e3'")
    assert load(scenario.to_yaml()) == scenario


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: [1",
            "scenario.yaml: not valid YAML: line 1, column 6: while parsing a flow sequence, expected ',' or ']'",
        ),
        ("stream: &a {x: *a}", "scenario.yaml: not valid YAML: nested too deeply, or an anchor that holds itself"),
        ("a: " + "[" * 3000 + "]" * 3000, "scenario.yaml: not valid YAML: nested too deeply"),
        ("? [1]\n: 2", "scenario.yaml: not valid YAML: line 1, column 3: while constructing a mapping, found unhash"),
        ("a: \x01", "scenario.yaml: not valid YAML: unacceptable character #x0001: special characters are not allowed"),
        ("- 1\n- 2", "scenario.yaml: a scenario is a mapping of keys to values, not list"),
        ("text", "scenario.yaml: a scenario is a mapping of keys to values, not str"),
    ],
)
def test_what_is_no_scenario_at_all_is_refused(refused, text, message):
    given = refused(text)
    assert given.startswith(message)
    assert "\n" not in given
    assert "<unicode string>" not in given


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(RequestError, match=rf"{tmp_path}/none.yaml: cannot be read \(No such file or directory\)"):
        load_scenario(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RequestError, match=r"binary.yaml: cannot be read"):
        load_scenario(tmp_path / "binary.yaml")


def test_what_a_server_sends_is_checked_again():
    values = json.loads(Scenario().model_dump_json())
    values["training"]["epoch"] = 3
    with pytest.raises(RequestError, match=r"<message>: training.epoch: unknown key, did you mean 'epochs'\?"):
        scenario_from_json(json.dumps(values))
    with pytest.raises(RequestError, match="<message>"):
        scenario_from_json("not JSON")


# -- changes on the command line -----------------------------------------------------------------------------------


def test_changes_win_over_the_file_and_the_last_one_wins(load):
    scenario = load("training: {epochs: 3, batch_size: 8}", "training.epochs=4", "training.epochs=5", "seed=9")
    assert (scenario.training.epochs, scenario.training.batch_size, scenario.seed) == (5, 8, 9)


def test_changes_are_yaml_values(load):
    scenario = load(
        "{}",
        "stream.tasks=1",
        "stream.class_order=[3, 1]",
        "data.download=false",
        "network.width=null",
        "server.strategy=FedAdam",
        "server.strategy_options={eta: 0.1}",
        "data.source=parquet",
        "data.path=/a=b",
        "training.learning_rate=1e-2",
    )
    assert scenario.stream.class_order == (3, 1)
    assert scenario.data.download is False
    assert scenario.network.width is None
    assert scenario.server.strategy_options == {"eta": 0.1}
    assert scenario.data.path == Path("/a=b")
    assert scenario.training.learning_rate == 0.01


def test_changes_reach_into_sections_that_the_file_leaves_empty_or_out(load):
    assert load("training:", "training.epochs=4").training.epochs == 4
    assert load("{}", "server.strategy=FedAdam", "server.strategy_options.eta=0.5").server.strategy_options == {
        "eta": 0.5
    }


def test_naming_another_method_replaces_the_section(load):
    text = "method: {name: lightcl, beta: 0.5, preset: paper}"
    assert load(text, "method.name=sgd").method == SGDParameters()
    assert load(text, "method.name=sgd", "method.loss_classes=all").method == SGDParameters(loss_classes="all")
    assert load("method: {beta: 0.5}", "method.name=sgd").method == SGDParameters()


@pytest.mark.parametrize(
    "changes",
    [
        ("method.strength=77", "method.name=ewc"),
        ("method.strength=77", "method={name: ewc, strength: 3}"),
        ("method.strength=77", "method.name=ewc", "method={name: sgd}"),
    ],
)
def test_no_change_is_lost_to_one_typed_after_it(load, changes):
    for typed in (changes, changes[::-1]):
        assert load("method: {beta: 0.5}", *typed).method == EWCParameters(strength=77)


def test_a_key_of_another_method_is_refused_whatever_the_order(refused):
    for typed in (("method.beta=0.3", "method.name=sgd"), ("method.name=sgd", "method.beta=0.3")):
        assert "--set method.beta: unknown key" in refused("{}", *typed)


def test_naming_the_same_method_keeps_the_section(load):
    assert load("method: {name: lightcl, beta: 0.5}", "method.name=lightcl").method == LightCLParameters(beta=0.5)
    assert load("method: {beta: 0.5}", "method.name=lightcl").method == LightCLParameters(beta=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.epoch=3", "--set training.epoch: unknown key, did you mean 'epochs'?"),
        ("training.epochs=x", "--set training.epochs: input should be a valid integer"),
        ("trainin.epochs=3", "--set trainin.epochs: trainin: unknown key, did you mean 'training'?"),
        ("training.epochs", "--set training.epochs: expected KEY=VALUE"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("seed.x=3", "--set seed.x: 'seed' is a value, not a section"),
        ("stream.class_order=[1", "--set stream.class_order: '[1' is not a YAML value"),
        ("method.name=sgdd", '--set method.name: unknown method "sgdd"'),
        ("stream..tasks=2", "--set stream..tasks=2: expected KEY=VALUE"),
        ("training={epochs: 1, epochs: 2}", "--set training, line 1: key 'epochs' stands in line 1 already"),
        ("training=" + "[" * 3000, "is not a YAML value (nested too deeply"),
        ("stream.class_order=[0, 0, 1, 2]", "--set stream.class_order is [0, 0, 1, 2]; allowed"),
        ("stream.class_order=[0, 1, 2]", "--set stream.class_order lists 3 classes, but 5 tasks"),
        ("stream.per_device_order=true", "--set stream.per_device_order needs stream.class_order"),
        ("server.rounds_per_task=60", "--set server.rounds_per_task is 60, but training.epochs"),
        ("fleet.partition=natural", "--set fleet.partition is natural and fleet.partition_by is not given; partition"),
        ("server.strategy_options.momentum=0.9", "--set server.strategy_options.momentum: FedAvg has no such option"),
        ("server.strategy_options={eta: abc}",
         "--set server.strategy_options: server.strategy_options.eta: input should be a valid number"),
        ("method={name: lightcl-sparse, channel_sparsity: {layer9: .5}}",
         "--set method: method.channel_sparsity.layer9: input should be 'layer1'"),
    ],
)  # fmt: skip
def test_wrong_changes_are_named_as_they_were_typed(refused, change, message):
    text = (
        "seed: 1\nstream: {held_out: 0.2}\ntraining: {batch_size: 8}\nserver: {strategy_options: {}}\nmethod: {beta: 1}"
    )
    given = refused(text, change)
    assert message in given
    assert "scenario.yaml" not in given
    assert "\n" not in given
