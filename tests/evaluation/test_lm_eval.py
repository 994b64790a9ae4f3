"""The evaluation harness asks a model with its head: on a task of two files that lie beside each other."""

import json

import pytest
import torch
from command_line import last_error, tea
from tiny import tiny_backbone

from tea_rl import TeaHead
from tea_rl.errors import TeaError
from tea_rl.evaluation.lm_eval import Tasks
from tea_rl.head.config import HeadConfig

pytest.importorskip("lm_eval")

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("model"))


@pytest.fixture
def task(tmp_path):
    rows = [{"question": f"{letter} is", "choices": ["a", "b"], "answer": 1} for letter in "uvwxyz"]
    data = tmp_path / "letters.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "letters.yaml"
    path.write_text(TASK.format(data=data))
    return path


def head_that_says(backbone, letter):
    """A head that pushes one token up in every state: its features are constant, and it reads that token's direction."""
    head = TeaHead.for_backbone(backbone, HeadConfig(num_members=1, hidden_sizes=[4], shortlist_size="all"))
    weight = backbone.reference.weight[backbone.tokenizer(letter).input_ids[-1]].detach()
    with torch.no_grad():
        head.members.weights[0].zero_()
        head.members.biases[0].fill_(2.0)
        head.members.readout[:-1] = 5.0 * weight[:, None] / weight.norm()
    return head


def test_the_harness_hears_the_head(backbone, task):
    tasks = Tasks([str(task)])
    scores = {}
    for letter in "ab":
        head = head_that_says(backbone, letter)
        rows = tasks.evaluate(backbone, head, [0.0, 1.0])
        assert [(row["strength"], row["task"], row["metric"]) for row in rows] == [
            (0.0, "letters", "acc"), (1.0, "letters", "acc"),
        ]  # fmt: skip
        scores[letter] = [row["value"] for row in rows]
        assert head.strength == 1.0 and not backbone.installed
    assert scores["a"][0] == scores["b"][0]  # the original model is the same whatever the head says
    assert (scores["a"][1], scores["b"][1]) == (0.0, 1.0)


def test_tasks_that_are_not_there_are_refused(tmp_path, backbone, task):
    with pytest.raises(TeaError, match="does not exist"):
        Tasks([str(tmp_path / "nothing.yaml")])
    task.with_name("letters.jsonl").unlink()
    head = head_that_says(backbone, "a")
    with pytest.raises(TeaError, match="could not evaluate"):
        Tasks([str(task)]).evaluate(backbone, head, [1.0])
    assert not backbone.installed


def test_on_the_command_line(capsys, tmp_path, backbone, task):
    head_that_says(backbone, "b").save_pretrained(tmp_path / "head")
    code, out, _ = tea(
        capsys,
        "evaluate",
        "--lm-eval",
        task,
        "--head",
        tmp_path / "head",
        "--limit",
        3,
        "--strength",
        "1",
        "--json",
    )
    assert code == 0
    assert [(row["task"], row["value"]) for row in json.loads(out)] == [("letters", 1.0)]
    refused = last_error(
        tea(capsys, "evaluate", "quickstart", "--lm-eval", task, "--head", tmp_path / "head")
    )
    assert "quickstart beside it" in refused


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("tea_rl.evaluation.lm_eval.find_spec", lambda name: None)
    with pytest.raises(TeaError, match=r'pip install "tea-rl\[lm-eval\]"'):
        Tasks(["arc_easy"])
