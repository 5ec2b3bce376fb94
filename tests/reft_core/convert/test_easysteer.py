"""EasySteer's payloads, folders and GGUF vectors reproduce its own edits in our file.

The stored cases were written by EasySteer's own code (``make_easysteer.py``). Its training
checkpoint is not among them: those here are written as its loader describes them. Other forms are
derived from payloads made here, as ``Payload.to_wire`` makes them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reft_core.adapter import Adapter, EditKey, decode_adapter
from reft_core.convert import ConvertOptions, convert
from reft_core.errors import (
    AdapterFileInvalid,
    AdapterMismatch,
    AdapterTooLarge,
    InvalidRequest,
    ReftError,
    UnsupportedFeature,
)
from tests.reft_core.convert.support import assert_reproduces, case_names, load_case, options

D, R = 24, 3


def known(**given: Any) -> ConvertOptions:
    return options(**({"positions": "l1", "anchor": "prompt_end", "cap": "shared"} | given))


def wire(kind: str, tensors: dict[str, Tensor], extra: dict[str, Any]) -> dict[str, Any]:
    """A payload as EasySteer sends it in JSON, hashed as it hashes it."""
    digest = hashlib.sha256(f"{kind}:1".encode())
    entries = {}
    for name in sorted(tensors):
        array = tensors[name].float().contiguous().numpy()
        digest.update(name.encode() + str(array.shape).encode() + array.tobytes())
        data = base64.b64encode(array.tobytes()).decode()
        entries[name] = {"shape": list(array.shape), "data": data}
    for key in sorted(extra):
        digest.update(f"{key}={extra[key]!r}".encode())
    return {
        "version": 1,
        "kind": kind,
        "tensors": entries,
        "extra": extra,
        "sha256": digest.hexdigest(),
    }


def reft_tensors() -> dict[str, Tensor]:
    return {
        "rotate_layer": torch.linalg.qr(torch.randn(D, R))[0],
        "learned_source_weight": torch.randn(R, D),
        "learned_source_bias": torch.randn(R),
    }


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


def read(path: Path, **given: Any) -> Adapter:
    return decode_adapter(convert(path, "easysteer", known(**given)))


def assert_is_loreft(adapter: Adapter, tensors: dict[str, Tensor], layers: list[int]) -> None:
    """Δ = (hWᵀ + b − hR)Rᵀ in these layers."""
    r, w, b = (
        tensors[name] for name in ("rotate_layer", "learned_source_weight", "learned_source_bias")
    )
    h = torch.randn(5, D)
    expected = (h @ w.mT + b - h @ r) @ r.mT
    assert set(adapter.edits) == {EditKey(layer, "block_output", 0) for layer in layers}
    for edit in adapter.edits.values():
        torch.testing.assert_close(edit.delta(h), expected, atol=1e-5, rtol=1e-5)
    assert adapter.spec.method == "loreft"


METHODS = {"direction": "steering", "gguf": "steering", "lowrank": "direft"}
METHODS |= {"folder-bias": "steering"}


@pytest.mark.parametrize("name", case_names("easysteer"))
def test_reproduces_easysteer(name: str) -> None:
    case = load_case("easysteer", name)
    assert case.facts["apply"] == {"prompt_positions": [-1]}
    layers = case.facts["layers"]
    source = case.adapter_folder
    if not name.startswith("folder"):
        (source,) = source.iterdir()
    adapter = read(source, layers=None if layers is None else tuple(layers))
    assert_reproduces(adapter, case)
    assert adapter.spec.method == METHODS.get(name, "loreft")


def test_the_payloads_made_here_are_those_easysteer_makes() -> None:
    for name in ("reft", "direction", "lowrank"):
        (path,) = load_case("easysteer", name).adapter_folder.iterdir()
        stored = json.loads(path.read_text())
        tensors = {
            key: torch.frombuffer(
                bytearray(base64.b64decode(entry["data"])), dtype=torch.float32
            ).reshape(entry["shape"])
            for key, entry in stored["tensors"].items()
        }
        assert wire(stored["kind"], tensors, stored["extra"]) == stored


def test_reads_a_reft_payload(tmp_path: Path) -> None:
    tensors = reft_tensors()
    path = write(tmp_path / "a.json", wire("reft", tensors, {"layer": 1}))
    assert_is_loreft(read(path), tensors, [1])
    without = {k: v for k, v in tensors.items() if not k.endswith("bias")}
    path = write(tmp_path / "b.json", wire("reft", without, {"layer": 1}))
    assert_is_loreft(read(path), {**without, "learned_source_bias": torch.zeros(R)}, [1])


def test_a_payload_without_a_layer_asks_for_layers(tmp_path: Path) -> None:
    tensors = reft_tensors()
    path = write(tmp_path / "a.json", wire("reft", tensors, {"layer": None}))
    with pytest.raises(InvalidRequest, match=r"^layers: got None, expected the layers to edit"):
        read(path)
    assert_is_loreft(read(path, layers=(0, 2)), tensors, [0, 2])


def test_reads_directions(tmp_path: Path) -> None:
    vectors = {f"layer.{layer}": torch.randn(D) for layer in (0, 2)}
    adapter = read(write(tmp_path / "a.json", wire("direction", vectors, {})), strength=2.0)
    assert adapter.spec.method == "steering"
    assert adapter.spec.strength == 2.0
    assert adapter.spec.sites["block_output"].phase == "prompt"
    everywhere = read(tmp_path / "a.json", phase="all")
    assert everywhere.spec.sites["block_output"].phase == "all"
    for layer in (0, 2):
        edit = adapter.edits[EditKey(layer, "block_output", 0)]
        torch.testing.assert_close(edit.delta(torch.randn(1, D))[0], vectors[f"layer.{layer}"])


def test_reads_low_rank_projectors(tmp_path: Path) -> None:
    p1, p2 = torch.randn(D, R), torch.randn(D, R)
    path = write(tmp_path / "a.json", wire("lowrank", {"projector1": p1, "projector2": p2}, {}))
    adapter = read(path, layers=(1,))
    h = torch.randn(4, D)
    expected = (h @ p1) @ p2.mT
    torch.testing.assert_close(adapter.edits[EditKey(1, "block_output", 0)].delta(h), expected)


def checkpoint(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "version": 1,
        "config": {
            "algorithm": "loreft",
            "component": "hidden_states",
            "layer": 1,
            "rank": R,
            "prompt_template": "100%% <user>%s</user>\n",
            "apply": {"prompt_positions": [-1]},
        },
        "payload": wire("reft", tensors, {"layer": 1}),
    }


def test_a_training_checkpoint_records_position_and_template(tmp_path: Path) -> None:
    tensors = reft_tensors()
    path = write(tmp_path / "steering_adapter.json", checkpoint(tensors))
    path.write_text(path.read_text() + " " * 2_000_000)  # as large as with a high rank
    adapter = decode_adapter(convert(tmp_path, "easysteer", options(template=None)))
    assert_is_loreft(adapter, tensors, [1])
    assert adapter.spec.positions.rule == "l1"
    assert adapter.spec.template is not None
    assert adapter.spec.template.user == "100% <user>{content}</user>\n"
    assert adapter.rule.resolve(1) == ((0,),)
    alone = decode_adapter(
        convert(tmp_path / "steering_adapter.json", "easysteer", options(template="base"))
    )
    assert alone.spec.template is None
    with pytest.raises(InvalidRequest, match="positions: got 'f1', expected 'l1'"):
        convert(tmp_path, "easysteer", options(positions="f1"))


@pytest.mark.parametrize("template", ["none", "%s %s", "%d %s", "%s {content}", "%"])
def test_templates_that_are_not_one_slot_are_refused(template: str, tmp_path: Path) -> None:
    document = checkpoint(reft_tensors())
    document["config"]["prompt_template"] = template
    path = write(tmp_path / "a.json", document)
    with pytest.raises(AdapterFileInvalid, match=r"prompt_template: got .* exactly one %s"):
        convert(path, "easysteer", options(template=None))


@pytest.mark.parametrize("prefix", ["", "learned_source."])
@pytest.mark.parametrize("config_name", ["config.json", "reft_config.json"])
def test_reads_the_folder_of_its_pyreft_fork(prefix: str, config_name: str, tmp_path: Path) -> None:
    tensors = reft_tensors()
    state = {
        "rotate_layer": tensors["rotate_layer"],
        f"{prefix}weight": tensors["learned_source_weight"],
        f"{prefix}bias": tensors["learned_source_bias"],
    }
    torch.save(state, tmp_path / "intervention.bin")
    row = [1, "block_output", "pos", 1, R] if config_name == "config.json" else {"layer": 1}
    write(tmp_path / config_name, {"representations": [row]})
    assert_is_loreft(read(tmp_path), tensors, [1])


def test_reads_a_lone_vector_and_the_layer_in_its_name(tmp_path: Path) -> None:
    bias = torch.randn(D)
    name = "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin"
    torch.save({"bias": bias}, tmp_path / name)
    write(tmp_path / "config.json", {})
    adapter = read(tmp_path)
    torch.testing.assert_close(adapter.edits[EditKey(2, "block_output", 0)].shift, bias)
    with pytest.raises(InvalidRequest, match=r"layers: got \(1,\), expected \(2,\)"):
        read(tmp_path, layers=(1,))


def test_reads_gguf_vectors(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "v.gguf"
    vectors = {layer: torch.randn(D) for layer in (1, 2)}
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = read(path)
    assert adapter.spec.method == "steering"
    for layer, vector in vectors.items():
        torch.testing.assert_close(adapter.edits[EditKey(layer, "block_output", 0)].shift, vector)
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(AdapterFileInvalid, match=r"v\.gguf: metadata key: got"):
        read(path)


def _number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def _gguf(*values: bytes, tensors: tuple[bytes, ...] = (), data: bytes = b"") -> bytes:
    """A GGUF file of these metadata entries and tensor entries, its data right behind."""
    head = b"GGUF" + _number(3, 4) + _number(len(tensors)) + _number(len(values))
    head += b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def _entry(key: bytes, kind: int, value: bytes) -> bytes:
    return _number(len(key)) + key + _number(kind, 4) + value


def _tensor(name: bytes, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    dims = b"".join(map(_number, shape))
    return (
        _number(len(name))
        + name
        + _number(len(shape), 4)
        + dims
        + _number(kind, 4)
        + (_number(offset))
    )


VECTOR = torch.arange(D, dtype=torch.float32)
BYTES = VECTOR.numpy().tobytes()


def test_gguf_metadata_of_every_type_is_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    entries = [_entry(b"n", kind, bytes(size)) for kind, size in sizes.items()]
    entries.append(_entry(b"s", 8, _number(3) + b"abc"))
    entries.append(_entry(b"a", 9, _number(2, 4) + _number(5) + bytes(10)))
    entries.append(_entry(b"t", 9, _number(8, 4) + _number(2) + _number(1) + b"x" + _number(0)))
    entries.append(_entry(b"general.alignment", 4, _number(32, 4)))
    path.write_bytes(_gguf(*entries, tensors=(_tensor(b"direction.2", D),), data=BYTES))
    torch.testing.assert_close(read(path).edits[EditKey(2, "block_output", 0)].shift, VECTOR)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # Fifty bytes that a reader which believes them is busy with for ever.
        (
            _gguf(_entry(b"a", 9, _number(0, 4) + _number(2**40))),
            "array: got '1099511627776 bytes'",
        ),
        (_gguf(_entry(b"a", 9, _number(8, 4) + _number(2**40))), "array length: got 1099511627776"),
        (_gguf(_entry(b"a", 9, _number(9, 4) + _number(1))), "array type: got 9"),
        (_gguf(_entry(b"a", 13, b"")), "metadata type: got 13"),
        (_gguf(_entry(b"a", 8, _number(2**63))), "metadata text: got '9223372036854775808 bytes'"),
        (b"GGUF" + _number(3, 4) + _number(2**60) + _number(0), "tensors: got 1152921504606846976"),
        (b"GGUF" + _number(3, 4) + _number(0) + _number(2**60), "metadata entries: got 11529"),
        (b"GGUF" + b"\0\0\0\3" + bytes(16), "version: got 50331648"),
        (_gguf(_entry(b"general.alignment", 4, bytes(4))), "alignment: got 0"),
        (_gguf(tensors=(_tensor(b"direction.2", D, kind=1),), data=BYTES), "got 'type 1'"),
        (_gguf(tensors=(_tensor(b"direction.2", 2**40),), data=BYTES), "tensors: got '43980465111"),
        (_gguf(tensors=(_tensor(b"direction.2", 0),), data=BYTES), r"shape: got \[0\]"),
        (_gguf(tensors=(_tensor(b"direction.2"),), data=BYTES), "1 to 8 dimensions"),
        (
            _gguf(tensors=(_tensor(b"direction.2", D, offset=2**62),), data=BYTES),
            "direction.2: got '96 bytes', expected at most the 0 left",
        ),
        (
            _gguf(tensors=tuple(_tensor(b"direction.%d" % i, D) for i in range(5)), data=BYTES),
            "tensors: got .* expected at most the file's",
        ),
        (
            _gguf(tensors=(_tensor(b"direction.2", D, offset=0),) * 2, data=BYTES * 2),
            "'direction.2', expected each name once",
        ),
        (_gguf(tensors=(_tensor(b"other.2", D),), data=BYTES), "keys: got 'other.2'"),
    ],
)
def test_gguf_files_are_held_to_their_bytes(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(AdapterFileInvalid, match=message) as caught:
        read(path)
    assert str(caught.value).startswith("a.gguf: ")


def test_documents_are_not_parsed_at_any_size(tmp_path: Path) -> None:
    path = tmp_path / "payload.json"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(AdapterTooLarge, match=r"payload\.json: got '67108865 bytes'"):
        read(path)


@pytest.mark.parametrize("missing", ["positions", "anchor", "cap", "template", "name"])
def test_what_a_payload_does_not_record_is_asked_for(missing: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", wire("reft", reft_tensors(), {"layer": 1}))
    with pytest.raises(InvalidRequest, match=f"^{missing}: got None, expected "):
        read(path, **{missing: None})


@pytest.mark.parametrize("kind", ["linear", "concept_pair", "feedback_direction", "x", None])
def test_other_kinds_are_named_and_refused(kind: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", wire(kind, {"weight": torch.eye(D)}, {}))
    with pytest.raises(UnsupportedFeature, match=f"kind: got {kind!r}, expected one of reft"):
        read(path)


def test_a_kind_that_is_no_text_is_refused(tmp_path: Path) -> None:
    document = wire("reft", reft_tensors(), {"layer": 1}) | {"kind": ["reft"]}
    with pytest.raises(UnsupportedFeature, match=r"kind: got \['reft'\]"):
        read(write(tmp_path / "a.json", document))


def _set(*keys: Any, to: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("sha256", to="0" * 64), "sha256: got"),
        (_set("tensors", "rotate_layer", "data", to="A"), "rotate_layer.data: got"),
        (_set("tensors", "rotate_layer", "data", to=3), "rotate_layer.data: got"),
        (_set("tensors", "rotate_layer", "data", to=""), "'0 bytes', expected '?288 bytes"),
        (_set("tensors", "rotate_layer", "shape", to=[-1, 3]), "rotate_layer.shape"),
        (_set("tensors", "rotate_layer", "shape", to=[10**9, 10**9]), "bytes"),
        (_set("tensors", "rotate_layer", "shape", to=[9] * 1000), "at most 2 positive whole"),
        (_set("tensors", "rotate_layer", to=1), "tensors.rotate_layer: got 'int'"),
        (_set("tensors", to=[]), "tensors: got"),
        (_set("extra", to=1), "extra: got 1"),
        (_set("version", to=2), "payload: got"),
        (_set("other", to=2), "payload: got"),
    ],
)
def test_bad_payloads_name_their_key(change: Any, message: str, tmp_path: Path) -> None:
    document = wire("reft", reft_tensors(), {"layer": 1})
    change(document)
    path = write(tmp_path / "a.json", document)
    with pytest.raises(AdapterFileInvalid, match=message) as caught:
        read(path)
    assert "a.json" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "extra", "message"),
    [
        ({}, {"layer": 1}, "rotate_layer: got None"),
        ({**reft_tensors(), "x": torch.ones(1)}, {"layer": 1}, r"keys: got \['x'\]"),
        ({**reft_tensors(), "rotate_layer": torch.ones(D)}, {"layer": 1}, "rotate_layer: got"),
        (reft_tensors(), {"layer": "1"}, "extra.layer: got '1'"),
        (reft_tensors(), {"layer": 3}, "layer: got 3, expected 0 to 2"),
    ],
)
def test_payloads_of_other_shapes_are_refused(
    tensors: dict[str, Tensor], extra: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.json", wire("reft", tensors, extra))
    with pytest.raises((AdapterFileInvalid, AdapterMismatch), match=message):
        read(path)


@pytest.mark.parametrize("data", [b"", b"\x80\x02}", b"[]", b"GGUFxxxx", b"hello"])
def test_files_of_other_kinds_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(ReftError, match=r"a\.bin"):
        read(path)
    with pytest.raises(AdapterFileInvalid, match="cannot be read"):
        read(tmp_path / "none.json")
