"""`device.precision` and `device.convolutions`: auto, by what the hardware is known to be faster in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightcl import preparation
from lightcl.device import arithmetic
from lightcl.device.arithmetic import Arithmetic, arithmetic_of, bf16_pays, slow_arithmetic, with_arithmetic
from lightcl.device.device import EdgeDevice
from lightcl.errors import RequestError
from lightcl.networks.native import NativeConv3x3, library
from lightcl.networks.winograd import WinogradConv2d
from lightcl.preparation import open_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from tests.lightcl import toys

SOURCE = toys.source()
BF16, WINOGRAD, PLAIN = Arithmetic("bf16", "direct"), Arithmetic("fp32", "winograd"), Arithmetic("fp32", "direct")
NATIVE, NATIVE_BF16 = Arithmetic("fp32", "native"), Arithmetic("bf16", "native")
ZEN_5 = ("AuthenticAMD", 26, "avx2 avx512f avx512_bf16")
LAPTOP = ("GenuineIntel", 6, "avx2")


def scenario(precision: str, convolutions: str = "auto", **device: object) -> Scenario:
    return toys.scenario(
        device={"precision": precision, "convolutions": convolutions, "accelerator": "cpu"} | device,
        network={"weights": "none", "width": 8},  # 64 channels at the end
    )


def machine(monkeypatch: pytest.MonkeyPatch, vendor: str, family: int, flags: str, name: str = "x86_64") -> None:
    """This machine's processor, as Linux describes it."""
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: fpu {flags}\n"
    monkeypatch.setattr(arithmetic, "cpuinfo", lambda: text)
    monkeypatch.setattr("platform.machine", lambda: name)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(monkeypatch, False)


def compiler(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    """Whether this machine has one."""
    found_library = library.find_library()
    monkeypatch.setattr(arithmetic, "find_library", lambda: found_library if found else "there is no C compiler")


@pytest.mark.parametrize(
    ("processor", "chosen", "in_fp32", "in_bf16"),
    [
        (ZEN_5, NATIVE_BF16, NATIVE, NATIVE_BF16),
        (("AuthenticAMD", 25, "avx2 avx512f avx512_bf16"), NATIVE_BF16, NATIVE, NATIVE_BF16),  # Zen 4
        (("GenuineIntel", 6, "avx2 avx512f avx512_bf16 amx_bf16"), NATIVE_BF16, NATIVE, NATIVE_BF16),
        (LAPTOP, NATIVE, NATIVE, NATIVE_BF16),
        (("ARM", 8, "bf16", "aarch64"), PLAIN, PLAIN, BF16),
    ],
)
def test_by_processor_with_a_compiler(
    monkeypatch: pytest.MonkeyPatch, processor: tuple[str, int, str], chosen: Arithmetic, in_fp32: Arithmetic,
    in_bf16: Arithmetic,
) -> None:  # fmt: skip
    machine(monkeypatch, *processor)
    compiler(monkeypatch, True)
    if isinstance(library.find_library(), str):
        pytest.skip("no C compiler")
    assert arithmetic_of(scenario("auto")) == chosen
    assert arithmetic_of(scenario("fp32")) == in_fp32
    assert arithmetic_of(scenario("bf16")) == in_bf16
    assert arithmetic_of(scenario("fp32", "winograd")) == WINOGRAD
    assert not slow_arithmetic(scenario("auto"))


def test_a_missing_compiler_is_named_where_it_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, *LAPTOP)
    (warning,) = slow_arithmetic(scenario("auto"))
    assert warning.startswith("there is no C compiler; with a C compiler such as gcc training would be faster")
    resolved = with_arithmetic(scenario("auto"))
    assert slow_arithmetic(resolved) == []
    assert slow_arithmetic(resolved, scenario("auto").device) == [warning]
    assert slow_arithmetic(scenario("fp32", "direct")) == []
    machine(monkeypatch, "ARM", 8, "bf16", "aarch64")
    assert slow_arithmetic(scenario("auto")) == []


def test_what_cannot_be_compiled_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_library", lambda: "there is no C compiler")
    with pytest.raises(RequestError, match=r"device\.convolutions is native, but there is no C compiler"):
        with_arithmetic(scenario("fp32", "native"))


@pytest.mark.parametrize(
    ("processor", "chosen", "in_fp32"),
    [
        (ZEN_5, BF16, PLAIN),
        (("AuthenticAMD", 25, "avx2 avx512f avx512_bf16"), BF16, WINOGRAD),  # Zen 4
        (("AuthenticAMD", 25, "avx2"), WINOGRAD, WINOGRAD),  # Zen 3
        (("GenuineIntel", 6, "avx2 avx512f avx512_bf16"), WINOGRAD, WINOGRAD),  # AMX hidden by a hypervisor
        (("GenuineIntel", 6, "avx2 avx512f avx512_bf16 amx_bf16"), BF16, WINOGRAD),
        (LAPTOP, WINOGRAD, WINOGRAD),
        (("ARM", 8, "bf16", "aarch64"), PLAIN, PLAIN),
    ],
)
def test_by_processor_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, processor: tuple[str, int, str], chosen: Arithmetic, in_fp32: Arithmetic
) -> None:
    machine(monkeypatch, *processor)
    assert arithmetic_of(scenario("auto")) == chosen
    assert arithmetic_of(scenario("fp32")) == in_fp32
    assert arithmetic_of(scenario("bf16")) == BF16
    assert arithmetic_of(scenario("bf16", "winograd")) == Arithmetic("bf16", "winograd")
    slow = chosen is WINOGRAD
    asked = ["device.precision is bf16" in " ".join(slow_arithmetic(scenario(one))) for one in ("bf16", "auto", "fp32")]
    assert asked == [slow, False, False]


def test_without_a_description_of_the_processor_the_plain_choice_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "cpuinfo", lambda: "")
    assert arithmetic_of(scenario("auto")) == PLAIN


@pytest.mark.parametrize(("capability", "expected"), [((7, 2), PLAIN), ((8, 7), BF16), ((9, 0), BF16)])
def test_by_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: Arithmetic) -> None:
    machine(monkeypatch, *LAPTOP)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert arithmetic_of(scenario("auto", accelerator="cuda")) == expected
    assert arithmetic_of(scenario("fp32", accelerator="cuda")) == PLAIN
    assert bf16_pays(torch.device("cuda")) == ("yes" if expected is BF16 else "no")


def test_given_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for processor in (ZEN_5, LAPTOP):
        machine(monkeypatch, *processor)
        given = scenario("bf16", "winograd")
        assert with_arithmetic(given) is given
    device = with_arithmetic(scenario("bf16", "auto")).device
    assert (device.precision, device.convolutions) == ("bf16", "direct")


@pytest.mark.parametrize("with_compiler", [False, True])
@pytest.mark.parametrize("processor", [ZEN_5, LAPTOP])
def test_auto_trains_as_what_it_chose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processor: tuple[str, int, str], with_compiler: bool
) -> None:
    machine(monkeypatch, *processor)
    compiler(monkeypatch, with_compiler)
    chosen = arithmetic_of(scenario("auto"))
    losses = []
    for number, wanted in enumerate(("auto", chosen.precision, "bf16" if chosen.precision == "fp32" else "fp32")):
        device = EdgeDevice(
            scenario(wanted), 0, tmp_path / str(number), source=SOURCE, share=toys.whole(SOURCE)
        )  # fmt: skip
        losses.append(device.train(0, 2).loss)
        kinds = {type(module) for module in device.network.modules()}
        convolutions = arithmetic_of(scenario(wanted)).convolutions
        assert (WinogradConv2d in kinds) == (convolutions == "winograd")
        assert (NativeConv3x3 in kinds) == (convolutions == "native")
    assert losses[0] == losses[1] != losses[2]


def test_a_run_records_what_was_chosen_and_another_machine_continues_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preparation, "load_source", lambda request: SOURCE)
    folder = RunFolder(tmp_path / "run")

    def opened(given: Scenario, *, resume: bool) -> Arithmetic:
        device = open_run(folder, given, "test", "fleet", resume=resume, overwrite=False).scenario.device
        recorded = folder.read()["scenario"]["device"]
        assert (recorded["precision"], recorded["convolutions"]) == (device.precision, device.convolutions)
        return arithmetic_of(scenario(device.precision, device.convolutions))

    machine(monkeypatch, *ZEN_5)
    assert opened(scenario("auto"), resume=False) == BF16
    machine(monkeypatch, *LAPTOP)
    assert opened(scenario("auto"), resume=True) == BF16
    with pytest.raises(RequestError, match=r"device\.precision was 'bf16', now 'fp32'"):
        opened(scenario("fp32"), resume=True)


def test_a_fleet_of_boards_leaves_the_choice_to_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preparation, "load_source", lambda request: SOURCE)
    machine(monkeypatch, *ZEN_5)
    folder = RunFolder(tmp_path / "run")
    for resume in (False, True):
        prepared = open_run(
            folder, scenario("auto"), "test", "fleet", resume=resume, overwrite=False, here=False
        )  # fmt: skip
        assert prepared.scenario.device.precision == prepared.scenario.device.convolutions == "auto"
