"""What an update costs a token as data, vocabulary, states, ensemble and shortlist grow; random weights, no model.

Every size runs in a process of its own, which also gives its peak memory. Vocabulary, hidden size, members and shortlist:
updates of 2,048 tokens in memory. Tokens: steps at random places of a state store on disk, which is memory-mapped; it is
written beforehand by this process, with random states and shortlists. There is no peer: the column ``base`` is the default
size, and a ratio below 1 says how much dearer a token is than there.

Limit: `limits.HeadWork.update` for the size; from the store, the states read as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import OURS, Figure, Setting, peak_memory_gb, seconds
from limits import HeadWork, Work
from torch import nn

from tea_rl import HeadConfig, TeaHead
from tea_rl.devices import product_dtype
from tea_rl.head.policy import Shortlist
from tea_rl.recipe import AnchorConfig, ObjectiveConfig, Recipe, TrainConfig, parse_recipe
from tea_rl.rollout.trajectory import TokenBatch
from tea_rl.states import StateStore
from tea_rl.states.manifest import StoreHeader
from tea_rl.states.rows import StoredRow
from tea_rl.states.writer import StoreWriter
from tea_rl.training.learner import Learner
from tea_rl.training.offline_data import OfflineData
from tea_rl.training.offline_learner import OfflineLearner

BASE = {"vocabulary": 49152, "hidden": 576, "members": 4, "shortlist": 128, "dtype": "float32"}
_SIZES = {
    "vocabulary": (32768, 131072, 262144),
    "hidden": (1024, 2048, 4096),
    "members": (1, 16, 64),
    "shortlist": (32, 256, 1024),
}
#: Those that a quick run has time for.
_QUICK = {"vocabulary": (262144,), "hidden": (), "members": (16,), "shortlist": ()}
_TOKENS, _ROW_TOKENS, _PIECE, _MINIBATCH = 2048, 32, 32768, 512
#: Random pieces of a store; further ones repeat them, for drawing them takes longer than writing.
_PIECES = 3
#: Steps of a repeat from a store: more than are read ahead at a time (`tea_rl.training.read_ahead`).
_STORE_STEPS = 48
#: Processes of one size: where their memory lies makes them differ by a fifth.
_ROUNDS = 3
#: Processes are forked off one that has imported everything and done nothing else: imports take longer than what is measured.
_APART = get_context("forkserver")
_APART.set_forkserver_preload(
    ["tea_rl.training.learner", "tea_rl.training.offline_learner", "tea_rl.states.writer"]
)


def run(setting: Setting) -> Iterator[Figure]:
    """Measure the stage."""
    base = {**BASE, "dtype": str(setting.backbone.dtype).removeprefix("torch.")}
    wanted = {"default size": base} | {
        f"{name} {size}": {**base, name: size}
        for name, sizes in _SIZES.items()
        for size in setting.pick(_QUICK[name], sizes)
    }
    if not setting.quick:  # what the processor's caches give, taken away
        largest = max(_SIZES["vocabulary"])
        wanted[f"vocabulary {largest}, any token"] = {**base, "vocabulary": largest, "uniform": True}
    found = _in_memory(wanted, setting.pick(3, 5), setting.pick(1, _ROUNDS))
    for name, size in wanted.items():
        yield _figure(setting, name, size, found[name], found["default size"])
    counts = setting.pick((10**4, 10**5), (10**4, 10**5, 10**6)) + ((10**7,) if setting.huge else ())
    first = None
    for count in counts:
        store = setting.folder / f"store-{count}"
        write_random_store(store, count, base)
        read = _apart({**base, "store": str(store), "repeats": setting.pick(2, 3)})
        first = first or read
        yield _figure(setting, f"tokens {count}", base, read, first)
        for file in store.iterdir():  # gigabytes
            file.unlink()


def _in_memory(wanted: dict[str, Any], repeats: int, rounds: int) -> dict[str, dict[str, Any]]:
    """What the children of these sizes found; those that are compared within a fifth are run ``rounds`` times, in turn."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name, size in wanted.items():
            if number and not name.startswith(("default", "vocabulary")):
                continue
            newest = _apart({**size, "repeats": repeats})
            known = found.setdefault(name, {"microseconds": [], "peak_memory_gb": 0.0})
            known["microseconds"] += newest["microseconds"]
            known["peak_memory_gb"] = max(known["peak_memory_gb"], newest["peak_memory_gb"])
    return found


def _apart(size: dict[str, Any]) -> dict[str, Any]:
    """`child` in a process of its own."""
    with _APART.Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(child, (size,))


def _figure(
    setting: Setting, name: str, size: dict[str, Any], found: dict[str, Any], base: dict[str, Any]
) -> Figure:
    work = HeadWork(make_head(size, "meta"))
    work.dtype = product_dtype(torch.empty(0, dtype=getattr(torch, size["dtype"])))  # not that of "meta"
    phases = work.update(_TOKENS, _TOKENS // _MINIBATCH)
    if name.startswith("tokens"):
        phases.append(Work(0, _TOKENS * work.state_bytes))
    limit = setting.limits.seconds(phases) / _TOKENS * 1e6
    values = {OURS: found["microseconds"]} | ({} if found is base else {"base": base["microseconds"]})
    return Figure(name, "us/token", values, limit, {"peak_memory_gb": found["peak_memory_gb"]})


def output_layer(size: dict[str, Any], device: str = "cpu") -> nn.Linear:
    """A random one."""
    torch.manual_seed(0)
    dtype = getattr(torch, size["dtype"])
    return nn.Linear(size["hidden"], size["vocabulary"], bias=False, device=device, dtype=dtype)


def make_head(size: dict[str, Any], device: str = "cpu") -> TeaHead:
    """A fresh head on a random output layer."""
    layer = output_layer(size, device)
    return TeaHead(layer, HeadConfig(num_members=size["members"], shortlist_size=size["shortlist"]))


def random_tokens(count: int, size: dict[str, Any], generator: torch.Generator) -> TokenBatch:
    """Tokens as a rollout would leave them, made up: no shortlist here was worth a product with the vocabulary."""
    vocabulary, listed = size["vocabulary"], size["shortlist"]
    ids = _listed_tokens(count, listed, vocabulary, size.get("uniform", False), generator)
    logits = torch.randn(count, listed, generator=generator).sort(dim=1, descending=True).values
    slots = torch.randint(listed, (count,), generator=generator)
    numbers = torch.arange(count)
    zeros = torch.zeros(count)
    shortlist = Shortlist(ids, logits, torch.full((count,), 2.0), torch.full((count,), 5.0))
    logps = shortlist.slot_logits().log_softmax(-1).gather(1, slots.unsqueeze(1)).squeeze(1)
    states = torch.randn(count, size["hidden"], generator=generator).to(getattr(torch, size["dtype"]))
    actions = ids.gather(1, slots.unsqueeze(1)).squeeze(1)
    return TokenBatch(
        states, shortlist, actions, slots, zeros, logps, logps.clone(), zeros, zeros, numbers,
        numbers // _ROW_TOKENS, numbers % _ROW_TOKENS,
    )  # fmt: skip


def _listed_tokens(
    count: int, listed: int, vocabulary: int, uniform: bool, generator: torch.Generator
) -> torch.Tensor:
    """Shortlists without repeats, ``(count, listed)``, as unequal as those of text unless ``uniform``.

    Of the tokens that SmolLM2-135M lists in 12,773 positions of film reviews, 100 make up 24 %, 1,000 61 % and 5,000 88 %; the
    law ``(rank + 50) ** -1.25`` gives 29, 65 and 84 % of that vocabulary. Which token has which rank is drawn, once for a vocabulary:
    neighbours in memory are not alike, the pieces of a store are.
    """
    ranks = torch.arange(vocabulary, dtype=torch.float64)
    heights = torch.ones_like(ranks) if uniform else (ranks + 50.0) ** -1.25
    below = heights.cumsum(0) / heights.sum()
    # One draw from each of as many equal shares of the probability, moved on where it would repeat its neighbour.
    draws = (torch.arange(listed) + torch.rand(count, listed, generator=generator)) / listed
    found = torch.searchsorted(below, draws.double()).clamp(max=vocabulary - 1)
    steps = torch.arange(listed)
    found = ((found - steps).cummax(dim=1).values + steps).clamp(max=vocabulary - 1)
    return torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[found]


def write_random_store(path: Path, count: int, size: dict[str, Any]) -> None:
    """A state store of ``count`` random tokens (whole rows of 32), with random rewards."""
    generator = torch.Generator().manual_seed(0)
    context = HeadConfig().context.model_dump()
    keys = {name: "random" for name in ("base_model_name_or_path", "reference_digest", "body_digest")}
    keys |= {"tokenizer_digest": "random", "rendering_digest": "random", "quantization": "none"}
    keys |= {
        "dtype": size["dtype"],
        "temperature": 1.0,
        "context": context,
        "shortlist_size": size["shortlist"],
    }
    header = StoreHeader(
        "dataset", keys, "random", size["hidden"], size["hidden"], size["vocabulary"], size["shortlist"], 1.0, 1.0
    )  # fmt: skip
    with StoreWriter.create_or_continue(path, header, output_layer(size)) as writer:
        pieces: list[TokenBatch] = []
        for start in range(0, count, _PIECE):
            number = min(_PIECE, count - start) // _ROW_TOKENS
            first = start // _ROW_TOKENS
            if len(pieces) < _PIECES:
                pieces.append(random_tokens(number * _ROW_TOKENS, size, generator))
            piece = pieces[start // _PIECE % len(pieces)].select(torch.arange(number * _ROW_TOKENS))
            rewards = torch.rand(number, generator=generator).tolist()
            rows = [
                StoredRow([0], "", "", reward=reward, group=first + at, source_row=first + at)
                for at, reward in enumerate(rewards)
            ]
            writer.append(rows, piece)
        writer.finish()


def child(size: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a token of every repeat, and the peak memory of this process."""
    generator = torch.Generator().manual_seed(0)
    if "store" in size:
        measured = _from_store(Path(size["store"]), size["repeats"], generator)
    else:
        head = make_head(size)
        tokens, advantage = random_tokens(_TOKENS, size, generator), torch.randn(_TOKENS)
        objective = ObjectiveConfig(name="grpo", inner_epochs=1, minibatch_tokens=_MINIBATCH)
        learner = Learner(head, objective, AnchorConfig(), TrainConfig(learning_rate=1e-5), 1.0, 10**6)
        learner.update(tokens, advantage, generator)  # warms up
        measured = [
            seconds(lambda: learner.update(tokens, advantage, generator)) / _TOKENS * 1e6
            for _ in range(size["repeats"])
        ]
    return {"microseconds": measured, "peak_memory_gb": round(peak_memory_gb(), 3)}


def _from_store(path: Path, repeats: int, generator: torch.Generator) -> list[float]:
    recipe: Recipe = parse_recipe(
        {
            "data": {"store": str(path), "eval_fraction": 0.0},
            "objective": {"name": "reward_weighted", "minibatch_tokens": _MINIBATCH},
            "train": {"learning_rate": 1e-5, "max_steps": 10**6},
        }
    )
    store = StateStore.open(path, verify=False)
    data = OfflineData(store, recipe)
    head = store.make_head(recipe.head)
    learner = OfflineLearner(head, recipe.objective, recipe.anchor, recipe.train, 1.0, 10**6)
    measured = []
    for repeat in range(repeats + 1):
        count, started = 0, time.perf_counter()
        for step in range(repeat * _STORE_STEPS + 1, (repeat + 1) * _STORE_STEPS + 1):
            batch = data.batch(step, generator)
            learner.update(batch)
            count += len(batch)
        measured.append((time.perf_counter() - started) / count * 1e6)
    return measured[1:]  # the first warmed up
