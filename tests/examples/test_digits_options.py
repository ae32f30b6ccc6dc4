"""Which options of the digits example go together."""

from __future__ import annotations

import pytest

import common
from digits_options import OPTIMIZERS, Options, build_parser, check_options

pytestmark = pytest.mark.local


def parse(*arguments: str) -> Options:
    return Options(**vars(build_parser().parse_args(arguments)))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_nothing_but_the_optimizer_need_be_given(optimizer: str) -> None:
    check_options(parse("--optimizer", optimizer), world_size=1)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("sgd", ["--blocking"]),
        ("daso", ["--warmup-epochs", "0"]),
        ("daso", ["--cooldown-epochs", "20"]),
        ("collaborative", ["--slow", "0:4", "--slow", "1:1.5"]),
        ("collaborative", ["--delayed-averaging"]),
        ("collaborative", ["--averaging-timeout", "1"]),
    ],
)
def test_option_goes_with_its_optimizer_only(optimizer: str, arguments: list[str]) -> None:
    for other in OPTIMIZERS:
        options = parse("--optimizer", other, *arguments)
        if other == optimizer:
            check_options(options, world_size=2)
            continue
        with pytest.raises(common.UserError, match=f"{arguments[0]} goes with --optimizer {optimizer}"):
            check_options(options, world_size=2)


def test_slow_rank_must_exist() -> None:
    options = parse("--optimizer", "collaborative", "--slow", "2:4")
    check_options(options, world_size=3)
    with pytest.raises(common.UserError, match="--slow 2:4: there are ranks 0 to 1 only"):
        check_options(options, world_size=2)


def test_phases_must_fit_into_the_epochs() -> None:
    arguments = ["--optimizer", "daso", "--epochs", "5", "--warmup-epochs", "3", "--cooldown-epochs"]
    check_options(parse(*arguments, "2"), world_size=1)
    with pytest.raises(common.UserError, match="must fit into --epochs, got 6 of 5"):
        check_options(parse(*arguments, "3"), world_size=1)


@pytest.mark.parametrize("text", ["4", "0:", ":4", "0:0.5", "-1:2", "a:2", "0:inf"])
def test_slowness_that_makes_no_sense_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--slow={text}")
    assert "argument --slow" in capsys.readouterr().err
