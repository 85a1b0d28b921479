"""Probes that roll with the run: which items are held, how they are cut, and that a resumed run draws the same."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsensor.errors import ConfigError, ProbeError, ReferenceMismatchError
from diffsensor.probes import ProbeSet, RollingProbes
from tiny_tokenizers import Letters, bpe


def row(number: int, length: int = 4) -> list[int]:
    return [number] * length


def numbers(probes: RollingProbes) -> list[int]:
    """Which items are held, where item k is made of tokens k alone."""
    return [one.tokens[0] for one in probes.held()]


def drawn(probes: RollingProbes) -> ProbeSet:
    found = probes.draw()
    assert found is not None
    return found


def counted(probes: ProbeSet) -> list[list[int]]:
    """The counted tokens of each probe."""
    plan = probes.plan(packed=False)
    return [plan.target[plan.probe == probe].tolist() for probe in range(len(probes))]


def naive_law(size: int, half_life: float, offered: int) -> list[float]:
    """How likely each item is held, step by step: taken, and then not the one that each later taken one replaces."""
    share = size * (1 - 0.5 ** (1 / half_life))
    held: list[float] = []
    for item in range(offered):
        if item >= size:
            held = [chance * (1 - share / size) for chance in held]
        held.append(1.0 if item < size else share)
    return held


@pytest.mark.parametrize(("size", "half_life"), [(4, 12.0), (3, None), (5, 3.1063), (1, 2.0)])
def test_each_item_is_held_with_the_probability_that_is_promised(size: int, half_life: float | None) -> None:
    runs, offered = 1200, 24
    found: Counter[int] = Counter()
    for seed in range(runs):
        probes = RollingProbes(size=size, half_life=half_life, seed=seed)
        probes.offer([row(item) for item in range(offered)])
        assert len(probes.held()) == size
        found.update(numbers(probes))
    expected = naive_law(size, 8 * size if half_life is None else half_life, offered)
    assert sum(expected) == pytest.approx(size)
    for item, chance in enumerate(expected):
        error = (chance * (1 - chance) / runs) ** 0.5
        assert found[item] / runs == pytest.approx(chance, abs=4.5 * error + 1e-9)


def test_the_law_is_the_one_of_a_case_solved_by_hand() -> None:
    # Two places and a half-life of two items: p = 2 (1 - 1/sqrt(2)); after four items, the first two were each
    # threatened twice, and so are held with 2^(-2/2) = 1/2.
    runs = 2000
    found: Counter[int] = Counter()
    for seed in range(runs):
        probes = RollingProbes(size=2, half_life=2, seed=seed)
        probes.offer([row(item) for item in range(4)])
        found.update(numbers(probes))
    for item, chance in enumerate([0.5, 0.5, 2**0.5 - 1, 2 - 2**0.5]):
        assert found[item] / runs == pytest.approx(chance, abs=0.05)


def test_with_the_shortest_half_life_every_item_is_taken() -> None:
    probes = RollingProbes(size=2, half_life=1)
    for item in range(20):
        probes.offer([row(item)])
        assert item in numbers(probes)


def test_how_items_are_cut_into_offers_changes_nothing() -> None:
    at_once, one_by_one = (RollingProbes(size=4, seed=3) for _ in range(2))
    at_once.offer([row(item) for item in range(60)])
    for item in range(60):
        one_by_one.offer([row(item)])
        one_by_one.draw()
    assert at_once.held() == one_by_one.held()
    assert numbers(at_once) != numbers(_filled(seed=4))


def _filled(seed: int, items: int = 60) -> RollingProbes:
    probes = RollingProbes(size=4, seed=seed)
    probes.offer([row(item) for item in range(items)])
    return probes


def test_an_item_that_is_not_taken_is_not_looked_at() -> None:
    class Watched(Sequence[list[int]]):
        looked_at = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, place: Any) -> Any:
            self.looked_at += 1
            return row(place)

    rows, probes = Watched(), RollingProbes(size=4, half_life=200)
    probes.offer(rows)
    # 4 at first, then each with probability 0.014
    assert 4 <= rows.looked_at < 40
    assert len(probes.held()) == 4


def test_an_offer_reads_nothing_of_the_device() -> None:
    # A tensor without numbers stands for one whose numbers are still being computed.
    nowhere = torch.zeros(3, 5, dtype=torch.int64, device="meta")
    probes = RollingProbes(size=2)
    probes.offer({"input_ids": nowhere, "attention_mask": nowhere, "labels": nowhere}, counted=nowhere)
    assert probes.num_offered == 3


def test_what_is_held_is_a_copy() -> None:
    batch = torch.full((1, 4), 7)
    probes = RollingProbes()
    probes.offer(batch)
    batch.zero_()
    assert numbers(probes) == [7]


def test_ages_and_names_tell_when_an_item_was_offered() -> None:
    probes = _filled(seed=0)
    for one in probes.held():
        assert one.tokens[0] == 59 - one.age == int(one.name) - 1
    assert drawn(probes).names == tuple(one.name for one in probes.held())


def test_padding_is_left_out_on_either_side() -> None:
    probes = RollingProbes()
    ids = torch.tensor([[0, 0, 5, 6, 7, 0], [8, 9, 0, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    probes.offer({"input_ids": ids, "attention_mask": mask})
    found = drawn(probes)
    assert [found.tokens_of(probe).tolist() for probe in range(2)] == [[5, 6, 7], [8, 9]]
    assert counted(found) == [[6, 7], [9]]


def test_only_tokens_with_a_label_count() -> None:
    probes = RollingProbes()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    probes.offer({"input_ids": ids, "labels": torch.tensor([[-100, -100, 3, 4, -100]])})
    assert counted(drawn(probes)) == [[3, 4]]
    assert drawn(probes).tokens_of(0).tolist() == [1, 2, 3, 4]  # what follows them changes nothing


def test_only_the_tokens_of_a_completion_count_where_it_is_said_which_these_are() -> None:
    probes = RollingProbes()
    ids = torch.tensor([[0, 1, 2, 3, 4, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]])
    probes.offer({"input_ids": ids, "attention_mask": mask}, counted=torch.tensor([[0, 0, 0, 1, 1, 0]]))
    assert counted(drawn(probes)) == [[3, 4]]
    lists = RollingProbes()
    lists.offer([[1, 2, 3, 4]], counted=[[False, False, True, True]])
    assert lists.held() == probes.held()


def test_of_a_row_that_holds_several_sequences_one_is_drawn_each_as_likely() -> None:
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(600):
        probes = RollingProbes(seed=seed)
        batch = {
            "input_ids": torch.tensor([[1, 1, 2, 2, 2, 3, 3]]),
            "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 1]]),
        }
        probes.offer(batch)
        found[probes.held()[0].tokens] += 1
    assert set(found) == {(1, 1), (2, 2, 2), (3, 3)}
    assert min(found.values()) > 150


def test_which_part_of_an_item_is_kept_has_nothing_to_do_with_whether_it_is_taken() -> None:
    batch = {"input_ids": torch.tensor([[1, 1, 2, 2, 3, 3]]), "position_ids": torch.tensor([[0, 1, 0, 1, 0, 1]])}
    found: Counter[int] = Counter()
    for seed in range(60):
        probes = RollingProbes(size=1, half_life=8, seed=seed)
        for _ in range(40):
            probes.offer(batch)
        found[probes.held()[0].tokens[0]] += probes.held()[0].age < 39
    assert min(found[token] for token in (1, 2, 3)) > 8


def test_of_a_long_item_without_a_prompt_a_part_drawn_at_random_is_kept() -> None:
    starts: Counter[int] = Counter()
    for seed in range(900):
        probes = RollingProbes(max_tokens=4, seed=seed)
        probes.offer([[10, 11, 12, 13, 14, 15]])
        held = probes.held()[0]
        assert held.tokens == tuple(range(held.tokens[0], held.tokens[0] + 4))
        assert held.counted == (False, True, True, True)
        starts[held.tokens[0]] += 1
    assert set(starts) == {10, 11, 12}
    assert min(starts.values()) > 240


def test_a_long_item_with_a_prompt_loses_its_beginning_then_the_end_of_the_text() -> None:
    prompt_and_text = [list(range(10, 20))]
    marks = [[False] * 6 + [True] * 4]
    probes = RollingProbes(max_tokens=6)
    probes.offer(prompt_and_text, counted=marks)
    assert drawn(probes).tokens_of(0).tolist() == [14, 15, 16, 17, 18, 19]
    short = RollingProbes(max_tokens=3)
    short.offer(prompt_and_text, counted=marks)
    assert drawn(short).tokens_of(0).tolist() == [15, 16, 17]
    assert counted(drawn(short)) == [[16, 17]]


def test_the_bos_stays_where_the_tokenizer_is_known() -> None:
    tokenizer = bpe()
    probes = RollingProbes(tokenizer, max_tokens=5)
    probes.offer([[tokenizer.bos_token_id, 10, 11, 12, 13, 14]], counted=[[False] * 4 + [True] * 2])
    assert drawn(probes).tokens_of(0).tolist() == [tokenizer.bos_token_id, 11, 12, 13, 14]


def test_texts_are_tokenised_as_those_of_a_probe_set() -> None:
    tokenizer = bpe()
    probes = RollingProbes(tokenizer)
    probes.offer_texts(["a table and stables", "snow in the garden"])
    expected = ProbeSet.from_texts(["a table and stables", "snow in the garden"], tokenizer)
    found = drawn(probes)
    assert [found.tokens_of(probe).tolist() for probe in range(2)] == [
        expected.tokens_of(probe).tolist() for probe in range(2)
    ]
    assert counted(found) == counted(expected)
    assert found.tokenizer_fingerprint == expected.tokenizer_fingerprint
    assert found.decode(found.tokens_of(0).tolist()[1:]) == "a table and stables"


def test_of_a_text_with_a_prompt_the_text_alone_counts() -> None:
    probes = RollingProbes(Letters())
    probes.offer_texts(["yes"], prompts=["is it? "])
    found = drawn(probes)
    assert found.decode(counted(found)[0]) == "yes"
    assert found.decode(found.tokens_of(0).tolist()[1:]) == "is it? yes"


def test_an_item_of_which_nothing_counts_is_taken_and_never_drawn() -> None:
    probes = RollingProbes(Letters(), size=4)
    probes.offer([[1], [2, 3]], counted=[[True], [False, False]])
    probes.offer_texts([""])
    assert probes.draw() is None
    probes.offer([[5, 6]])
    assert numbers(probes) == [5]
    probes.load_state_dict(json.loads(json.dumps(probes.state_dict())))
    assert numbers(probes) == [5]


def test_nothing_is_drawn_before_anything_was_offered() -> None:
    assert RollingProbes().draw() is None


def test_what_was_forgotten_is_as_if_it_had_never_been_offered() -> None:
    probes = _filled(seed=2)
    probes.forget()
    assert probes.draw() is None
    probes.offer([row(item) for item in range(60)])
    assert probes.held() == _filled(seed=2).held()


def test_each_group_has_a_sample_of_its_own() -> None:
    probes = RollingProbes(size=3, groups=["code", "prose"])
    for item in range(200):
        probes.offer([row(item)], groups=["code" if item < 20 else "prose"])
    found = drawn(probes)
    assert found.groups == ("code",) * 3 + ("prose",) * 3
    assert [one.group for one in probes.held() if one.tokens[0] < 20] == ["code"] * 3
    alone = RollingProbes(size=3, groups=["code"])
    alone.offer([row(item) for item in range(20)], groups=["code"] * 20)
    assert alone.held() == probes.held()[:3]  # what is offered to another group changes nothing


def test_the_samples_of_two_groups_are_drawn_apart() -> None:
    probes = RollingProbes(size=3, groups=["a", "b"])
    for item in range(100):
        probes.offer([row(item)] * 2, groups=["a", "b"])
    items = numbers(probes)
    assert items[:3] != items[3:]


def test_a_run_that_goes_on_draws_as_the_uninterrupted_one_would_have() -> None:
    def offered(probes: RollingProbes, items: range) -> RollingProbes:
        for item in items:
            batch = {"input_ids": torch.tensor([row(item, 9)]), "position_ids": torch.tensor([[*range(5), *range(4)]])}
            probes.offer(batch, groups=["b" if item % 3 else "a"])
        return probes

    def begun() -> RollingProbes:
        return RollingProbes(size=3, max_tokens=3, groups=["a", "b"], seed=5)

    whole = offered(begun(), range(80))
    half = json.loads(json.dumps(offered(begun(), range(33)).state_dict()))
    resumed = begun()
    resumed.load_state_dict(half)
    assert resumed.state_dict() == half
    assert resumed.held() == offered(begun(), range(33)).held()
    assert offered(resumed, range(33, 80)).held() == whole.held()
    assert resumed.state_dict() == whole.state_dict()


def test_a_run_that_goes_on_with_other_arguments_is_refused() -> None:
    state = _filled(seed=1).state_dict()
    for other in (RollingProbes(size=4, seed=2), RollingProbes(size=5, seed=1), RollingProbes(bpe(), size=4, seed=1)):
        with pytest.raises(ReferenceMismatchError, match="other arguments"):
            other.load_state_dict(state)


def test_the_fingerprint_is_of_the_arguments_and_not_of_the_texts_nor_the_seed() -> None:
    assert _filled(seed=1).fingerprint == RollingProbes(size=4, seed=9).fingerprint
    different = [RollingProbes(), RollingProbes(size=4, half_life=9), RollingProbes(size=4, max_tokens=9)]
    different += [RollingProbes(size=4, groups=["a"]), RollingProbes(bpe(), size=4), RollingProbes(size=4)]
    assert len({probes.fingerprint for probes in different}) == len(different)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": 0}, "size=0 was given, expected a whole number of at least 1"),
        ({"max_tokens": 1}, "max_tokens=1 was given, expected a whole number of at least 2"),
        ({"seed": -1}, "seed=-1 was given"),
        ({"size": 32, "half_life": 10.0}, "half_life=10.0 was given for size=32.*is 21.8 items"),
        ({"half_life": float("inf")}, "half_life=inf"),
        ({"groups": ["a", "a"]}, "expected different names"),
        ({"groups": ["worst"]}, "a meaning of its own"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RollingProbes(**arguments)


@pytest.mark.parametrize(
    ("rows", "arguments", "sentence"),
    [
        (torch.zeros(2, 3), {}, "float32 of shape .2, 3., expected integers"),
        (torch.zeros(3, dtype=torch.int64), {}, "expected integers .row, pos."),
        ({"pixels": 1}, {}, "has 'pixels', and no 'input_ids'"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.zeros(2, 4)}, {}, "labels has the shape"),
        ([[1, 2]], {"counted": [[True]]}, "counted has the shape"),
        ([[1, 2]], {"groups": ["a"]}, "1 groups were given for 1 rows, expected none"),
    ],
)
def test_offers_that_mean_nothing_are_refused(rows: Any, arguments: dict[str, Any], sentence: str) -> None:
    probes = RollingProbes()
    with pytest.raises(ProbeError, match=sentence):
        probes.offer(rows, **arguments)
    assert probes.num_offered == 0


def test_a_group_that_was_not_named_is_refused_with_the_closest_one() -> None:
    probes = RollingProbes(groups=["letters", "poems"])
    with pytest.raises(ProbeError, match="Did you mean 'letters'"):
        probes.offer([[1, 2]], groups=["leters"])
    with pytest.raises(ProbeError, match="expected one for each"):
        probes.offer([[1, 2]])
    assert probes.num_offered == 0


def test_texts_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        RollingProbes().offer_texts(["a text"])
    with pytest.raises(ProbeError, match="2 prompts were given for 1 texts"):
        RollingProbes(Letters()).offer_texts(["a text"], prompts=["one", "two"])


@pytest.mark.usefixtures("unchecked")
def test_a_single_text_is_refused() -> None:
    with pytest.raises(ProbeError, match="A single string was offered"):
        RollingProbes(Letters()).offer_texts("a text")


def test_what_is_drawn_can_be_read_like_any_probe_set() -> None:
    probes = RollingProbes(size=8)
    rows: Tensor = torch.arange(8 * 6).reshape(8, 6)
    probes.offer(rows)
    plan = drawn(probes).plan(packed=True)
    assert plan.num_positions == 8 * 5
    assert "32" in repr(RollingProbes())
