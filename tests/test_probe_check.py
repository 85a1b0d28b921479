"""Looking at a file of probes before a model does: what is found, what is expected of it, how it is told."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import diffsensor
from diffsensor import cli
from diffsensor.errors import ProbeError
from diffsensor.probes.check import ProbeCheck, check_file, expected_error, in_words
from tiny_tokenizers import bpe, words

DEFAULT = Path(diffsensor.__file__).parent / "probes" / "default.jsonl"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe()


@pytest.fixture
def saved(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def some(num: int, **more: Any) -> list[dict[str, Any]]:
    """Texts that have nothing in common but their end."""
    return [{"text": f"{number * 7919} of the tables and stables", **more} for number in range(10, num + 10)]


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def checked(tmp_path: Path, tokenizer: Any, records: list[dict[str, Any]], max_length: int = 128) -> ProbeCheck:
    return check_file(written(tmp_path / "probes.jsonl", records), tokenizer, max_length)


# What to expect


@pytest.mark.parametrize(("num", "low", "high"), [(32, 5, 7), (64, 4, 5), (128, 3, 4), (256, 2, 3)])
def test_the_expected_error_of_long_probes_is_the_measured_one(num: int, low: float, high: float) -> None:
    expected = expected_error([(128, 1.0)] * num)
    assert (expected.low, expected.high) == (pytest.approx(low, rel=0.01), pytest.approx(high, rel=0.01))


def test_the_expected_error_falls_with_probes_and_positions() -> None:
    highs = [expected_error([(32, 1.0)] * num).high for num in range(2, 600)]
    assert highs == sorted(highs, reverse=True)
    highs = [expected_error([(positions, 1.0)] * 64).high for positions in range(1, 200)]
    assert highs == sorted(highs, reverse=True)
    assert expected_error([(16, 1.0)] * 64).high == pytest.approx(
        1.2 * expected_error([(128, 1.0)] * 64).high, rel=0.01
    )
    # Beyond what was measured: four times as many probes, half the error.
    assert expected_error([(32, 1.0)] * 8).high == pytest.approx(2 * expected_error([(32, 1.0)] * 32).high)
    assert expected_error([(32, 1.0)] * 1024).high == pytest.approx(expected_error([(32, 1.0)] * 256).high / 2)


def test_probes_that_hardly_weigh_anything_hardly_count() -> None:
    equal = expected_error([(32, 1.0)] * 64)
    assert expected_error([(32, 1.0)] * 64 + [(32, 1e-9)] * 64).high == pytest.approx(equal.high)
    assert expected_error([(32, 1.0)] * 63 + [(32, 1000.0)]).high > 5 * equal.high


@pytest.mark.parametrize("probes", [[], [(32, 1.0)], [(32, 0.0), (32, 0.0)]])
def test_without_two_probes_no_error_is_defined(probes: list[tuple[int, float]]) -> None:
    assert math.isnan(expected_error(probes).high)


# What is found


def test_the_default_probes_are_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    found = check_file(DEFAULT, tokenizer, max_length=1000)
    assert (found.num_probes, len(found.groups)) == (128, 8)
    assert {group.num_probes for group in found.groups} == {16}
    assert (found.problems, found.same_record, found.same_tokens, found.overlaps) == ((), (), (), ())
    assert found.num_positions == sum(group.num_positions for group in found.groups)
    assert re.match(
        r"Expect about ±3(-4)? % \(one standard error\) on the mean KL, ±[7-9]-1[0-2] % within the group '\w+' of 16\. "
        r".*one small model",
        in_words(found),
    )


def test_lengths_and_positions_are_those_of_the_probe_set(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"text": "the moon"}, {"prompt": "the garden", "completion": " is very far"}, {"text": "table " * 40}]
    found = checked(tmp_path, tokenizer, records, max_length=20)
    probes = diffsensor.ProbeSet.from_jsonl(tmp_path / "probes.jsonl", tokenizer, max_length=20)
    lengths = sorted(len(probes.tokens_of(probe)) for probe in range(3))
    assert [found.tokens[name] for name in ("min", "median", "max", "sum")] == [*lengths, sum(lengths)]
    assert found.num_positions == probes.num_positions
    whole = diffsensor.ProbeSet.from_jsonl(tmp_path / "probes.jsonl", tokenizer, max_length=500)
    assert found.truncated == {"2": len(whole.tokens_of(2)) - 20}
    assert "1 of 3 probes are longer than 20 tokens and are cut: 2." in found.advice[0]


def test_records_that_are_the_same_are_a_problem_and_counted_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = some(40)
    found = checked(tmp_path, tokenizer, [*records, records[3], {**records[3], "id": "copy"}])
    assert found.same_record == (("3", "40", "copy"),)
    assert found.same_tokens == ()
    assert "'3' = '40' = 'copy'" in found.problems[0]
    assert found.expected == checked(tmp_path, tokenizer, records).expected


def test_probes_that_are_the_same_once_cut_are_a_problem(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    beginning = "the unbelievable answer: able, unable, table"
    records = [*some(40), {"text": beginning + " and the moon"}, {"text": beginning + " in the garden"}]
    assert checked(tmp_path, tokenizer, records).same_tokens == ()
    found = checked(tmp_path, tokenizer, records, max_length=8)
    assert found.same_tokens == (("40", "41"),)
    assert any("same tokens once they are cut: '40' = '41'" in problem for problem in found.problems)


def test_the_same_text_with_other_counted_positions_is_no_duplicate(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = [*some(40), {"text": "the moon is far"}, {"prompt": "the moon", "completion": " is far"}]
    assert checked(tmp_path, tokenizer, records).same_tokens == ()


def test_probes_that_share_most_counted_tokens_are_pointed_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = "the unbelievable answer: able, unable, table, tables and stables were believable"
    prompt = {"prompt": long, "completion": " in the garden"}
    records = [*some(40), {"text": long}, {"text": long + " moon"}, prompt, {**prompt, "completion": " far indeed"}]
    found = checked(tmp_path, tokenizer, records)
    # The same question with another answer is another probe.
    assert set(map(frozenset, found.overlaps)) <= {frozenset({"40", "41"}), frozenset({"41", "42"})}
    assert frozenset({"40", "41"}) in set(map(frozenset, found.overlaps))
    assert found.problems == ()


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (some(31), "There are 31 different probes. Give at least 32"),
        ([*some(40), *[{"text": f"{n} moons", "group": "moons"} for n in range(7)]], "'moons' has 7"),
    ],
)
def test_too_few_probes_are_a_problem(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, records: list[dict[str, Any]], told: str
) -> None:
    (problem,) = checked(tmp_path, tokenizer, records).problems
    assert told in problem


def test_unknown_tokens_are_a_problem(tmp_path: Path) -> None:
    found = checked(tmp_path, words("of", "the", "tables", "and"), some(40))
    assert found.num_unknown == 80
    assert any("80 of 240 tokens are the unknown one" in problem for problem in found.problems)


def test_many_long_probes_are_advised_against(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    long = [{"text": f"{number} " + "the answer: very far " * 30} for number in range(40)]
    found = checked(tmp_path, tokenizer, long, max_length=128)
    assert any("40 of 40 probes have 100 counted positions or more" in advice for advice in found.advice)
    minority = checked(tmp_path, tokenizer, [*some(40), *long[:10]])
    assert not any("counted positions or more" in advice for advice in minority.advice)


def test_a_template_with_todays_date_is_a_problem(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for message in messages %}{{ message.content }}<eos>{% endfor %}"
    )
    chats = [{"messages": [{"role": "assistant", "content": record["text"]}]} for record in some(40)]
    (problem,) = checked(tmp_path, tokenizer, chats).problems
    assert "today's date" in problem


# How it is told


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["probes", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command_shows_groups_sizes_and_what_to_expect(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: str
) -> None:
    file = written(tmp_path / "probes.jsonl", [*some(20, group="[bold]"), *some(40)[20:]])
    code, out, err = run(capsys, "check", file, "--tokenizer", saved)
    assert (code, err) == (0, "")
    assert re.search(r"\[bold\] +│ +20 │", out)
    assert re.search(r"\(none\) +│ +20 │", out)
    assert re.search(r"all +│ +40 │", out)
    assert "Expect about ±" in out
    assert out.endswith("No problems found.\n")


def test_problems_end_the_command_with_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: str) -> None:
    records = some(40)
    code, out, _ = run(capsys, "check", written(tmp_path / "p", [*records, records[0]]), "--tokenizer", saved)
    assert code == 1
    assert "Problem: Some probes are the same record: '0' = '40'." in out
    assert "No problems found" not in out


def test_json_holds_what_the_check_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = written(tmp_path / "probes.jsonl", [*some(40), {"text": "the garden", "group": "one alone"}])
    code, out, _ = run(capsys, "check", file, "--tokenizer", saved, "--max-length", 6, "--json")
    told = json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    found = check_file(file, tokenizer, 6)
    assert code == 1
    assert told["problems"] == list(found.problems)
    assert told["groups"][1] == {
        "group": "one alone",
        "num_probes": 1,
        "num_positions": found.groups[1].num_positions,
        "expected": {"low": None, "high": None},
    }
    assert (told["max_length"], told["tokens"], told["truncated"]) == (6, found.tokens, found.truncated)


@pytest.mark.parametrize(
    ("records", "told"),
    [
        (None, "cannot be read: No such file"),
        ([], "holds no record"),
        ([{"text": "ab"}, {"txt": "ab"}], "line 2: No key is named 'txt'. Did you mean 'text'?"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "line 1: the record is a chat"),
    ],
)
def test_a_file_that_cannot_be_checked_ends_the_command_with_code_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, saved: str, records: list[dict[str, Any]] | None, told: str
) -> None:
    file = tmp_path / "probes.jsonl"
    if records is not None:
        written(file, records)
    code, out, err = run(capsys, "check", file, "--tokenizer", saved)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(str(file))
    assert told in err


def test_a_tokenizer_that_cannot_be_loaded_ends_the_command_with_code_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = written(tmp_path / "probes.jsonl", some(3))
    code, out, err = run(capsys, "check", file, "--tokenizer", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "No tokenizer could be loaded" in err


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for arguments in (("--help",), ("check", "--help")):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert "Example: diffsensor probes check my-probes.jsonl --tokenizer ./my-model" in out


def test_a_tokenizer_is_left_as_it_was(tmp_path: Path) -> None:
    tokenizer = bpe(model_max_length=3)
    checked(tmp_path, tokenizer, some(3))
    assert tokenizer.model_max_length == 3


def test_an_empty_file_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ProbeError, match="holds no record"):
        checked(tmp_path, tokenizer, [])
