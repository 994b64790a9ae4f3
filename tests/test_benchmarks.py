"""The benchmark suite on a tiny model: it runs, writes what it says, compares, and refuses mistakes. No timing is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

CHEAP = ("decode", "update", "inference")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny("llama", tmp_path_factory.mktemp("model")))


def run_suite(*arguments, folder):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "suite.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_stages(stages, model, output):
    """A quick run of some stages that must succeed; what it printed."""
    done = run_suite(
        "--quick", "--stages", ",".join(stages), "--model", model, "--dtype", "float32", "--output", str(output),
        folder=output.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    """A quick run of the cheap stages: what it printed, and its file."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("bench")
    output = folder / "bench.json"
    done = run_stages(CHEAP, model, output)
    return done.stdout, json.loads(output.read_text()), output


def test_every_stage_reports_figures_peers_and_the_limit(first):
    printed, results, _ = first
    assert list(results["stages"]) == list(CHEAP)
    assert all(
        results["limits"][name] > 0 for name in ("copy_gb_per_second", "float32_tflops", "bfloat16_tflops")
    )
    for stage in results["stages"].values():
        for figure in stage["figures"].values():
            assert figure["tea_rl"] > 0 and figure["limit"] > 0 and figure["limit_share"] > 0
            assert figure["peers"].keys() == figure["ratios"].keys()
            for name, value in figure["peers"].items():
                assert figure["ratios"][name] == pytest.approx(figure["tea_rl"] / value, rel=1e-2)
    decode = results["stages"]["decode"]["figures"]
    assert {f"batch {size}" for size in (1, 64)} < decode.keys()
    assert any("512-token prompts" in name for name in decode)
    assert set(results["stages"]["update"]["figures"]["one pass"]["peers"]) == {
        "naive_tied", "naive_readout", "lora",
    }  # fmt: skip
    assert printed.count("limits") == 1 + len(CHEAP) and printed.count("reached") == 6


def test_comparing_prints_the_ratio_of_every_figure(first, model):
    _, results, output = first
    before = json.loads(output.read_text())
    now = results["stages"]["inference"]["figures"]["batch 1"]
    before["stages"]["inference"]["figures"]["batch 1"]["tea_rl"] = now["tea_rl"] / 2
    del before["stages"]["inference"]["figures"]["batch 64"]
    import suite

    lines = suite.comparison(results, before)
    assert sum("batch 1: " in line and "= 2.00 (higher is better)" in line for line in lines) == 1
    assert "inference, batch 64: not in the earlier results" in lines
    assert sum("tokens/s = 1.00" in line for line in lines) == 3 + 1
    assert any(line.startswith("copy_gb_per_second: ") and line.endswith("= 1.00") for line in lines)
    before["settings"]["quick"] = False
    assert suite.comparison(results, before)[0].startswith("note: quick is True now and was False")


def test_a_committed_result_is_compared_with(first, model, tmp_path):
    earlier = first[2]
    done = run_suite(
        "--quick", "--stages", "inference", "--model", model, "--dtype", "float32",
        "--output", str(tmp_path / "now.json"), "--compare", str(earlier), folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"now / {earlier}" in done.stdout
    assert "against plain" in done.stdout and "(higher is better)" in done.stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--stages", "decod"], 'got "decod". Did you mean "decode"?'),
        (["--stages", ","], "got none"),
        (["--compare", "missing.json"], "got missing.json"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_measured(arguments, expected, tmp_path):
    done = run_suite(*arguments, folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and expected in line
    assert not list(tmp_path.iterdir())


def test_a_stage_that_fails_is_reported_and_the_next_one_runs(monkeypatch, tmp_path):
    import common
    import limits
    import stage_inference
    import suite

    def broken(setting):
        raise RuntimeError("no peer here\nmore")

    monkeypatch.setattr(stage_inference, "run", broken)
    setting = common.Setting(True, "none", "float32", limits.Limits(1.0, 1.0, 1.0), tmp_path)
    assert suite.run_stage("inference", setting) == {"error": "no peer here", "figures": {}}


def test_the_limit_of_a_phase_is_the_slower_of_its_two_times():
    import limits
    import torch

    machine = limits.Limits(copy_gb_per_second=10.0, float32_tflops=1.0, bfloat16_tflops=2.0)
    products, bytes_moved = limits.Work(4e12, 10e9), limits.Work(1e12, 30e9, torch.bfloat16)
    assert machine.seconds([products]) == pytest.approx(4)
    assert machine.seconds([bytes_moved]) == pytest.approx(3)
    assert machine.seconds([products, bytes_moved]) == pytest.approx(7)


def test_random_stores_and_tokens_train(tmp_path):
    """What the stage scaling measures is an update that learns: from memory and from a store on disk."""
    import stage_scaling

    size = {"vocabulary": 300, "hidden": 16, "members": 2, "shortlist": 8, "dtype": "float32", "repeats": 2}
    found = stage_scaling.child(size)
    assert len(found["microseconds"]) == 2 and min(found["microseconds"]) > 0 < found["peak_memory_gb"]
    stage_scaling.write_random_store(tmp_path / "store", 3200, {**size, "shortlist": 128})
    stored = stage_scaling.child({**size, "shortlist": 128, "store": str(tmp_path / "store")})
    assert len(stored["microseconds"]) == 2 and min(stored["microseconds"]) > 0


@pytest.mark.slow
def test_the_stages_that_need_trainers_and_processes_run(model, tmp_path):
    pytest.importorskip("peft")
    stages = ("online_step", "offline_epoch", "load")
    output = tmp_path / "bench.json"
    run_stages(stages, model, output)
    found = {name: stage["figures"] for name, stage in json.loads(output.read_text())["stages"].items()}
    step = found["online_step"]["step"]
    assert set(step["peers"]) == {"trl_grpo_lora"} and 0 < step["update_share"] < 1
    assert [set(figure["peers"]) for figure in found["offline_epoch"].values()] == [
        {"trl_sft_lora"},
        {"trl_dpo_lora"},
    ]
    children = found["load"]["first token"]["children"]
    assert children["ours"] == children["transformers"]
