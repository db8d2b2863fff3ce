"""A run is held against a published figure only as what it is, and what differs is said once for all runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.report.markdown import render
from lowmem.report.tables import departures, describe_source, differences, error_table
from lowmem.runs.view import read_run
from tests.unit.report.fake_runs import MakeRun, named, write_run


@pytest.mark.parametrize(
    ("arch", "block", "error"),
    [
        ("res20", "basic", "8.08 %"),
        ("res110", "basic", "7.46 %"),
        ("cnn110", "basic", "89.66 %"),
        ("res110", "bottleneck", "other network"),  # never trained by the report: it did not fit
        ("res56", "bottleneck", "other network"),
        ("res50", "bottleneck", "other network"),
        ("cnn34", "basic", "other network"),
    ],
)
def test_matches_by_architecture_and_block(tmp_path: Path, arch: str, block: str, error: str) -> None:
    (row,) = error_table(named(write_run(tmp_path / "run", arch, done=164, epochs=164, model__block=block))).rows
    assert row[-1] == error


def test_the_published_setting_differs_in_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=164, epochs=164, seed=3, data__root="elsewhere")
    assert differences(read_run(run)) == ()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model__width": 16}, "width 16 instead of 64"),
        ({"data__source": "folder:/home/me/jpegs/"}, "pictures of folder jpegs instead of the original CIFAR-10"),
        ({"data__source": "fashion-mnist"}, "Fashion-MNIST instead of the original CIFAR-10"),
        ({"data__train_subset": 5000}, "trained on 5,000 pictures instead of 50,000"),
        ({"data__image_size": 48}, "pictures seen at 48x48 instead of 32x32"),
        ({"data__test_subset": 500}, "tested on 500 pictures instead of 10,000"),
        ({"data__val_split": 5000}, "5,000 training pictures held back"),
        ({"data__augment": False}, "no augmentation instead of crop and flip*"),
        ({"schedule__kind": "cosine"}, "another learning-rate schedule*"),
        ({"train__label_smoothing": 0.1}, "label smoothing 0.1 (in the training loss)"),
        ({"data__cutout": 8}, "cutout of 8 pixels"),
        ({"data__random_erasing": 0.25}, "random erasing of 0.25 of the pictures"),
        ({"data__mixup": 0.2}, "mixup, alpha 0.2 (its training errors are against the larger share)"),
        ({"optim__lr": 0.05}, "lr 0.05 instead of 0.1*"),
        ({"optim__momentum": 0.8}, "momentum 0.8 instead of 0.9"),
        ({"optim__weight_decay": 5e-4}, "weight decay 0.0005 instead of 0.0001"),
        ({"optim__nesterov": True}, "Nesterov momentum"),
        ({"schedule__milestones": [10]}, "another learning-rate schedule*"),
        ({"train__batch": 64}, "batch 64 instead of 128*"),
        ({"train__micro_batch": 32}, "batch norm over micro-batches of 32"),
        ({"train__precision": "amp"}, "mixed precision instead of fp32*"),
    ],
)
def test_each_difference_is_said(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    run = write_run(tmp_path / "run", done=164, epochs=164, **settings)
    assert differences(read_run(run)) == (said,)


def test_length(tmp_path: Path) -> None:
    assert differences(read_run(write_run(tmp_path / "a", done=8, epochs=8))) == ("8 epochs instead of 164*",)
    unfinished = differences(read_run(write_run(tmp_path / "b", done=9, epochs=164)))
    assert unfinished == ("only 9 of its 164 epochs done",)
    assert differences(read_run(write_run(tmp_path / "c", done=0, epochs=164))) == ("no epoch done yet",)


def test_a_folder_is_named_without_its_place() -> None:
    assert describe_source("folder:/home/me/pets") == "pictures of folder pets"
    assert describe_source("folder:C:\\Users\\me\\pets") == "pictures of folder pets"


def said_of(*runs: Path) -> list[tuple[str, str]]:
    return list(departures(named(*runs)))


def test_the_published_setting(make_run: MakeRun) -> None:
    run = make_run("res20", done=164, epochs=164)
    assert said_of(run) == [("res20", "nothing that the settings show")]
    assert departures([]) == ()


def test_networks_that_are_not_of_the_family_are_held_against_nothing(make_run: MakeRun) -> None:
    other = make_run(name="other", model__spec="torchvision:resnet18", data__image_size=128)
    runs = named(other)
    assert departures(runs) == ()
    assert error_table(runs).header == ("Network", "Run", "Epochs", "Final test error")
    assert error_table(runs).rows == (("resnet18", "other", "5", "8.10 %"),)
    text = render(runs, [])
    assert "homework" not in text.lower()
    assert "torchvision:resnet18; CIFAR-10; seen at 128x128" in text
    beside = named(other, make_run("res20", done=164, epochs=164))
    assert [row[-1] for row in error_table(beside).rows] == ["other network, data, epochs", "8.08 %"]
    assert dict(departures(beside))["other"].startswith("torchvision:resnet18 instead of a network of that report")


def test_what_all_have_in_common_is_said_once(make_run: MakeRun) -> None:
    thin = {"model__width": 16, "train__batch": 64}
    runs = [
        make_run("res20", **thin),
        make_run("cnn20", done=3, **thin),
        make_run("res56", model__block="bottleneck", **thin),
    ]
    assert said_of(*runs) == [
        ("all 3 runs", "width 16 instead of 64; 5 epochs instead of 164*; batch 64 instead of 128*"),
        ("cnn20 also", "only 3 of its 5 epochs done"),
        ("res56 also", "named in the homework report, whose author could not train it: no figure to hold it against"),
    ]
    assert said_of(*runs[:2])[0][0] == "both runs"


def test_runs_that_share_nothing(make_run: MakeRun) -> None:
    right, wrong = make_run("res20", done=164, epochs=164), make_run("cnn20", done=164, epochs=164, optim__lr=0.2)
    other = make_run("res50", done=164, epochs=164)
    assert said_of(right, wrong, other) == [
        ("res20", "nothing that the settings show"),
        ("cnn20", "lr 0.2 instead of 0.1*"),
        ("res50", "not among the networks of the homework report"),
    ]


def test_a_run_that_was_rescued(make_run: MakeRun) -> None:
    run = make_run("res20", done=164, epochs=164)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"event": "rollback", "lr_scale": scale}) + "\n" for scale in (0.5, 0.25))
    assert said_of(run) == [("res20", "0.25 of the learning rate after its loss broke")]
