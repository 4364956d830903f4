"""mac-check: everything but Core ML itself, which a runtime made of the torch graph replaces."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lib.base.errors import CorruptError, InputError, MismatchError
from lib.cli import mac_check as command
from lib.cli import mac_runtime
from lib.cli.mac_runtime import CoreMLRuntime, Placement, Units
from lib.export import layers
from lib.export.graph import DeployedDecoder
from lib.export.names import SETTINGS
from lib.snap.snap import snap_model
from tests.cli.run import Outcome, lutqat
from tests.tiny_models import VOCAB, quantized

TOKENS, SLOTS, LENGTH = 4, 16, 13
State = dict[str, torch.Tensor]


class TorchRuntime:
    """What Core ML does, done by the graph: FP16 outputs in no useful order, a cache as state."""

    def __init__(self, decoder: DeployedDecoder) -> None:
        self.decoder = decoder
        self.calls: list[str] = []

    def make_state(self) -> State:
        return dict(zip(("keys", "values"), self.decoder.empty_cache(), strict=True))

    @torch.no_grad()
    def predict(self, function: str, inputs: dict[str, np.ndarray], state: State) -> dict[str, Any]:
        size = TOKENS if function == "prefill" else 1
        assert {name: value.shape for name, value in inputs.items()} == {
            "ids": (size,),
            "positions": (size,),
            "mask": (1, 1, size, SLOTS),
            "write": (1, 1, size, SLOTS),
        }
        assert inputs["ids"].dtype == inputs["positions"].dtype == np.int32
        self.calls.append(function)
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        *logits, state["keys"], state["values"] = self.decoder(**given, **state)
        named = {f"logits_{number}": part.half().numpy() for number, part in enumerate(logits)}
        return {name: named[name] for name in sorted(named)}  # as strings: 0, 1, 10, 11, ..., 2

    def placements(self) -> list[Placement]:
        return [
            Placement(function="prefill", kind="conv", name="a", device="ANE", supported=("ANE",)),
            Placement(
                function="prefill", kind="gather", name="b", device="CPU", supported=("CPU",)
            ),
            Placement(
                function="prefill", kind="gather", name="c", device="CPU", supported=("CPU",)
            ),
            Placement(function="prefill", kind="add", name="d", device=None, supported=()),
            Placement(function="decode", kind="conv", name="a", device="ANE", supported=("ANE",)),
        ]


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[DeployedDecoder, torch.Tensor, torch.Tensor]]:
    """A graph whose head has 13 slices, a text, and the Hugging Face model's logits on it."""
    model = quantized("qwen3")
    snap_model(model, baked=False)
    ids = torch.randint(1, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    with mock.patch.object(layers, "HEAD_SLICE", 8):
        decoder = DeployedDecoder(model, SLOTS)
        assert len(decoder.head) == 13
        yield decoder, ids, logits


@pytest.fixture
def folder(tmp_path: Path, made: Any) -> Path:
    """What the export stage leaves, with an empty package."""
    (tmp_path / command.PACKAGE).mkdir()
    store(tmp_path, made[1], made[2])
    return tmp_path


def store(folder: Path, ids: torch.Tensor, logits: torch.Tensor, slots: int | str = SLOTS) -> None:
    save_file(
        {"ids": ids.int(), "logits": logits.half()},
        folder / command.EXPECTED,
        metadata={SETTINGS: json.dumps({"tokens": TOKENS, "slots": slots})},
    )


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch, made: Any) -> TorchRuntime:
    """This machine as a Mac whose Core ML is the torch graph."""
    runtime = TorchRuntime(made[0])
    monkeypatch.setattr(mac_runtime.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(mac_runtime.platform, "mac_ver", lambda: ("15.6.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(mac_runtime, "CoreMLRuntime", lambda package, units: runtime)
    return runtime


def cells(outcome: Outcome) -> dict[str, list[str]]:
    """Row name -> its two cells."""
    assert outcome.code == 0, outcome.err
    lines = [line.split("  ") for line in outcome.out.splitlines()]
    parts = [[part.strip() for part in line if part.strip()] for line in lines]
    return {line[0]: line[1:] for line in parts if len(line) == 3}


def test_table_and_file(folder: Path, on_a_mac: TorchRuntime, tmp_path: Path) -> None:
    found = cells(lutqat("mac-check", folder, "--calls", 2, "--json", tmp_path / "mac.json"))
    assert found["operations, Neural Engine"] == ["1", "1"]
    assert found["operations, CPU"] == ["2", "0"]
    assert found["operations, GPU"] == ["0", "0"]
    assert found["operations, not reported"] == ["1", "0"]
    assert found["not on the Neural Engine"] == ["CPU gather x2, not reported: add x1", "-"]
    assert found["positions compared"] == ["13", "7"]
    assert found["top-1 agreement"] == ["1.0000", "1.0000"]
    assert found["logits not finite"] == ["0", "0"]
    assert found["tokens per call"] == ["4", "1"]
    values = json.loads((tmp_path / "mac.json").read_text())
    assert values["units"] == "cpu_and_ne"
    assert values["macos"] == "15.6.1"
    assert "does not tell where it ran" in values["statement"]
    prefill, decode = values["functions"]["prefill"], values["functions"]["decode"]
    assert prefill["devices"] == {"Neural Engine": 1, "GPU": 0, "CPU": 2, "not reported": 1}
    assert [entry["name"] for entry in prefill["not_on_neural_engine"]] == ["b", "c", "d"]
    assert decode["not_on_neural_engine"] == []
    # FP16 logits on both sides: what is left is their rounding
    assert max(prefill["kl"], decode["kl"]) < 1e-4
    assert prefill["tokens_per_second"] == pytest.approx(4 / prefill["seconds_per_call"])


def test_text_is_cut_into_calls(made: Any, on_a_mac: TorchRuntime, folder: Path) -> None:
    """13 tokens are 4 calls of prefill; 6 of them are 2, and 7 of decode go on from there."""
    lutqat("mac-check", folder, "--calls", 1)
    timed = 1 + command.WARM_UP
    before_timing = ["prefill"] * (4 + 2) + ["decode"] * 7
    assert on_a_mac.calls == [*before_timing, *["prefill"] * timed, *["decode"] * timed]


def forgetful(runtime: TorchRuntime) -> Callable[..., Any]:
    kept = runtime.predict
    return lambda function, inputs, state: kept(function, inputs, runtime.make_state())


def one_late(runtime: TorchRuntime) -> Callable[..., Any]:
    kept = runtime.predict

    def predict(function: str, inputs: dict[str, np.ndarray], state: State) -> Any:
        return kept(function, {**inputs, "ids": np.roll(inputs["ids"], 1)}, state)

    return predict


def lost_a_slice(runtime: TorchRuntime) -> Callable[..., Any]:
    kept = runtime.predict

    def predict(*args: Any) -> Any:
        outputs = kept(*args)
        return {**outputs, "logits_2": outputs["logits_10"]}

    return predict


@pytest.mark.parametrize("damage", [forgetful, lost_a_slice])
def test_a_wrong_package_shows(
    on_a_mac: TorchRuntime, folder: Path, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_a_mac, "predict", damage(on_a_mac))
    path = folder / "mac.json"
    assert lutqat("mac-check", folder, "--calls", 1, "--json", path).code == 0
    functions = json.loads(path.read_text())["functions"]
    assert min(functions[name]["kl"] for name in functions) > 0.01


def test_wrong_prefill_leaves_a_mark_in_decode(on_a_mac: TorchRuntime, made: Any) -> None:
    """decode is fed from the cache that prefill filled."""
    expected = command.Expected(made[1].tolist(), made[2], TOKENS, SLOTS)
    good = command.check(on_a_mac, expected, 1)["decode"].kl
    spoiled = one_late(on_a_mac)
    kept = on_a_mac.predict
    on_a_mac.predict = lambda function, inputs, state: (  # type: ignore[method-assign]
        spoiled if function == "prefill" else kept
    )(function, inputs, state)
    assert command.check(on_a_mac, expected, 1)["decode"].kl > 0.01 > 100 * good


def test_logits_that_are_not_finite(
    on_a_mac: TorchRuntime, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = on_a_mac.predict

    def predict(*args: Any) -> Any:
        outputs = kept(*args)
        outputs["logits_0"][0, 0, 0, 0] = np.nan
        return outputs

    monkeypatch.setattr(on_a_mac, "predict", predict)
    path = folder / "mac.json"
    found = cells(lutqat("mac-check", folder, "--calls", 1, "--json", path))
    assert found["logits not finite"] == ["4", "7"]  # one per call
    assert found["KL(expected || package)"] == ["nan", "nan"]
    assert json.loads(path.read_text())["functions"]["decode"]["kl"] is None


def test_speed_is_the_median_after_warm_up(
    made: Any, on_a_mac: TorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first calls take 100 s, the others 1, 2 and 9: 4 tokens in 2 s."""
    clock = types.SimpleNamespace(now=0.0)
    costs = iter([100.0] * command.WARM_UP + [1.0, 9.0, 2.0])

    def predict(*args: Any) -> Any:
        clock.now += next(costs)

    monkeypatch.setattr(on_a_mac, "predict", predict)
    monkeypatch.setattr(command.time, "perf_counter", lambda: clock.now)
    expected = command.Expected(made[1].tolist(), made[2], TOKENS, SLOTS)
    seconds = command.seconds_per_call(on_a_mac, expected, "prefill", 3)
    assert seconds == 2
    findings = command.Findings(
        tokens=TOKENS, positions=1, kl=0, top1=1, non_finite=0, seconds=seconds
    )
    assert findings.tokens_per_second == 2


def test_it_needs_a_new_macos(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(mac_runtime.platform, "system", lambda: "Linux")
    lutqat("mac-check", folder).refused_with(3, "needs macOS 15 or newer; this is Linux")
    monkeypatch.setattr(mac_runtime.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(mac_runtime.platform, "mac_ver", lambda: ("14.7", ("", "", ""), "arm64"))
    lutqat("mac-check", folder).refused_with(3, "this is macOS 14.7")


def test_help_has_an_example() -> None:
    assert "Example: lutqat mac-check " in " ".join(lutqat("mac-check", "--help").out.split())


def test_bad_folders(folder: Path, on_a_mac: TorchRuntime, made: Any) -> None:
    lutqat("mac-check", folder / "none").refused_with(3, "holds no model.mlpackage")
    file = folder / command.EXPECTED
    file.write_bytes(b"no tensors")
    lutqat("mac-check", folder).refused_with(5, "not what the export stage writes")
    store(folder, made[1], made[2], slots="many")
    with pytest.raises(CorruptError, match="many"):
        command.read_expected(folder)
    store(folder, made[1], made[2], slots=12)
    with pytest.raises(CorruptError, match="13 ids .* cache of 12"):
        command.read_expected(folder)
    store(folder, made[1], made[2][:5])
    with pytest.raises(CorruptError, match="logits of 5 positions"):
        command.read_expected(folder)
    file.unlink()
    lutqat("mac-check", folder).refused_with(3, "holds no check.safetensors")


def test_the_package_itself_may_be_named(folder: Path, on_a_mac: TorchRuntime) -> None:
    assert lutqat("mac-check", folder / command.PACKAGE, "--calls", 1).code == 0


def test_another_vocabulary(made: Any, on_a_mac: TorchRuntime) -> None:
    expected = command.Expected(made[1].tolist(), made[2][:, :-1], TOKENS, SLOTS)
    with pytest.raises(MismatchError, match="97 logits per token, check.safetensors holds 96"):
        command.check(on_a_mac, expected, 1)


class TestCoreMLRuntime:
    """The class that calls Core ML, against coremltools' own signatures (its calls are specced)."""

    @pytest.fixture
    def ct(self) -> Any:
        pytest.importorskip("coremltools", reason="coremltools is not installed")
        from lib.export.coreml import import_coremltools

        return import_coremltools()

    def test_calls(self, ct: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from coremltools.models import compute_plan as plans

        model_type = mock.create_autospec(ct.models.MLModel)
        monkeypatch.setattr(ct.models, "MLModel", model_type)
        plan_type = mock.create_autospec(plans.MLComputePlan)
        monkeypatch.setattr(plans, "MLComputePlan", plan_type)
        plan = plan_type.load_from_path.return_value
        plan.model_structure.program = program(plans)
        plan.get_compute_device_usage_for_mlprogram_operation.side_effect = usage_of(plans)

        runtime = CoreMLRuntime(tmp_path, Units.CPU_AND_NE)
        unit = ct.ComputeUnit.CPU_AND_NE
        assert model_type.call_args_list == [
            mock.call(str(tmp_path), function_name=name, compute_units=unit)
            for name in mac_runtime.FUNCTIONS
        ]
        model = model_type.return_value
        state = runtime.make_state()
        assert state is model.make_state.return_value
        assert runtime.predict("decode", {"ids": np.zeros(1)}, state) is model.predict.return_value
        assert model.predict.call_args.kwargs == {"state": state}
        found = {(p.function, p.name): p for p in runtime.placements()}
        plan_type.load_from_path.assert_called_once_with(
            model.get_compiled_model_path.return_value, compute_units=unit
        )
        assert list(found) == [
            (function, name) for function in mac_runtime.FUNCTIONS for name in ("y", "g", "z")
        ]
        first = found["prefill", "y"]
        assert (first.kind, first.device, first.supported) == ("conv", "ANE", ("ANE", "CPU"))
        assert found["decode", "g"].device == "GPU"
        assert found["decode", "z"].device is None

    @pytest.mark.parametrize("error", [RuntimeWarning("refused"), ValueError("no such function")])
    def test_a_refused_package(
        self, ct: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
    ) -> None:
        monkeypatch.setattr(
            ct.models, "MLModel", mock.create_autospec(ct.models.MLModel, side_effect=error)
        )
        with pytest.raises(InputError, match=f"does not load function prefill .*{error}"):
            CoreMLRuntime(tmp_path, Units.ALL)


def program(plans: Any) -> Any:
    """Two functions of a constant, a convolution, a gather and an addition."""

    def operation(kind: str, name: str) -> Any:
        output = plans.MLModelStructureProgramNamedValueType(name, None)
        return plans.MLModelStructureProgramOperation({}, kind, [output], [], None)

    block = plans.MLModelStructureProgramBlock(
        [],
        [
            operation("ios18.constexpr_lut_to_dense", "w"),
            operation("ios18.conv", "y"),
            operation("ios18.gather", "g"),
            operation("add", "z"),
        ],
        ["z"],
    )
    function = plans.MLModelStructureProgramFunction([], block)
    return plans.MLModelStructureProgram(dict.fromkeys(mac_runtime.FUNCTIONS, function))


def usage_of(plans: Any) -> Callable[[Any], Any]:
    """The Neural Engine for convolutions, the GPU for gathers, nothing known of the rest."""
    from coremltools.models import compute_device as devices

    ane, gpu, cpu = (
        object.__new__(kind)
        for kind in (
            devices.MLNeuralEngineComputeDevice,
            devices.MLGPUComputeDevice,
            devices.MLCPUComputeDevice,
        )
    )
    known = {
        "ios18.conv": plans.MLComputePlanDeviceUsage(ane, [cpu, ane]),
        "ios18.gather": plans.MLComputePlanDeviceUsage(gpu, [cpu, gpu]),
    }
    return lambda operation: known.get(operation.operator_name)
