"""LightCL: when it regularizes, how much, and which channels."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lightcl.methods.lightcl import LightCL, LightCLParameters
from lightcl.networks.resnet import StagedResNet
from tests.lightcl import toys
from tests.reference import regularization as reference

FIRST, SECOND = toys.context(0, [0, 1]), toys.context(1, [2, 3], seen=[0, 1, 2, 3])
MAPS = ("layer4.0.relu1", "layer4.0.relu2", "layer4.1.relu1", "layer4.1.relu2")


def make(network: StagedResNet | None = None, **parameters) -> LightCL:
    network = network or toys.network()
    method = LightCLParameters(**{"beta": 0.5, "memory_size": 3} | parameters).build(network)
    assert isinstance(method, LightCL)
    return method


def learn_first_task(method: LightCL) -> None:
    """As the device does: begin in training mode, end in evaluation mode; the steps between do not matter here."""
    method.network.train()
    method.begin_task(FIRST)
    method.network.eval()
    method.end_task(FIRST)


def begin_second_task(method: LightCL) -> None:
    learn_first_task(method)
    method.network.train()
    method.begin_task(SECOND)


def move_(network: StagedResNet, by: float = 0.05) -> None:
    """Some steps away, without training."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in [*network.suffix.parameters(), *network.head.parameters()]:
            parameter += by * torch.randn(parameter.shape, generator=generator)


def cross_entropy_alone(method: LightCL, context) -> Tensor:
    """On the same batch, in evaluation mode so that it can be computed repeatedly."""
    batch = context.task.train.load(slice(0, 6))
    return method.cross_entropy(method.network(batch.images), batch.labels, context)


def regularization_of(method: LightCL, context) -> float:
    """loss - cross-entropy, with the suffix's batch-norm in evaluation mode."""
    method.network.eval()
    batch = context.task.train.load(slice(0, 6))
    with torch.no_grad():
        return (method.loss(batch, context) - cross_entropy_alone(method, context)).item()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_first_task_is_not_regularized(preset):
    method = make(preset=preset)
    method.network.train()
    method.begin_task(FIRST)
    move_(method.network)
    assert regularization_of(method, FIRST) == 0.0
    assert method.state_dict() == {}


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_later_tasks_are_regularized(preset):
    method = make(preset=preset)
    begin_second_task(method)
    move_(method.network)
    assert regularization_of(method, SECOND) > 0.01


def test_beta_zero_is_freezing_only():
    method = make(beta=0)
    begin_second_task(method)
    move_(method.network)
    assert regularization_of(method, SECOND) == 0.0
    assert method.memory is None


def test_no_drift_is_penalized_before_the_first_step():
    """The patterns are the network's own outputs, so the regularization starts at zero."""
    method = make()
    begin_second_task(method)
    assert regularization_of(method, SECOND) == 0.0


def suffix_maps(network: StagedResNet, images: Tensor, *, batch_statistics: bool) -> tuple[dict[str, list], list]:
    """Feature maps and logits as nested lists."""
    network.suffix.train(batch_statistics)
    maps: dict[str, Tensor] = {}
    with torch.no_grad():
        logits = network.classify(network.features(images), maps.__setitem__)
    return {name: m.tolist() for name, m in maps.items()}, logits.tolist()


@pytest.mark.parametrize("reduction", ["sum", "relative"])
@pytest.mark.parametrize("memory_batch_norm", ["eval", "train"])
@pytest.mark.parametrize("freeze", ["layer3", "layer2.0", "none"])
def test_loss_agrees_with_the_literal_formula(reduction, memory_batch_norm, freeze):
    """loss = CE(logits[:, classes of the task], y) + β·( Σ_m Σ (mask_m ⊙ (F_m - F*_m))² + Σ (logits - logits*)² )."""
    network = toys.network(freeze=freeze)
    method = make(network, reduction=reduction, memory_batch_norm=memory_batch_norm)
    begin_second_task(method)
    samples = SECOND.sample(3, "memory").images
    in_training = memory_batch_norm == "train"
    patterns, pattern_logits = suffix_maps(toys.network(freeze=freeze).eval(), samples, batch_statistics=in_training)
    move_(network)

    network.train()
    batch = SECOND.task.train.load(slice(0, 6))
    given = method.loss(batch, SECOND).item()

    maps, logits = suffix_maps(network, samples, batch_statistics=in_training)
    held = reference.regularization(
        maps, patterns, {n: m.tolist() for n, m in method.vital.items()}, logits, pattern_logits, reduction
    )
    _, batch_logits = suffix_maps(network, batch.images, batch_statistics=True)
    expected = reference.cross_entropy(batch_logits, batch.labels.tolist(), [2, 3]) + 0.5 * held
    assert held > 0
    assert given == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("selection", ["exact", "paper"])
def test_vital_channels_are_those_of_the_finished_task(selection):
    method = make(vital_selection=selection, ratio=0.2)
    learn_first_task(method)
    maps, _ = suffix_maps(toys.network().eval(), FIRST.sample(8, "importance").images, batch_statistics=False)
    literal = reference.vital_as_in_the_paper if selection == "paper" else reference.vital_exactly
    expected = {name: literal(reference.channel_importance(m), 0.2) for name, m in maps.items()}
    assert {name: mask.tolist() for name, mask in method.vital.items()} == expected
    # keep = int(32 * 0.2 + 0.5) = 6, and one more under the paper's threshold
    assert {sum(mask) for mask in expected.values()} == {6 if selection == "exact" else 7}


def test_vital_masks_are_combined_over_tasks():
    method = make()
    learn_first_task(method)
    after_first = toys.copy_of(method.vital)
    other = make(toys.network(seed=6))  # a network that looks at other channels
    learn_first_task(other)
    method.network.load_state_dict(other.network.state_dict())
    method.network.eval()
    method.end_task(FIRST)
    assert tuple(method.vital) == MAPS
    for name, mask in method.vital.items():
        assert torch.equal(mask, after_first[name] | other.vital[name])
    assert any(int(mask.sum()) > int(after_first[name].sum()) for name, mask in method.vital.items())


def test_memory_is_drawn_from_the_new_task_only():
    network = toys.network(freeze="none")  # with nothing frozen, the memory is the images themselves
    method = make(network, memory_size=15)
    begin_second_task(method)
    assert method.memory is not None
    own = {image.numpy().tobytes() for image in SECOND.task.train.load().images}
    drawn = [image.numpy().tobytes() for image in method.memory]
    assert len(set(drawn)) == len(drawn) == 15
    assert set(drawn) <= own


def test_memory_is_no_larger_than_the_task():
    method = make(memory_size=1000)
    begin_second_task(method)
    assert method.memory is not None
    assert len(method.memory) == len(SECOND.task.train)


def test_only_the_masks_are_kept_after_a_task():
    method = make()
    begin_second_task(method)
    method.network.eval()
    method.end_task(SECOND)
    assert set(method.state_dict()) == {f"vital/{name}" for name in MAPS}


@pytest.mark.parametrize("memory_batch_norm", ["eval", "train"])
def test_memory_samples_do_not_move_batch_norm_statistics(memory_batch_norm):
    """They do not follow the data's distribution: a step moves the statistics as if there were no memory."""
    batch = SECOND.task.train.load(slice(0, 6))
    moved = []
    for beta in (0.5, 0.0):
        method = make(memory_batch_norm=memory_batch_norm, beta=beta)
        begin_second_task(method)
        method.loss(batch, SECOND)
        buffers = dict(method.network.named_buffers())
        moved.append({name: b.clone() for name, b in buffers.items() if name.endswith(("running_mean", "running_var"))})
        assert method.network.layer4[0].bn1.training
        assert method.network.layer4[0].bn1.momentum == 0.1
    toys.assert_same(*moved)


def test_regularization_reaches_only_suffix_and_head():
    method = make()
    begin_second_task(method)
    move_(method.network)
    method.loss(SECOND.task.train.load(slice(0, 6)), SECOND).backward()
    with_gradient = {name for name, parameter in method.network.named_parameters() if parameter.grad is not None}
    assert with_gradient == {
        *(name for name in method.network.suffix.state_dict() if name.endswith(("weight", "bias"))),
        "fc.weight",
        "fc.bias",
    }


def test_only_the_head_is_regularized_where_everything_else_is_frozen():
    method = make(toys.network(freeze="layer4"))
    begin_second_task(method)
    assert method.vital == {}
    move_(method.network)
    assert regularization_of(method, SECOND) > 0


def test_restored_method_gives_the_same_loss():
    method = make()
    begin_second_task(method)
    move_(method.network)
    restored = make(toys.network())
    restored.network.load_state_dict(method.network.state_dict())
    restored.load_state_dict(toys.copy_of(method.state_dict()))
    assert regularization_of(restored, SECOND) == regularization_of(method, SECOND) > 0
    toys.assert_same(restored.state_dict(), method.state_dict())


def test_defaults_are_the_papers_values():
    parameters = LightCLParameters()
    assert (parameters.beta, parameters.ratio, parameters.memory_size) == (2e-4, 0.15, 15)
    assert (parameters.reduction, parameters.loss_classes, parameters.default_freeze) == ("sum", "task", "layer3")


def test_default_preset_keeps_this_projects_choices():
    parameters = LightCLParameters()
    assert (parameters.vital_selection, parameters.memory_batch_norm) == ("exact", "eval")
    assert parameters.default_frozen_batch_norm == "eval"


def test_paper_preset_fills_its_keys():
    parameters = LightCLParameters(preset="paper")
    assert (parameters.vital_selection, parameters.memory_batch_norm) == ("paper", "train")
    assert parameters.default_frozen_batch_norm == "train"


def test_explicit_keys_win_over_the_preset():
    parameters = LightCLParameters(preset="paper", vital_selection="exact")
    assert (parameters.vital_selection, parameters.memory_batch_norm) == ("exact", "train")


@pytest.mark.parametrize("wrong", [{"beta": -1}, {"ratio": 0}, {"ratio": 1.1}, {"memory_size": 0}, {"preset": "ours"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        LightCLParameters(**wrong)


# -- memory_pass: joint ----------------------------------------------------------------------------------------------


def step_of(method: LightCL) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss of a step in training mode, its gradients, and the running statistics after it."""
    method.network.train()
    loss = method.loss(SECOND.task.train.load(slice(0, 6)), SECOND)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in method.network.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, toys.copy_of(dict(method.network.named_buffers()))


@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("reduction", ["sum", "relative"])
@pytest.mark.parametrize("freeze", ["layer3", "none"])
def test_a_joint_pass_computes_what_two_passes_compute(batch_norm, reduction, freeze):
    steps = []
    for memory_pass in ("separate", "joint"):
        method = make(
            toys.network(freeze=freeze), memory_pass=memory_pass, memory_batch_norm=batch_norm, reduction=reduction
        )
        begin_second_task(method)
        move_(method.network)
        steps.append(step_of(method))
    (loss, gradients, buffers), (joint_loss, joint_gradients, joint_buffers) = steps
    assert torch.allclose(joint_loss, loss, rtol=1e-5)
    assert joint_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(joint_gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale), name
    for name, buffer in buffers.items():
        if name.endswith("num_batches_tracked"):
            continue  # counts passes
        assert torch.allclose(joint_buffers[name], buffer, rtol=1e-5, atol=1e-6), name


def test_after_a_joint_pass_batch_norm_is_as_before():
    method = make(memory_pass="joint")
    begin_second_task(method)
    step_of(method)
    norm = method.network.get_submodule("layer4.0.bn1")
    assert "forward" not in vars(norm)
    x = torch.randn(6, norm.num_features, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(x).mean((0, 2, 3)), norm.bias, atol=1e-5)  # all samples share the statistics


def test_a_joint_pass_uses_every_weight_once():
    """With two passes autograd adds up two gradients; with one the first is complete."""
    method = make(memory_pass="joint")
    begin_second_task(method)
    calls = []
    method.network.get_submodule("layer4.1.conv2").register_forward_hook(lambda *given: calls.append(len(given[2])))
    step_of(method)
    assert calls == [9]  # six of the batch, three of the memory
