"""LightningCLI: the example with its file, the command line alone, and help that says what arguments mean."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import docstring_parser
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_dp
from lightning_dp import DPStrategy, EpsilonMonitor, NoiseScheduler, PrivacyBudget
from lightning_dp.accounting import ACCOUNTANTS, NEIGHBORING_RELATIONS
from lightning_dp.clipping import make_clipping
from lightning_dp.step import settings
from lightning_dp.strategies.base import PrivateStrategy
from tests.cases import each

# Lightning calls jsonargparse by names that its newest release deprecates; outside of tests Python does not show it
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

EXAMPLE = Path(__file__).parents[2] / "examples" / "cli"
CALLBACKS = [
    *("AdaptiveClipping", "AutoThreshold", "ClippingScheduler", "EpsilonMonitor", "FixModule", "GradientDiagnostics"),
    *("MagnitudePruning", "NoiseScheduler", "PrivacyAudit", "PrivacyBudget", "PrivacyCard"),
    *("PublishedAutoThreshold", "RandomSparsification", "SwitchToDP"),
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cli_example", EXAMPLE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cli(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a user's terminal does: the command's arguments in, a finished Trainer out."""

    def run(*arguments: str) -> Any:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # else the first test of a process meets a warning
        quiet = {"enable_progress_bar": "false", "enable_model_summary": "false", "logger": "false"}
        if arguments[0] == "fit" and "help" not in " ".join(arguments):
            arguments = (*arguments, *(f"--trainer.{name}={value}" for name, value in quiet.items()))
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        return LightningCLI(example.Classifier, example.Digits).trainer

    return run


def help_of(cli: Any, capsys: pytest.CaptureFixture[str], argument: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        cli("fit", argument)
    return " ".join(capsys.readouterr().out.split())


def test_config_file_trains_privately(cli: Any, tmp_path: Path) -> None:
    trainer = cli("fit", "--config", str(EXAMPLE / "dp.yaml"), "--trainer.enable_checkpointing=false")
    strategy = trainer.strategy
    assert isinstance(strategy, DPStrategy)
    assert 1.9 < strategy.epsilon() <= 2.0
    assert strategy.ledger.num_steps == 100
    assert len(strategy.ledger.entries) == 4  # plateaus of the schedule in the file
    kinds = {type(callback) for callback in trainer.callbacks}
    assert {EpsilonMonitor, NoiseScheduler, PrivacyBudget} <= kinds
    assert float(trainer.callback_metrics["val_accuracy"]) > 0.8


@pytest.mark.slow
def test_command_line_alone(cli: Any, tmp_path: Path) -> None:
    trainer = cli(
        "fit",
        "--trainer.strategy=lightning_dp.DPStrategy",
        "--trainer.strategy.target_epsilon=3",
        "--trainer.strategy.accountant=rdp",
        "--trainer.strategy.clipping=lightning_dp.TopAgg",
        "--trainer.strategy.clipping.k=0.1",
        "--trainer.callbacks+=lightning_dp.RandomSparsification",
        "--trainer.callbacks.final_rate=0.5",
        "--trainer.callbacks.refresh=2",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_checkpointing=false",
        "--data.batch_size=512",
    )
    assert 2.9 < trainer.strategy.epsilon() <= 3
    assert trainer.strategy.plan.clipping == lightning_dp.TopAgg(k=0.1)
    assert trainer.callbacks[0].refresh == 2


@pytest.mark.slow
def test_correlated_noise_on_the_command_line(cli: Any) -> None:
    trainer = cli(
        "fit",
        "--trainer.strategy=lightning_dp.DPStrategy",
        "--trainer.strategy.noise_multiplier=1",
        "--trainer.strategy.sampling=cyclic",
        "--trainer.strategy.noise.decay=0.9",
        "--trainer.strategy.clipping=lightning_dp.PerLayerClipping",
        "--trainer.strategy.clipping.group_weights={'*.weight': 2.0, '*': 1.0}",
        "--trainer.strategy.clipping.noise=equal",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_checkpointing=false",
    )
    assert trainer.strategy.plan.correlation.noise == lightning_dp.CorrelatedNoise(decay=0.9)
    assert trainer.strategy.plan.clipping.group_weights == {"*.weight": 2.0, "*": 1.0}


def test_printed_config_holds_every_argument(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli("fit", "--config", str(EXAMPLE / "dp.yaml"), "--trainer.strategy.memory=lean", "--print_config")
    strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning_dp.DPStrategy"
    arguments = strategy["init_args"]
    assert (arguments["target_epsilon"], arguments["clipping"], arguments["memory"]) == (2.0, "automatic", "lean")
    assert set(inspect.signature(PrivateStrategy).parameters) - {"strategy_options"} <= set(arguments)


def test_help_says_types_and_meanings(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(cli, capsys, "--trainer.strategy.help=lightning_dp.DPStrategy")
    assert "calibrate the noise so that the whole planned run ends at this epsilon or just below" in text
    assert "type: float | null, default: null" in text
    assert "--trainer.strategy.neighboring_relation {add_or_remove_one,replace_one,zero_out}" in text
    assert "--trainer.strategy.accountant {pld,rdp,prv,gdp,tcdp}" in text
    text = help_of(cli, capsys, "--trainer.callbacks.help=lightning_dp.NoiseScheduler")
    assert "--trainer.callbacks.kind" in text
    assert "between two changes, >= 1" in text


@each("name", [*CALLBACKS, "DPStrategy", "DPDDPStrategy", "TopAgg", "AutomaticClipping"])
def test_every_argument_is_typed_and_documented(name: str) -> None:
    kind = getattr(lightning_dp, name)
    signature = inspect.signature(kind)
    documented = {
        p.arg_name.lstrip("*"): p.description for p in docstring_parser.parse(inspect.getdoc(kind) or "").params
    }
    assert sorted(documented) == sorted(signature.parameters)  # the docstring groups them
    assert all(documented.values())
    hints = get_type_hints(kind.__init__)
    assert all(argument in hints for argument in signature.parameters)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.strategy.accountant=moments", "pld"),
        ("--trainer.strategy.target_epsilon=three", "float"),
        ("--trainer.strategy.max_grad_nrom=1", "max_grad_nrom"),
    ],
)
def test_a_mistyped_argument_is_refused_by_name(
    cli: Any, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli("fit", "--trainer.strategy=lightning_dp.DPStrategy", argument)
    error = capsys.readouterr().err
    assert argument.partition("=")[0].rpartition(".")[2] in error
    assert message in error


def test_names_in_signatures_are_those_that_work() -> None:
    assert set(get_args(settings.AccountantName)) == set(ACCOUNTANTS)
    assert get_args(settings.Relation) == settings.RELATIONS == NEIGHBORING_RELATIONS
    for name in get_args(settings.ClippingName):
        assert make_clipping(name, 1.0).name == name
    assert set(lightning_dp.callbacks.__all__) == set(CALLBACKS)
