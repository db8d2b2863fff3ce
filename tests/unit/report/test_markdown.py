"""report.md says what matters, in words, and no name breaks it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lowmem.report.figures import draw_training
from lowmem.report.markdown import render, to_page
from lowmem.report.style import Picture
from lowmem.runs.weights import WeightsInfo
from tests.unit.report.fake_runs import MakeRun, named


def document(*runs: Path) -> str:
    return render(named(*runs), draw_training(named(*runs)))


def line(text: str, title: str) -> str:
    return next(found for found in text.splitlines() if found.startswith(f"- {title}: "))


def test_one_finished_run(make_run: MakeRun) -> None:
    text = document(make_run("res20"))
    assert "| Res20 | res20 | 5 | 8.10 % | other epochs |" in text
    assert "- res20: 5 epochs instead of 164\\*" in text
    assert "| res20 | 7:20 | 5" in text
    assert "| – | 1,712 MiB | – | – | no |" in text
    assert "![Training loss](loss.png)" in text
    assert "![Test error](test_error.png)" in text
    assert "pair_" not in text
    assert "7.74 %" not in text  # its networks without a run here: not beside one of another setting
    assert line(text, "State") == "- State: finished, 5 epochs"
    assert "batch 128" in line(text, "Settings")
    assert "1,712 MiB allocated, – reserved, – in use on the device" in line(text, "Peak memory")
    assert line(text, "Time").startswith("- Time: 7:20 in all; 5")
    assert "GTX 1060" in line(text, "Hardware")
    assert "torch 2.7.1" in line(text, "Versions")


def test_chance_is_that_of_the_runs_classes(make_run: MakeRun) -> None:
    run = make_run("res20")
    assert "of 10 classes, 90 % errors and a loss of ln 10 = 2.303." in document(run)
    (run / "weights").mkdir(exist_ok=True)
    says = WeightsInfo(classes=("cat", "dog", "ship"))
    save_file({"linear.bias": np.zeros(3, np.float32)}, run / "weights" / "last.safetensors", says.to_metadata())
    assert "of 3 classes, 66.67 % errors and a loss of ln 3 = 1.099." in document(run)


def test_what_the_best_weights_were_chosen_on(make_run: MakeRun) -> None:
    best = line(document(make_run("res20")), "Best weights")
    assert "of epoch 5, error 7.95 % on the test set" in best
    assert "optimistic" in best
    assert "--val-split" in best
    run = make_run("res20", name="val", chosen_on="val", data__val_split=5000)
    best = line(document(run), "Best weights")
    assert "held-back training pictures, on which they were chosen; test error there 8.10 %" in best
    assert "optimistic" not in best


def test_schedules_and_what_is_done_to_pictures(make_run: MakeRun) -> None:
    smooth = {"schedule__kind": "one-cycle", "schedule__warmup_epochs": 2, "schedule__low_start": "auto"}
    settings = line(document(make_run("res110", **smooth, train__label_smoothing=0.1, data__cutout=8)), "Settings")
    assert "; SGD, lr 0.1 at most, one-cycle to 0 of it, warm-up of 2 epochs; " in settings
    assert "; label smoothing 0.1 (in the training loss); cutout of 8 pixels; " in settings
    assert "low start" not in settings
    assert "times 0.1 after epochs" not in settings
    rising = line(document(make_run("res20", name="rising", schedule__warmup_epochs=2)), "Settings")
    assert "SGD, lr 0.1, times 0.1 after epochs 2.47, 3.72, warm-up of 2 epochs; " in rising


def test_no_rows(make_run: MakeRun) -> None:
    run = make_run("res110", done=0)
    (run / "steps.csv").write_text("step,epoch,lr,loss\n20,1,0.01,2.31\n", encoding="utf-8")
    text = document(run)
    assert "nothing to draw yet" in text
    assert "no epoch of 5 completed yet; newest logged step 20 with loss 2.3100, not finished" in line(text, "State")
    assert line(text, "Best weights") == "- Best weights: – (none saved)"
    assert line(text, "Time") == "- Time: – in all; – images/s"
    beside = document(run, make_run("cnn20"))
    assert "Without a curve, having completed no epoch yet: res110." in beside


def test_interrupted_and_resumed(make_run: MakeRun) -> None:
    run = make_run("res20", done=3)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"event": "resume"}) + "\n" for _ in range(2))
    state = line(document(run), "State")
    assert state == (
        "- State: at epoch 3 of 5, not finished (interrupted, or still running), interrupted and resumed 2 times"
    )


def test_resumed_on_another_machine(make_run: MakeRun) -> None:
    run = make_run("res20", done=3)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "resume", "torch": "2.8.0", "lowmem": "0.1.0", "step": 3}) + "\n")
    assert line(document(run), "Versions") == "- Versions: lowmem 0.1.0; torch 2.7.1, then 2.8.0"


def test_stopped_as_planned(make_run: MakeRun) -> None:
    run = make_run("res20", done=3, train__max_steps=1173)
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "stop", "reason": "train.max_steps"}\n')
    assert "stopped as planned (train.max\\_steps 1,173)" in line(document(run), "State")


def test_diverged(make_run: MakeRun) -> None:
    run = make_run("res20", done=2)
    with (run / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("3,1173,0.1,nan,,,90,,,,,,,,,,,,,\n")
    assert "diverged" in line(document(run), "State")


def test_names_and_notes_are_escaped(make_run: MakeRun) -> None:
    run = make_run("res20", name="a|b_*c*")
    with (run / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("6,")
    text = document(run)
    assert r"| a\|b\_\*c\* |" in text
    assert r"### a\|b\_\*c\* (Res20)" in text
    assert "the last line of metrics.csv was half written" in line(text, "Note")


def test_titles_of_pictures_are_escaped(make_run: MakeRun) -> None:
    """Of several runs of a network they hold the names of folders."""
    picture = Picture("gradients_a.png", b"png", "Gradients of Res20 [a](b)_c_ `d` | <e>", "")
    runs = named(make_run("res20"))
    title = r"Gradients of Res20 \[a\](b)\_c\_ \`d\` \| \<e\>"
    assert f"### {title}\n\n![{title}](gradients_a.png)\n" in render(runs, [picture])
    page = to_page(render(runs, [picture]), [picture], "")
    assert 'alt="Gradients of Res20 [a](b)_c_ `d` | &lt;e&gt;"' in page


def test_nothing_known_of_the_machine(make_run: MakeRun) -> None:
    run = make_run("res20")
    (run / "env.json").unlink()
    text = document(run)
    assert line(text, "Hardware") == "- Hardware: –"
    assert line(text, "Versions") == "- Versions: –"
