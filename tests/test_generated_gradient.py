"""Functions with their gradients as generated code."""

import pytest
import torch
from spared_compiler import spare_compiler

from tea_rl.generated_gradient import differentiable


@pytest.fixture
def made(monkeypatch):
    return spare_compiler(monkeypatch)


def two_results(x, ids, weight, unused, table):
    read = torch.tanh(x @ weight) * table[ids]
    return read.sum(-1), (read.exp() * read).mean(-1)


def given(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, unused = (torch.randn(7, 5, generator=generator, requires_grad=True) for _ in range(2))
    return [
        torch.randn(rows, 7, generator=generator),
        torch.randint(11, (rows,), generator=generator),
        weight,
        unused,
        torch.randn(11, 5, generator=generator, requires_grad=True),
    ]


def results_and_gradients(function, inputs):
    results = function(*inputs)
    (results[0] * torch.linspace(0, 1, len(results[0])) + results[1].square()).sum().backward()
    gradients = [part.grad for part in inputs[2:]]
    for part in inputs[2:]:
        part.grad = None
    return [*(result.detach() for result in results), *gradients]


def compare(function, rows, seed):
    inputs = given(rows, seed)
    found, expected = (results_and_gradients(each, inputs) for each in (function, two_results))
    assert found[3] is None and expected[3] is None  # as an optimizer expects it of what is not used
    for mine, right in zip(found, expected, strict=True):
        if right is not None:
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_results_and_gradients_are_those_of_autograd(made):
    example = given(3)
    function = differentiable(two_results, 2, example[:2], example[2:])
    assert len(made) == 2
    for seed, rows in enumerate([2, 40, 1021, 1500]):
        compare(function, rows, seed)


def test_compiled_code_says_the_same():
    example = given(3)
    function = differentiable(two_results, 2, example[:2], example[2:])
    for seed, rows in enumerate([2, 40, 1021]):
        compare(function, rows, seed)


@pytest.mark.parametrize("width", [1021, 1031])
def test_sizes_are_not_taken_for_the_number_of_rows(width):
    """The examples have 1021 rows, if nothing else has."""
    x, weight = torch.randn(30, width), torch.randn(width, requires_grad=True)
    function = differentiable(lambda x, weight: ((x * weight).sum(-1),), 1, [x], [weight])
    for rows in (30, 1021, 1031, 2000):
        x = torch.randn(rows, width)
        torch.testing.assert_close(function(x, weight)[0], x @ weight, rtol=1e-4, atol=1e-4)


def test_what_was_changed_before_the_gradients_is_noticed(made):
    for place in (0, 2, 4):
        inputs = given(6)
        function = differentiable(two_results, 2, inputs[:2], inputs[2:])
        results = function(*inputs)
        with torch.no_grad():
            inputs[place].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            results[0].sum().backward()


def test_gradients_may_be_asked_for_twice(made):
    inputs = given(6)
    function = differentiable(two_results, 2, inputs[:2], inputs[2:])
    first, second = function(*inputs)[0].sum(), function(*inputs)[1].sum()
    for _ in range(2):
        first.backward(retain_graph=True)
    second.backward()
    found, inputs[2].grad = inputs[2].grad, None
    results = two_results(*inputs)
    (2 * results[0].sum() + results[1].sum()).backward()
    torch.testing.assert_close(found, inputs[2].grad)


def test_one_result_alone_may_be_used(made):
    inputs = given(6)
    function = differentiable(two_results, 2, inputs[:2], inputs[2:])
    one = []
    for each in (function, two_results):
        each(*inputs)[1].sum().backward()
        one.append(inputs[2].grad)
        inputs[2].grad = None
    torch.testing.assert_close(*one)


def test_nothing_is_learned_without_gradients(made):
    inputs = given(6)
    function = differentiable(two_results, 2, inputs[:2], inputs[2:])
    with torch.no_grad():
        assert not function(*inputs)[0].requires_grad


def test_a_second_derivative_is_refused(made):
    inputs = given(6)
    function = differentiable(two_results, 2, inputs[:2], inputs[2:])
    (first,) = torch.autograd.grad(function(*inputs)[0].sum(), inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


def loops_over_rows(x, weight):
    return (torch.stack([row @ weight for row in x]).sum(-1),)


def asks_for_a_number(x, weight):
    return ((x @ weight).sum(-1) * (2.0 if x.sum() > 0 else 1.0),)


def is_double(x, weight):
    return ((x.double() @ weight.double()).sum(-1),)


@pytest.mark.parametrize("function", [loops_over_rows, asks_for_a_number, is_double])
def test_what_depends_on_numbers_or_on_their_count_is_not_made(function, made):
    x, weight = torch.randn(4, 7), torch.randn(7, 5, requires_grad=True)
    assert differentiable(function, 1, [x], [weight]) is None
    assert not made
