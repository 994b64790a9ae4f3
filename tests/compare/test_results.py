"""What is written is strict JSON and comes back as it was."""

import json
import math

import pytest
from comparisons import comparison, full_comparison, tea

from tea_rl.compare.results import JobResult, Results, read_json, read_results, write_json
from tea_rl.errors import TeaError


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_results_come_back_with_numbers_that_are_none(tmp_path):
    results = full_comparison()
    seed = results.methods[2].seeds[0]
    seed.metrics.distinct_2 = math.nan
    seed.metrics.reward_sampled[0] = math.inf
    seed.samples[0].completion = "\x00 </script> \u2028 🙂"
    write_json(results, tmp_path / "results.json")
    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    again = read_results(tmp_path)
    read = again.methods[2].seeds[0]
    assert math.isnan(read.metrics.distinct_2) and math.isinf(read.metrics.reward_sampled[0])
    assert read.samples == seed.samples
    assert again.model_dump_json() == results.model_dump_json()


def test_a_job_is_a_seed_with_its_method(tmp_path):
    job = JobResult(method="tea", seed=1, status="done", result=tea().seeds[1])
    write_json(job, tmp_path / "result.json")
    assert read_json(JobResult, tmp_path / "result.json") == job


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data.update(colour="red"), "colour"),
        (lambda data: data.update(version=2), "version"),
        (lambda data: data["methods"][0].update(status="fine"), r"methods\.0\.status"),
        (lambda data: data["methods"][0]["seeds"][0].pop("metrics"), "metrics"),
    ],
)
def test_what_is_not_a_result_is_refused_with_its_place(tmp_path, change, expected):
    data = json.loads(comparison(tea(1)).model_dump_json())
    change(data)
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(TeaError, match=expected) as refused:
        read_results(tmp_path)
    assert "\n" not in str(refused.value) and "tea-rl compare" in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_missing_and_torn_files_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(TeaError, match=r"results\.json"):
        read_results(tmp_path)


def test_every_field_says_what_it_is_or_is_named_by_its_type():
    """The schema is the documentation: its models carry a sentence each."""
    schema = Results.model_json_schema()
    for name, model in {**schema["$defs"], "Results": schema}.items():
        assert model.get("description"), name
