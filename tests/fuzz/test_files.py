"""A short attack on the reader of adapter files, and whether the attack could find anything."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import reft_core.adapter
import reft_core.adapter_header
from benchmarks.fuzz import conversions
from benchmarks.fuzz.base import good_files
from benchmarks.fuzz.files import Tally, Target, attack_all, attack_range, keep
from benchmarks.fuzz.mutants import Mutant, frame, mutant, put_together, repacked, take_apart
from benchmarks.fuzz.oracle import Bad, judge
from reft_core.adapter import Adapter, decode_adapter
from reft_core.errors import AdapterFileInvalid


def test_damaged_files_are_refused_or_good() -> None:
    tally = attack_range(3, range(4000))
    assert tally.problems == []
    assert (tally.files, tally.accepted_bad) == (4000, 0)
    assert tally.accepted > 300, "or the oracle saw nothing"
    assert tally.served > 200
    assert len(tally.by_damage) > 6


def test_processes_do_what_one_does() -> None:
    together, alone = attack_all(5, 500, num_workers=2), attack_range(5, range(500))
    assert (together.files, together.accepted, together.served) == (
        500,
        alone.accepted,
        alone.served,
    )
    assert together.problems == alone.problems == []


def test_a_mutant_is_a_function_of_its_numbers(tmp_path: Path) -> None:
    assert mutant(1, 17) == mutant(1, 17)
    assert len({mutant(1, index).data for index in range(200)}) > 190
    keep(tmp_path, 1, [(17, "what it did")])
    assert (tmp_path / "1-17.safetensors").read_bytes() == mutant(1, 17).data


@pytest.mark.parametrize("good", good_files(), ids=lambda good: good.name)
def test_the_oracle_takes_good_files(good: Any) -> None:
    judge(good.data, decode_adapter(good.data))
    header, spec, tensors = take_apart(good.data)
    held = {name: (header[name]["shape"], data) for name, data in tensors.items()}
    again = repacked(spec, held)
    judge(again, decode_adapter(again))


def _forget_finite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reft_core.adapter, "_check_finite", lambda tensors: None)


def _forget_repeats(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reft_core.adapter_header, "_no_duplicates", dict)


def _forget_shapes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reft_core.adapter, "check_tensors_declared", lambda header, spec: None)


def _crash(patch: pytest.MonkeyPatch) -> None:
    def stumble(spec: object, tensors: object) -> None:
        raise ZeroDivisionError

    patch.setattr(reft_core.adapter, "_build_head", stumble)


@pytest.mark.parametrize("forget", [_forget_finite, _forget_repeats, _forget_shapes, _crash])
def test_a_reader_that_forgets_a_check_is_found_out(
    forget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good_files()
    forget(monkeypatch)
    assert attack_range(3, range(600)).problems


def test_a_reader_that_changes_what_it_read_is_found_out() -> None:
    data = good_files()[0].data
    adapter = decode_adapter(data)
    key = next(iter(adapter.edits))
    adapter.edits[key].up[0, 0] += 1  # type: ignore[index]
    with pytest.raises(Bad, match="other numbers"):
        judge(data, adapter)


def test_a_reader_that_takes_too_long_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.fuzz.files._TIME_CAP_S", 0.05)

    def sleep(data: bytes, max_bytes: int) -> Adapter:
        time.sleep(5)
        raise AssertionError

    monkeypatch.setattr("benchmarks.fuzz.files.decode_adapter", sleep)
    target, tally = Target(), Tally()
    target.attack(1, Mutant(b"", "none", "none"), tally)
    target.close()
    assert "over" in tally.problems[0][1]


def test_converters_refuse_or_convert() -> None:
    report = conversions.attack(seed=2, count=150)
    assert report.problems == []
    assert report.converted.total() > 0


# Regressions: files that were once found to do harm ---------------------------------------------


def test_a_refusal_does_not_quote_a_header_at_length() -> None:
    """The format's library quotes what it cannot read, however long."""
    header, spec, _ = take_apart(good_files()[0].data)
    entry = header[next(iter(header))]
    entry["data_offsets"] = "x" * 100_000
    with pytest.raises(AdapterFileInvalid, match="not a valid safetensors file") as refused:
        decode_adapter(put_together(header, spec, b""))
    assert len(refused.value.message) < 300


def test_a_refusal_shows_no_control_characters() -> None:
    header, spec, _ = take_apart(good_files()[0].data)
    header[next(iter(header))]["data_offsets"] = "\x1b[31m\n"
    document = {"__metadata__": {"reft": json.dumps(spec)}, **header}
    with pytest.raises(AdapterFileInvalid) as refused:
        decode_adapter(frame(json.dumps(document).encode(), b""))
    assert refused.value.message.isprintable()
