"""Fixed inputs: what is counted, what is refused, what is kept, and that the tokenizer does not notice."""

import contextlib
import copy
import itertools
import json
import logging
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import diffsensor
from diffsensor import protocols
from diffsensor.errors import ConfigError, CorruptFileError, DiffSensorError, ProbeError, StorageError
from diffsensor.probes import ProbeSet
from diffsensor.storage.checked_json import json_bytes, read_json
from diffsensor.types import Plan
from tiny_tokenizers import CORPUS, Letters, bpe, space_marking, words


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe()


def state_of(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    return repr(sorted(vars(tokenizer).items())), tokenizer.backend_tokenizer.to_str()


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def counted_text(probes: ProbeSet, probe: int) -> str:
    plan = probes.plan(packed=False)
    return probes.decode([int(token) for token in plan.target[plan.probe == probe]])


def positions_by_hand(ids: Sequence[Sequence[int]], marks: Sequence[Sequence[bool]]) -> set[tuple[int, int, int]]:
    """(probe, offset, target) of each counted position."""
    return {
        (probe, place - 1, ids[probe][place])
        for probe in range(len(ids))
        for place in range(1, len(ids[probe]))
        if marks[probe][place]
    }


def check_plan(plan: Plan, ids: Sequence[Sequence[int]], marks: Sequence[Sequence[bool]], batch_tokens: int) -> None:
    """Read a plan as the model does, row by row, and hold it against what was asked for."""
    found = list(zip(plan.probe.tolist(), plan.offset.tolist(), plan.target.tolist(), strict=True))
    assert len(found) == len(set(found)) == plan.num_positions
    assert set(found) == positions_by_hand(ids, marks)
    at = 0
    whole: list[list[int]] = []
    for batch in plan.batches:
        assert batch.start == at
        input_ids = batch.inputs["input_ids"]
        height, width = input_ids.shape
        assert height == 1 or input_ids.numel() <= batch_tokens
        flat = input_ids.reshape(-1).tolist()
        index = batch.index.tolist()
        assert index == sorted(set(index))
        positions = batch.inputs.get("position_ids", torch.arange(width).expand(height, width)).reshape(-1).tolist()
        for place, (probe, offset, target) in zip(index, found[at : at + len(index)], strict=True):
            assert positions[place] == offset
            first = place - offset
            assert first // width == place // width
            assert flat[first : first + len(ids[probe])] == list(ids[probe])
            assert flat[place + 1] == target
        at += len(index)
        # The sequences that a model sees: each begins where the position is 0, padding being the last of its row.
        for row, row_positions in zip(
            input_ids.tolist(), torch.tensor(positions).view(height, width).tolist(), strict=True
        ):
            for token, position in zip(row, row_positions, strict=True):
                if position == 0:
                    whole.append([])
                assert position == len(whole[-1])
                whole[-1].append(token)
    assert at == plan.num_positions
    left = sorted(whole)
    for probe in sorted(map(list, ids)):
        match = next(one for one in left if one == probe or (not plan.packed and one[: len(probe)] == probe))
        left.remove(match)
    assert all(not any(padding) for padding in left)
    assert len(left) <= sum(len(batch.inputs["input_ids"]) for batch in plan.batches)


@st.composite
def token_probes(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]]]:
    lengths = draw(st.lists(st.integers(2, 40), min_size=1, max_size=20))
    ids = [draw(st.lists(st.integers(1, 99), min_size=length, max_size=length)) for length in lengths]
    marks = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for length in lengths]
    for row in marks:
        row[-1] = True
    return ids, marks


def from_lists(ids: list[list[int]], marks: list[list[bool]], **kwargs: Any) -> ProbeSet:
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([row + [False] * (width - len(row)) for row in marks])
    return ProbeSet.from_tensors({"input_ids": padded, "attention_mask": real}, mask, **kwargs)


# What is counted


@given(token_probes(), st.booleans(), st.integers(1, 60), st.integers(1, 200))
def test_every_counted_token_is_a_target_exactly_once(
    probes: tuple[list[list[int]], list[list[bool]]], packed: bool, row_tokens: int, batch_tokens: int
) -> None:
    ids, marks = probes
    plan = from_lists(ids, marks).plan(packed, row_tokens=row_tokens, batch_tokens=batch_tokens)
    check_plan(plan, ids, marks, batch_tokens)


def test_a_text_of_seven_tokens_has_six_counted_positions() -> None:
    probes = ProbeSet.from_texts(["abcdef"], Letters())
    assert probes.tokens_of(0).tolist() == [1, *map(ord, "abcdef")]
    assert probes.num_positions == probes.plan(packed=True).num_positions == 6
    assert counted_text(probes, 0) == "abcdef"


def test_a_marked_first_token_has_no_predecessor_and_gives_no_position() -> None:
    mask = torch.tensor([[True, False, True, False]])
    plan = ProbeSet.from_tensors(torch.tensor([[5, 6, 7, 8]]), mask).plan(packed=False)
    assert (plan.offset.tolist(), plan.target.tolist()) == ([1], [7])


def test_packed_rows_are_full() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 129, (24,), generator=generator).tolist()
    ids = [[1] * length for length in lengths]
    for packed, most in ((True, 1.10), (False, 1.20)):
        plan = from_lists(ids, [[True] * length for length in lengths]).plan(packed)
        padded = sum(batch.inputs["input_ids"].numel() for batch in plan.batches)
        assert sum(lengths) <= padded <= most * sum(lengths)


def test_rows_are_stacked_where_padding_costs_less_than_another_pass() -> None:
    def widths(*lengths: int) -> list[list[int]]:
        probes = from_lists([[1] * length for length in lengths], [[True] * length for length in lengths])
        plan = probes.plan(False, batch_tokens=1024)
        return [list(batch.inputs["input_ids"].shape) for batch in plan.batches]

    assert widths(10, 200, 198) == [[2, 200], [1, 10]]
    assert widths(10, 40) == [[2, 40]]


def test_a_model_answers_packed_probes_as_it_answers_each_alone() -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids = [[(7 * probe + place) % 99 + 1 for place in range(4 + 5 * probe)] for probe in range(6)]
    probes = from_lists(ids, [[True] * len(row) for row in ids])
    alone = [model(torch.tensor([row])).logits[0] for row in ids]
    for packed in (True, False):
        plan = probes.plan(packed, row_tokens=40, batch_tokens=80)
        assert len(plan.batches) > 1
        for batch in plan.batches:
            with torch.no_grad():
                got = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.index]
            where = zip(plan.probe[batch.positions].tolist(), plan.offset[batch.positions].tolist(), strict=True)
            expected = torch.stack([alone[probe][offset] for probe, offset in where])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_without_causal_attention_padding_is_masked_and_packing_is_refused() -> None:
    probes = from_lists([[1, 2, 3], [4, 5]], [[True] * 3, [True] * 2])
    (batch,) = probes.plan(packed=False, causal=False).batches
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(DiffSensorError, match="packed=False"):
        probes.plan(packed=True, causal=False)


@pytest.mark.parametrize("sizes", [{"row_tokens": 0}, {"batch_tokens": -1}])
def test_a_plan_of_no_tokens_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(DiffSensorError, match="at least 1"):
        from_lists([[1, 2]], [[True, True]]).plan(packed=True, **sizes)


def test_a_thinned_set_counts_the_first_and_every_fourth_position_after_it() -> None:
    probes = from_lists([list(range(1, 12)), [1, 2]], [[False] * 2 + [True] * 9, [True] * 2])
    plan = probes.thin(4).plan(packed=False)
    assert [plan.target[plan.probe == probe].tolist() for probe in (0, 1)] == [[3, 7, 11], [2]]
    assert probes.thin(4).fingerprint != probes.fingerprint == probes.thin(1).fingerprint
    with pytest.raises(DiffSensorError, match="every=0"):
        probes.thin(0)


# Texts


def test_a_text_is_decoded_back_with_its_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    probes = ProbeSet.from_texts(["Naïve café ☃"], tokenizer)
    assert probes.decode(probes.tokens_of(0).tolist()) == "<bos>Naïve café ☃"


def test_without_a_tokenizer_tokens_are_shown_by_number() -> None:
    assert ProbeSet.from_tensors(torch.tensor([[1, 2]])).decode([17, 4]) == "⟨17⟩⟨4⟩"


def test_a_long_text_is_cut_at_its_end_and_reported(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diffsensor")
    probes = ProbeSet.from_texts([CORPUS[0], "the moon"], tokenizer, max_length=6)
    assert probes.tokens_of(0).tolist() == tokenizer(CORPUS[0])["input_ids"][:6]
    assert probes.num_truncated == 1
    assert "1 of 2 probes were cut to 6 tokens" in caplog.text
    assert "1 truncated" in repr(probes)


@pytest.mark.parametrize("model_max_length", [3, 1000])
def test_the_tokenizer_does_not_notice(model_max_length: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = bpe(model_max_length=model_max_length, padding_side="left", truncation_side="left")
    tokenizer.pad_token = "<eos>"
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9, direction="left")
    before = state_of(tokenizer)
    path = lines(tmp_path / "probes.jsonl", {"prompt": "unbeliev", "completion": "able tables"})
    probes = ProbeSet.from_texts(CORPUS[:2], tokenizer)
    assert len(probes.tokens_of(0)) > 9
    ProbeSet.from_jsonl(path, tokenizer).check_tokenizer(tokenizer)
    probes.decode([3])
    assert state_of(tokenizer) == before
    assert not caplog.records


def test_the_global_random_state_is_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    ProbeSet.from_texts(CORPUS[:2], tokenizer).plan(packed=True)
    assert torch.equal(before, torch.get_rng_state())


def test_a_probe_set_is_what_sensors_ask_for(tokenizer: PreTrainedTokenizerFast) -> None:
    probes = ProbeSet.from_texts(CORPUS[:3], tokenizer, ["b", None, "a"], names=["x", "y", "z"], weights=[1, 2, 0.5])
    assert isinstance(probes, protocols.Probes)
    assert (probes.names, probes.groups, probes.group_names) == (("x", "y", "z"), ("b", "", "a"), ("b", "a"))
    assert probes.weights.tolist() == [1, 2, 0.5]
    assert len(probes) == 3
    assert re.fullmatch(
        r"ProbeSet\(3 probes, \d+ tokens, \d+ counted positions, groups b, a, fingerprint [0-9a-f]{12}\)", repr(probes)
    )


def test_what_is_handed_out_cannot_change_the_probes(tokenizer: PreTrainedTokenizerFast) -> None:
    given_ids = torch.tensor([[1, 2, 3]])
    probes = ProbeSet.from_tensors(given_ids)
    before = probes.fingerprint
    given_ids.zero_()
    probes.weights.zero_()
    probes.tokens_of(0).zero_()
    probes.plan(packed=True).batches[0].inputs["input_ids"].zero_()
    assert probes.fingerprint == before
    dense = torch.rand(3, 2)
    probes = ProbeSet.from_tensors(dense)
    before = probes.fingerprint
    dense.zero_()
    assert probes.fingerprint == before


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"texts": []}, "empty"),
        ({"texts": "abc"}, r"\[text\]"),
        ({"texts": ["abc", ""]}, "'1': text is ''"),
        ({"texts": ["ab\ud800"]}, "surrogate"),
        ({"texts": ["ab"], "groups": ["x", "y"]}, "2 groups were given for 1 probes"),
        ({"texts": ["ab"], "groups": "x"}, "groups is one string"),
        ({"texts": ["ab"], "groups": ["worst"]}, "'worst'"),
        ({"texts": ["ab"], "groups": ["*"]}, r"'\*'"),
        ({"texts": ["ab"], "names": []}, "0 names were given for 1 probes"),
        ({"texts": ["ab", "cd"], "names": ["x", "x"]}, "both named 'x'"),
        ({"texts": ["ab"], "weights": [1.0, 2.0]}, "2 weights were given for 1 probes"),
        ({"texts": ["ab"], "weights": [-1.0]}, "weight -1.0"),
        ({"texts": ["ab"], "weights": [float("nan")]}, "weight nan"),
        ({"texts": ["ab"], "weights": [float("inf")]}, "weight inf"),
        ({"texts": ["ab"], "weights": [0.0]}, "All weights are 0"),
        ({"texts": ["ab"], "max_length": 1}, "max_length=1"),
    ],
)
def test_texts_that_cannot_be_probes_are_refused(kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(DiffSensorError, match=told):
        ProbeSet.from_texts(tokenizer=Letters(), **kwargs)


def test_a_text_of_one_token_is_refused_by_name() -> None:
    with pytest.raises(ProbeError, match="'short': no counted position: of its 1 tokens"):
        ProbeSet.from_texts(["the garden", "t"], bpe(bos=False), names=["long", "short"])


def test_a_text_that_is_no_string_is_quoted(unchecked: None) -> None:
    with pytest.raises(ProbeError, match="text is 7; expected a string"):
        ProbeSet.from_texts(["ab", 7], Letters())  # type: ignore[list-item]


# Lines of JSON


def test_only_the_completion_is_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = lines(
        tmp_path / "probes.jsonl",
        {"text": "the moon", "weight": 2},
        {"prompt": "Question: how far?", "completion": " very far indeed", "id": "q", "group": "far"},
        {"prompt": "", "completion": "the garden", "id": 7, "group": None},
    )
    probes = ProbeSet.from_jsonl(path, tokenizer)
    assert [counted_text(probes, probe) for probe in range(3)] == ["the moon", " very far indeed", "the garden"]
    assert probes.tokens_of(1).tolist() == tokenizer("Question: how far? very far indeed")["input_ids"]
    assert (probes.names, probes.groups, probes.weights.tolist()) == (("0", "q", "7"), ("", "far", ""), [2, 1, 1])


@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_come_once(tmp_path: Path, eos: bool) -> None:
    path = lines(tmp_path / "probes.jsonl", {"prompt": "the moon", "completion": " is far"})
    probes = ProbeSet.from_jsonl(path, bpe(eos=eos))
    ids = probes.tokens_of(0).tolist()
    assert (ids[0], ids.count(0), ids.count(1)) == (0, 1, int(eos))
    assert counted_text(probes, 0) == " is far" + "<eos>" * eos


def test_no_space_comes_before_a_completion_that_has_none(tmp_path: Path) -> None:
    tokenizer = space_marking()
    path = lines(tmp_path / "probes.jsonl", {"prompt": "the moon:\n", "completion": "far indeed"})
    probes = ProbeSet.from_jsonl(path, tokenizer)
    assert probes.tokens_of(0).tolist() == tokenizer("the moon:\nfar indeed")["input_ids"]
    assert "".join(tokenizer.convert_ids_to_tokens(probes.plan(packed=False).target.tolist())) == "far▁indeed"


@pytest.mark.parametrize(
    ("prompt", "completion", "counted"),
    [
        ("Answer: ", "very far", " very far"),  # the space belongs to the next word
        ("the unbeliev", "able answer", None),
        ("the ta", "bles", None),
    ],
)
def test_the_token_that_crosses_the_border_is_the_first_one_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, counted: str | None
) -> None:
    path = lines(tmp_path / "probes.jsonl", {"prompt": prompt, "completion": completion})
    got = counted_text(ProbeSet.from_jsonl(path, tokenizer), 0)
    assert counted is None or got == counted
    # By hand: the whole text's tokens, dropped from the left while the completion is still whole.
    rest = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    while len(tokenizer.decode(rest[1:])) >= len(completion):
        rest = rest[1:]
    assert got == tokenizer.decode(rest)


def test_a_prompt_token_that_only_the_whole_text_has_is_not_counted(tmp_path: Path) -> None:
    """Alone the prompt is [ab]; before its completion it is [a][bc], of which only the second crosses the border."""
    vocab = {token: number for number, token in enumerate(["<bos>", "a", "b", "c", "bc", "ab"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c"), ("a", "b")]))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    path = lines(tmp_path / "probes.jsonl", {"prompt": "ab", "completion": "c"})
    probes = ProbeSet.from_jsonl(path, PreTrainedTokenizerFast(tokenizer_object=backend))
    assert probes.tokens_of(0).tolist() == [0, 1, 4]
    assert probes.plan(packed=False).target.tolist() == [4]


@pytest.mark.parametrize(
    ("max_length", "whole", "counted"),
    [(7, "\x01abcdef", "def"), (6, "\x01bcdef", "def"), (4, "\x01def", "def"), (3, "\x01de", "de"), (2, "\x01d", "d")],
)
def test_a_long_record_loses_its_prompts_beginning_before_its_completions_end(
    tmp_path: Path, max_length: int, whole: str, counted: str
) -> None:
    path = lines(tmp_path / "probes.jsonl", {"prompt": "abc", "completion": "def"})
    probes = ProbeSet.from_jsonl(path, Letters(), max_length=max_length)
    assert probes.decode(probes.tokens_of(0).tolist()) == whole
    assert counted_text(probes, 0) == counted
    assert probes.num_truncated == (max_length < 7)


def test_without_bos_one_token_of_the_prompt_stays_before_a_long_completion(tmp_path: Path) -> None:
    tokenizer = bpe(bos=False)
    path = lines(tmp_path / "probes.jsonl", {"prompt": "the moon", "completion": " is very far indeed"})
    probes = ProbeSet.from_jsonl(path, tokenizer, max_length=3)
    prompt = tokenizer("the moon")["input_ids"]
    assert probes.tokens_of(0).tolist() == prompt[-1:] + tokenizer(" is very far indeed")["input_ids"][:2]
    assert probes.num_positions == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"text": "ab"', "is not JSON"),
        ("\xff", "is not JSON"),
        ('["ab"]', r"\['ab'\] is not an object"),
        ('{"prompt": "ab"}', "has 'prompt' of the keys"),
        ('{"completion": "ab"}', "has 'completion' of the keys"),
        ('{"id": 3}', "has none of the keys"),
        ('{"text": "ab", "completion": "c"}', "has 'text', 'completion' of the keys"),
        ('{"text": "ab", "gruop": "x"}', "No key is named 'gruop'. Did you mean 'group'"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no message is the assistant's"),
        ('{"text": "ab", "messages": []}', "has 'text', 'messages' of the keys"),
        ('{"text": ""}', "text is '', an empty string"),
        ('{"prompt": "a", "completion": ""}', "completion is '', an empty string"),
        ('{"text": 5}', "text is 5; expected a string"),
        ('{"text": null}', "text is None; expected a string"),
        ('{"text": "a\\ud800"}', "surrogate"),
        ('{"text": "ab", "id": "first"}', "the id 'first' is taken by line 1"),
        ('{"text": "ab", "id": ["x"]}', r"id is \['x'\]"),
        ('{"text": "ab", "id": true}', "id is True"),
        ('{"text": "ab", "id": ""}', "id is ''"),
        ('{"text": "ab", "group": 4}', "group is 4"),
        ('{"text": "ab", "group": "worst"}', "'worst'"),
        ('{"text": "ab", "weight": -0.5}', "weight is -0.5"),
        ('{"text": "ab", "weight": NaN}', "weight is nan"),
        ('{"text": "ab", "weight": Infinity}', "weight is inf"),
        ('{"text": "ab", "weight": "1"}', "weight is '1'"),
        ('{"text": "ab", "weight": true}', "weight is True"),
    ],
)
def test_a_bad_line_is_named_and_quoted(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_bytes(b'\n{"text": "ab", "id": "first"}\n\n' + line.encode("latin-1") + b"\n")
    # The first record is on line 2, so that an id that repeats it is told apart from a count of records.
    told = told.replace("line 1", "line 2")
    with pytest.raises(ProbeError, match=f"{re.escape(str(path))}, line 4: .*{told}"):
        ProbeSet.from_jsonl(path, Letters())


def test_a_completion_that_leaves_no_counted_position_is_refused_by_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "probes.jsonl", {"text": "the moon"}, {"prompt": "", "completion": "t"})
    with pytest.raises(ProbeError, match="line 2: no counted position"):
        ProbeSet.from_jsonl(path, bpe(bos=False))


@pytest.mark.parametrize("contents", [None, b"", b"\n \n"])
def test_a_file_without_records_is_refused(tmp_path: Path, contents: bytes | None) -> None:
    path = tmp_path / "probes.jsonl"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ProbeError, match=re.escape(str(path))):
        ProbeSet.from_jsonl(path, Letters())


# Rows of a dataset


ROWS = [
    {"text": "the moon"},
    {"prompt": "the garden", "completion": " is very far", "group": "far", "weight": 2.0},
    {"text": "snow in the garden", "id": "snow"},
]


def test_a_dataset_gives_the_probes_of_the_same_records_in_a_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = ProbeSet.from_jsonl(lines(tmp_path / "probes.jsonl", *ROWS), tokenizer)
    # A table has a value in each column of each row: None where a record has nothing.
    columns = ("text", "prompt", "completion", "id", "group", "weight")
    table = datasets.Dataset.from_dict({name: [row.get(name) for row in ROWS] for name in columns})
    for rows in (ROWS, tuple(ROWS), iter(ROWS), table, table.to_iterable_dataset()):
        probes = ProbeSet.from_dataset(rows, tokenizer)
        assert probes.fingerprint == expected.fingerprint
    assert expected.names == ("0", "1", "snow")


def test_a_limit_draws_rows_with_the_seed_and_keeps_their_order_and_numbers() -> None:
    rows = [{"text": f"row {number}"} for number in range(100)]
    table = datasets.Dataset.from_list(rows)
    probes = ProbeSet.from_dataset(table, Letters(), limit=10)
    numbers = [int(name) for name in probes.names]
    assert numbers == sorted(numbers)
    assert numbers != list(range(10))
    assert [probes.decode(probes.tokens_of(at).tolist()[1:]) for at in range(10)] == [
        f"row {number}" for number in numbers
    ]
    assert ProbeSet.from_dataset(rows, Letters(), limit=10).fingerprint == probes.fingerprint
    assert ProbeSet.from_dataset(rows, Letters(), limit=10, seed=1).names != probes.names
    assert len(ProbeSet.from_dataset(rows, Letters(), limit=1000)) == 100


def test_of_a_stream_without_end_the_first_rows_are_taken() -> None:
    stream = ({"text": f"row {number}"} for number in itertools.count())
    assert ProbeSet.from_dataset(stream, Letters(), limit=3).names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ([], "holds no record"),
        ([{"text": "ab"}, {"text": ""}], "row 1: text is ''"),
        ([{"text": "ab"}, "cd"], "row 1: 'cd' is not a record"),
        ([{"text": "ab", "id": "x"}, {"text": "cd", "id": "x"}], "row 1: the id 'x' is taken by row 0"),
        ([{"text": "ab", "source": "web"}], r"row 0: No key is named 'source'.*select_columns"),
        ([{"question": "ab", "answer": "c"}], r"row 0: No key is named 'question'.*rename_column"),
        ([{"text": None}], "row 0: the record has none of the keys"),
        ({"train": [], "test": []}, r"a mapping of 'train', 'test'.*dataset\['train'\]"),
        ("probes.jsonl", "ProbeSet.from_jsonl"),
        (Path("probes.jsonl"), "ProbeSet.from_jsonl"),
    ],
)
def test_rows_that_cannot_be_probes_are_refused_by_number(unchecked: None, dataset: Any, told: str) -> None:
    with pytest.raises(ProbeError, match=told):
        ProbeSet.from_dataset(dataset, Letters())


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_of_no_rows_is_refused(limit: int) -> None:
    with pytest.raises(DiffSensorError, match=f"limit={limit}"):
        ProbeSet.from_dataset(ROWS, Letters(), limit=limit)


# A tokenizer by its directory or name


def test_each_constructor_loads_a_tokenizer_from_its_directory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    where = tmp_path / "tokenizer"
    tokenizer.save_pretrained(where)
    file = lines(tmp_path / "probes.jsonl", *ROWS)
    made: list[Callable[[Any], ProbeSet]] = [
        lambda given: ProbeSet.from_texts(CORPUS[:2], given),
        lambda given: ProbeSet.from_jsonl(file, given),
        lambda given: ProbeSet.from_dataset(ROWS, given),
        lambda given: ProbeSet.from_tensors(torch.tensor([[5, 6, 7]]), tokenizer=given),
        lambda given: ProbeSet.default(given),
    ]
    for make in made:
        expected = make(tokenizer)
        for place in (where, str(where)):
            probes = make(place)
            assert probes.fingerprint == expected.fingerprint
            assert probes.tokenizer_fingerprint
            assert probes.decode([5, 6, 7]) == tokenizer.decode([5, 6, 7])
    expected.save(tmp_path / "saved")
    assert ProbeSet.load(tmp_path / "saved", where).decode([5, 6]) == tokenizer.decode([5, 6])


def no_tokenizer(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "broken":
        (folder / "tokenizer.json").write_text("{nope")
    elif kind == "model alone":
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    elif kind == "other tokenizer.json":
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unheard"}}')
    return folder


@pytest.mark.parametrize("kind", ["empty", "broken", "model alone", "other tokenizer.json"])
def test_a_directory_without_a_tokenizer_is_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    folder = no_tokenizer(tmp_path / "model", kind)
    with pytest.raises(ProbeError, match=rf"okenizer .*{re.escape(repr(str(folder)))}.*tokenizer\.json, tok"):
        ProbeSet.from_texts(["ab"], folder)


@pytest.mark.parametrize("where", [Path("no-such-folder"), "no-such-name"])
def test_a_tokenizer_that_is_nowhere_is_refused_in_a_sentence(where: str | Path) -> None:
    with pytest.raises(ProbeError, match=r"'no-such-.*Expected a directory"):
        ProbeSet.from_texts(["ab"], where)


@pytest.mark.parametrize("tokenizer", [None, 7])
def test_what_is_no_tokenizer_is_refused(unchecked: None, tokenizer: Any) -> None:
    with pytest.raises(ProbeError, match=f"The tokenizer is {tokenizer}; expected one of Hugging Face"):
        ProbeSet.from_texts(["ab"], tokenizer)


def test_a_tokenizer_by_name_without_transformers_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "diffsensor.loading", raising=False)
    monkeypatch.delattr(diffsensor, "loading", raising=False)
    with pytest.raises(ConfigError, match=r"tokenizer was given by .*pip install 'diffsensor\[transformers\]'"):
        ProbeSet.default("some-model")


# The probes that come with us


DEFAULT = [
    json.loads(line)
    for line in (Path(diffsensor.__file__).parent / "probes" / "default.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_the_default_probes_are_128_in_8_groups_of_16(caplog: pytest.LogCaptureFixture) -> None:
    probes = ProbeSet.default(bpe(), max_length=1000)
    assert (len(probes), probes.num_truncated) == (128, 0)
    groups = ["knowledge", "arithmetic", "reasoning", "code", "instructions", "refusal", "opinions", "free_text"]
    assert Counter(probes.groups) == dict.fromkeys(groups, 16)
    assert probes.group_names == tuple(groups)
    assert not caplog.records


def test_the_default_probes_are_short_ones_and_two_long_ones_of_each_group() -> None:
    # A tokenizer for English makes about one token of 4 letters; 16 to 64 tokens for the short ones, 128 at most.
    for record in DEFAULT:
        length = len(record.get("text", "") + record.get("prompt", "") + record.get("completion", ""))
        is_long = int(record["id"].rsplit("-", 1)[1]) > 14
        assert 320 <= length <= 530 if is_long else 60 <= length <= 250, record["id"]
    assert len({json.dumps([record.get("text"), record.get("prompt")]) for record in DEFAULT}) == 128


def test_the_default_probes_ask_for_more_than_a_word() -> None:
    for record in DEFAULT:
        assert len(record.get("completion", record.get("text", ""))) >= 14, record["id"]
        # A completion goes on where its prompt ends: with a space, or on a new line.
        if "prompt" in record:
            assert (record["prompt"][-1] == "\n") != (record["completion"][0] == " ") or record["group"] == "code"


@pytest.mark.parametrize("record", [one for one in DEFAULT if one["group"] == "code"], ids=lambda one: str(one["id"]))
def test_code_of_the_default_probes_runs(record: dict[str, str], tmp_path: Path) -> None:
    source = record.get("text") or record["prompt"] + record["completion"]
    language = record["id"].split("-")[1]
    if language == "python":
        subprocess.run([sys.executable, "-c", source], check=True, capture_output=True)
    elif language == "sql":
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.execute("CREATE TABLE staff (city, salary)")
            database.executemany("INSERT INTO staff VALUES (?, ?)", [("Oslo", 1), ("Oslo", 3), ("Rome", 0)])
            assert database.execute(source).fetchall() in ([(2.0,)], [("Oslo", 2)])
    else:
        program = shutil.which({"bash": "bash", "javascript": "node"}[language])
        if program is None:
            pytest.skip(f"no {language} here")
        subprocess.run([program, "-"], input=source, text=True, check=True, capture_output=True, cwd=tmp_path)


def test_sums_of_the_default_probes_are_right() -> None:
    checked = 0
    for record in DEFAULT:
        text = record.get("text", "") + record.get("completion", "")
        # 6 x 7 = 42, 40 / 8 = 5, 1 + 2 + 3 = 6; not what belongs to a letter, a fraction or a longer sum.
        number = r"\d+(?:\.\d+)?"
        for left, right in re.findall(
            rf"(?<![-+\w/.])(?<![-+] )({number}(?: [-+x/] {number})+) = ({number})(?![\d/])", text
        ):
            assert eval(left.replace("x", "*")) == pytest.approx(float(right)), (record["id"], left)
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("max_length", [16, 64, 128])
def test_any_tokenizer_takes_the_default_probes(max_length: int) -> None:
    for tokenizer in (Letters(), bpe(bos=False), space_marking()):
        probes = ProbeSet.default(tokenizer, max_length)
        assert len(probes) == 128
        assert max(len(probes.tokens_of(probe)) for probe in range(128)) <= max_length


def test_tokens_that_a_tokenizer_does_not_know_are_noted_in_the_default_probes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ProbeSet.default(words("the", "a", "is", "User", "Assistant"))
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert re.search(r"\d+ of \d+ tokens are unknown", record.getMessage())


# Tensors


@pytest.mark.parametrize(
    ("inputs", "mask", "told"),
    [
        (torch.zeros(0, 4, dtype=torch.long), None, "empty"),
        (torch.ones(2, 1, dtype=torch.long), None, "'0' has no counted position"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 0, 0]]), "'1' has no counted position"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2), r"shape \[2\]; expected \[2, 3\]"),
        (torch.ones(2, 3, dtype=torch.long), torch.full((2, 3), 2), "other values than 0 and 1"),
        (torch.tensor([[1, -100]]), None, "token id -100"),
        ({"input_ids": torch.rand(2, 3)}, None, "expected integers"),
        ({"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 3)}, None, "'labels'"),
        ({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[0, 1, 1]])}, None, "on the left"),
        ({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[1, 0, 1]])}, None, "padded"),
        ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)}, None, r"shape \[1, 3\]"),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.tensor([[1, 1, 0]])},
            torch.ones(1, 3),
            "counts padding of probe '0'",
        ),
        ((), None, "empty"),
        ({}, None, "empty"),
        (torch.tensor(3.0), None, "first dimension"),
        ((torch.rand(3, 2), torch.rand(4, 2)), None, "different numbers of rows"),
        (torch.rand(3, 2), torch.ones(4), r"\[3\] or \[3, pos\]"),
        (torch.rand(3, 2), torch.tensor([[1, 1], [0, 0], [0, 1]]), "'1' has no counted position"),
        (torch.rand(3, 2), torch.zeros(3), "empty"),
    ],
)
def test_tensors_that_cannot_be_probes_are_refused(inputs: Any, mask: Tensor | None, told: str) -> None:
    with pytest.raises(ProbeError, match=told):
        ProbeSet.from_tensors(inputs, mask)


def test_images_are_one_position_each_in_batches_of_64_at_most() -> None:
    sizes = {7: [7], 20: [8, 8, 4], 160: [20] * 8, 600: [64] * 9 + [24]}
    for number, expected in sizes.items():
        plan = ProbeSet.from_tensors(torch.rand(number, 2)).plan(packed=True)
        assert [len(batch.index) for batch in plan.batches] == expected
    images = torch.rand(70, 3, 2)
    plan = ProbeSet.from_tensors(images).plan(packed=True)
    assert torch.equal(torch.cat([batch.args[0] for batch in plan.batches]), images)
    assert [batch.index.tolist() for batch in plan.batches] == [list(range(8))] * 8 + [list(range(6))]
    assert [batch.start for batch in plan.batches] == list(range(0, 70, 8))
    assert (plan.probe.tolist(), set(plan.target.tolist()), set(plan.offset.tolist())) == ([*range(70)], {-1}, {0})
    assert not plan.packed


def test_a_mask_of_positions_picks_them_out_of_the_flattened_output() -> None:
    mask = torch.rand(70, 5) > 0.5
    mask[:, 2] = True
    probes = ProbeSet.from_tensors({"series": torch.rand(70, 5), "table": torch.zeros(70, 2)}, mask)
    plan = probes.plan(packed=False)
    outputs = torch.arange(70 * 5).view(70, 5)
    rows = outputs.split(8)
    got = torch.cat([output.reshape(-1)[batch.index] for output, batch in zip(rows, plan.batches, strict=True)])
    assert torch.equal(got, outputs[mask])
    assert torch.equal(got, plan.probe * 5 + plan.offset)
    assert probes.num_positions == plan.num_positions == int(mask.sum())
    assert set(plan.batches[0].inputs) == {"series", "table"}
    assert len(probes.tokens_of(0)) == 0
    thinned = probes.thin(2).plan(packed=False)
    assert torch.equal(thinned.offset[thinned.probe == 3], plan.offset[plan.probe == 3][::2])


def test_a_mask_of_probes_leaves_the_others_out() -> None:
    images = torch.rand(4, 2)
    probes = ProbeSet.from_tensors((images,), torch.tensor([1, 0, 1, 1]), ["a", "b", "c", "d"], weights=[1, 2, 3, 4])
    (batch,) = probes.plan(packed=False).batches
    assert torch.equal(batch.args[0], images[[0, 2, 3]])
    assert (probes.names, probes.groups, probes.weights.tolist()) == (("0", "2", "3"), ("a", "c", "d"), [1, 3, 4])


# Fit with a model and a tokenizer


def test_probes_longer_than_the_context_are_refused_by_name() -> None:
    probes = ProbeSet.from_texts(["ab", "abcd", "abc"], Letters(), names=["x", "y", "z"])
    probes.check_length(5)
    with pytest.raises(ProbeError, match="'y' has 5 tokens, but the model reads 4"):
        probes.check_length(4)


def test_token_ids_that_the_model_does_not_have_are_refused() -> None:
    probes = ProbeSet.from_tensors(torch.tensor([[1, 2], [9, 3]]))
    probes.check_vocab(10)
    with pytest.raises(ProbeError, match="'1' has the token id 9, but the model has 9"):
        probes.check_vocab(9)


def test_another_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    probes = ProbeSet.from_texts(CORPUS[:1], tokenizer)
    probes.check_tokenizer(bpe())
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["<new>"])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"] = backend["model"]["merges"][::-1]
    reordered = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    for other in (added, reordered, bpe(vocab_size=350)):
        with pytest.raises(ProbeError, match="fingerprint"):
            probes.check_tokenizer(other)


def test_a_tokenizer_keeps_its_fingerprint_when_it_is_used_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = bpe(pad_token="<eos>")
    probes = ProbeSet.from_texts(CORPUS[:1], tokenizer)
    tokenizer(CORPUS[:2], padding=True, truncation=True, max_length=7)
    tokenizer.padding_side = "left"
    probes.check_tokenizer(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    probes.check_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert re.fullmatch("[0-9a-f]{64}", probes.tokenizer_fingerprint)
    assert ProbeSet.from_texts(["ab"], Letters()).tokenizer_fingerprint == ""


# The fingerprint


@given(token_probes(), st.data())
def test_any_change_changes_the_fingerprint(
    probes: tuple[list[list[int]], list[list[bool]]], data: st.DataObject
) -> None:
    ids, marks = probes
    number = len(ids)
    plain: dict[str, Any] = {
        "groups": ["g"] * number,
        "weights": [1.0] * number,
        "names": list(map(str, range(number))),
    }
    before = from_lists(ids, marks, **plain)
    assert (
        from_lists(copy.deepcopy(ids), copy.deepcopy(marks), **copy.deepcopy(plain)).fingerprint == before.fingerprint
    )
    probe = data.draw(st.integers(0, number - 1))
    what = data.draw(st.sampled_from(["token", "mark", "groups", "weights", "names", "drop"]))
    if what == "token":
        ids[probe][data.draw(st.integers(0, len(ids[probe]) - 1))] += 1
    elif what == "mark":
        place = data.draw(st.integers(1, len(ids[probe]) - 1))
        marks[probe][place] = not marks[probe][place]
        if not any(marks[probe][1:]):
            return
    elif what == "drop":
        ids[probe], marks[probe] = [*ids[probe], 5], [*marks[probe], True]
    else:
        plain[what][probe] = {"groups": "h", "weights": 1.0 + 2**-52, "names": "other"}[what]
    assert from_lists(ids, marks, **plain).fingerprint != before.fingerprint


def test_any_change_of_a_dense_probe_changes_its_fingerprint() -> None:
    image = torch.zeros(2, 3)
    sets = [
        ProbeSet.from_tensors(image),
        ProbeSet.from_tensors(image.double()),
        ProbeSet.from_tensors((image.int(),)),
        ProbeSet.from_tensors(image.reshape(2, 3, 1)),
        ProbeSet.from_tensors({"x": image}),
        ProbeSet.from_tensors({"y": image}),
        ProbeSet.from_tensors((image, image)),
        ProbeSet.from_tensors(-image),
        ProbeSet.from_tensors(image, torch.ones(2, 3)),
        ProbeSet.from_tensors(image, torch.ones(2, 4)),
    ]
    assert len({probes.fingerprint for probes in sets}) == len(sets)
    assert ProbeSet.from_tensors((image.clone(),)).fingerprint == sets[0].fingerprint


def test_the_tokenizer_is_part_of_the_fingerprint(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor([[1, 2]])
    assert ProbeSet.from_tensors(ids, tokenizer=tokenizer).fingerprint != ProbeSet.from_tensors(ids).fingerprint


def test_another_process_finds_the_same_fingerprint() -> None:
    source = (
        "import torch; from diffsensor.probes import ProbeSet;"
        "print(ProbeSet.from_tensors(torch.tensor([[1, 2], [3, 4]]), groups=['a', 'b']).fingerprint)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", source], cwd=root, capture_output=True, text=True, check=True)
    probes = ProbeSet.from_tensors(torch.tensor([[1, 2], [3, 4]]), groups=["a", "b"])
    assert done.stdout.strip() == probes.fingerprint


# Kept in files


def some_sets(tokenizer: PreTrainedTokenizerFast) -> list[ProbeSet]:
    return [
        ProbeSet.from_texts(CORPUS[:3], tokenizer, ["ä", "b", "\ud800"], max_length=6, weights=[1, 0.1, 3]),
        ProbeSet.from_tensors(torch.rand(3, 2)),
        ProbeSet.from_tensors((torch.rand(3, 2), torch.tensor([True, False, True]))),
        ProbeSet.from_tensors({"x": torch.rand(3, 4).bfloat16()}, torch.ones(3, 4)),
    ]


def test_probes_come_back_from_files_as_they_were(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for number, probes in enumerate(some_sets(tokenizer)):
        folder = tmp_path / "deep" / str(number)
        probes.save(folder)
        again = ProbeSet.load(folder)
        assert again.fingerprint == probes.fingerprint
        assert repr(again) == repr(probes)
        for packed in (True, False):
            one, two = probes.plan(packed), again.plan(packed)
            for name in ("probe", "offset", "target"):
                assert torch.equal(getattr(one, name), getattr(two, name))
            for first, second in zip(one.batches, two.batches, strict=True):
                assert all(map(torch.equal, first.args, second.args))
                assert all(torch.equal(first.inputs[key], second.inputs[key]) for key in first.inputs | second.inputs)
        assert sorted(path.name for path in folder.iterdir()) == ["probes.json", "probes.safetensors"]
        probes.save(folder)
        assert ProbeSet.load(folder).fingerprint == probes.fingerprint


def test_loaded_probes_decode_with_their_own_tokenizer_and_refuse_another(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    probes = ProbeSet.from_texts(["the moon"], tokenizer)
    probes.save(tmp_path)
    ids = probes.tokens_of(0).tolist()
    assert ProbeSet.load(tmp_path, tokenizer).decode(ids) == "<bos>the moon"
    assert ProbeSet.load(tmp_path).decode(ids).startswith("⟨0⟩")
    with pytest.raises(ProbeError, match="fingerprint"):
        ProbeSet.load(tmp_path, bpe(vocab_size=350))


def test_no_text_is_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ProbeSet.from_texts(["the moon"], tokenizer).save(tmp_path)
    assert all(b"moon" not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["probes.json", "probes.safetensors"])
def test_every_flipped_bit_and_every_truncation_is_found(tmp_path: Path, name: str) -> None:
    probes = from_lists([[1, 2, 3]], [[True] * 3], groups=["ä"])
    probes.save(tmp_path)
    path = tmp_path / name
    good = path.read_bytes()
    for place in range(len(good)):
        flipped = bytearray(good)
        # 0x20 is the bit between "\\u00e4" and "\\u00E4", which JSON reads as the same letter.
        flipped[place] ^= 0x20 if good[place : place + 1].isalpha() else 1 << (place % 8)
        path.write_bytes(flipped)
        with pytest.raises(CorruptFileError):
            ProbeSet.load(tmp_path)
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(CorruptFileError):
            ProbeSet.load(tmp_path)
    path.unlink()
    with pytest.raises(CorruptFileError, match=re.escape(str(path))):
        ProbeSet.load(tmp_path)
    path.write_bytes(good)
    assert ProbeSet.load(tmp_path).fingerprint == probes.fingerprint


def test_files_of_two_probe_sets_do_not_pass_as_one(tmp_path: Path) -> None:
    from_lists([[1, 2, 3]], [[True] * 3]).save(tmp_path / "one")
    from_lists([[1, 2, 4]], [[True] * 3]).save(tmp_path / "two")
    (tmp_path / "one" / "probes.safetensors").replace(tmp_path / "two" / "probes.safetensors")
    with pytest.raises(CorruptFileError, match="checksum"):
        ProbeSet.load(tmp_path / "two")


def test_contents_that_do_not_fit_their_fingerprint_are_refused(tmp_path: Path) -> None:
    from_lists([[1, 2, 3]], [[True] * 3], groups=["a"]).save(tmp_path)
    path = tmp_path / "probes.json"
    path.write_bytes(json_bytes("probes", {**read_json(path), "groups": ["b"]}))
    with pytest.raises(CorruptFileError, match="fingerprint"):
        ProbeSet.load(tmp_path)


def test_a_failed_save_leaves_nothing_behind_and_the_old_probes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = from_lists([[1, 2, 3]], [[True] * 3]), from_lists([[4, 5, 6]], [[True] * 3])
    old.save(tmp_path)
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        new.save(tmp_path)
    assert ProbeSet.load(tmp_path).fingerprint == old.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["probes.json", "probes.safetensors"]


def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        from_lists([[1, 2]], [[True] * 2]).save(tmp_path / "file")


def test_a_single_token_is_shown_with_the_space_it_begins_with() -> None:
    sentencepiece_like = Tokenizer(models.BPE({"▁": 0, "t": 1, "▁t": 2}, [("▁", "t")]))
    sentencepiece_like.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    probes = ProbeSet.from_tensors(
        torch.tensor([[1, 2]]), tokenizer=PreTrainedTokenizerFast(tokenizer_object=sentencepiece_like)
    )
    assert [probes.decode([token]) for token in (0, 1, 2)] == [" ", "t", " t"]
    assert probes.decode([2, 1]) == "tt"
