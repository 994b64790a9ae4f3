"""Which methods there are, which recipes they fit, and what jobs they make."""

import pytest
from tiny_jobs import tiny_recipe

from tea_rl.compare.jobs import plan, read_job
from tea_rl.compare.methods import METHODS, check_recipe, learning_rates, parse_methods
from tea_rl.errors import TeaError
from tea_rl.recipe import load_recipe, parse_recipe


def test_every_trainer_takes_every_adapter():
    for trainer in ("grpo", "rloo", "dpo", "kto", "sft"):
        for adapter in ("lora", "ia3", "prompt-tuning", "prefix-tuning", "p-tuning"):
            method = METHODS[f"{trainer}-{adapter}"]
            assert (method.trainer, method.adapter, method.is_peer) == (trainer, adapter, True)
    assert METHODS["full-dpo"].adapter == "full"
    assert not any(METHODS[name].is_peer for name in ("base", "best-of-n", "tea"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("base,grpo-lra", 'Did you mean "grpo-lora"?'),
        ("base, ,", None),
        ("tea,tea", "twice"),
        (" ,", "separated by commas"),
    ],
)
def test_names_are_checked(text, expected):
    if expected is None:
        assert [method.name for method in parse_methods(text)] == ["base"]
    else:
        with pytest.raises(TeaError) as raised:
            parse_methods(text)
        assert expected in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["frozenlake", "facts"])
def test_recipes_without_prompts_are_refused(name):
    with pytest.raises(TeaError, match="needs a recipe with data.prompts"):
        check_recipe(load_recipe(name), parse_methods("base,tea"))


def test_settings_that_do_not_fit_are_refused(tmp_path):
    alone = tiny_recipe(tmp_path, rollout={"num_generations": 1}, objective={"name": "reinforce"})
    check_recipe(alone, parse_methods("base,tea"))
    with pytest.raises(TeaError, match="num_generations of at least 2"):
        check_recipe(alone, parse_methods("base,grpo-lora"))
    with pytest.raises(TeaError, match="holds out no prompts"):
        check_recipe(tiny_recipe(tmp_path, data={"eval_fraction": 0}), parse_methods("base"))
    packed = tiny_recipe(tmp_path, model={"quantization": "nf4"})
    with pytest.raises(TeaError, match="model.quantization none"):
        check_recipe(packed, parse_methods("full-dpo"))
    integer = tiny_recipe(tmp_path, model={"quantization": "w8a8"})
    check_recipe(integer, parse_methods("base,tea"))
    with pytest.raises(TeaError, match="grpo-lora sends gradients .* w8a8"):
        check_recipe(integer, parse_methods("grpo-lora"))


def test_rates_come_from_the_recipe_or_the_default_grid(tmp_path):
    recipe = tiny_recipe(tmp_path, compare={"learning_rates": {"lora": [1e-4, 1e-3]}})
    assert learning_rates(METHODS["grpo-lora"], recipe) == [1e-4, 1e-3]
    assert len(learning_rates(METHODS["grpo-ia3"], recipe)) == 3
    assert learning_rates(METHODS["tea"], recipe) == [None]
    with pytest.raises(TeaError, match='no adapter "lroa"'):
        parse_recipe({**recipe.model_dump(), "compare": {"learning_rates": {"lroa": [1e-4]}}})


def test_jobs_begin_with_the_base_model_and_end_with_the_dearest(tmp_path):
    recipe = tiny_recipe(tmp_path, compare={"learning_rates": {"lora": [1e-4, 1e-3]}, "seeds": [3, 5]})
    jobs = plan(recipe, parse_methods("grpo-lora,tea,sft-lora"), tmp_path / "out")
    assert [(job.method.name, job.learning_rate, job.seed) for job in jobs] == [
        ("base", None, 3),
        ("tea", None, 3),
        ("tea", None, 5),
        ("sft-lora", 1e-4, 3),
        ("sft-lora", 1e-3, 3),
        ("grpo-lora", 1e-4, 3),
        ("grpo-lora", 1e-3, 3),
    ]


def test_a_job_is_read_back_as_it_was_and_knows_another_one(tmp_path):
    recipe = tiny_recipe(tmp_path, compare={"seeds": [1, 2]})
    job = plan(recipe, parse_methods("grpo-lora"), tmp_path / "out")[-1]
    job.begin()
    again = read_job(job.folder)
    assert again.facts() == job.facts() and again.recipe.compare.seeds == [1, 2]
    other_choice = tiny_recipe(tmp_path, compare={"seeds": [1], "levels": [0.5]})
    plan(other_choice, parse_methods("grpo-lora"), tmp_path / "out")[-1].check_same()
    other = tiny_recipe(tmp_path, train={"max_steps": 9})
    other.compare.seeds = [1, 2]
    with pytest.raises(TeaError, match=r"recipe.train.max_steps \(2 then, 9 now\)"):
        plan(other, parse_methods("grpo-lora"), tmp_path / "out")[-1].check_same()
    (job.folder / "job.json").write_text("{")
    with pytest.raises(TeaError, match="is damaged"):
        job.check_same()
