"""Wrong adapter files, each with what its refusal must say."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from reft_core.adapter_header import MAX_HEADER_BYTES
from tests.reft_core.adapter_files.damage import (
    BIAS,
    DOWN,
    good_file,
    pack,
    swap_offsets,
    with_data,
    with_header,
    with_spec,
    with_spec_text,
    with_tensor,
)


@dataclass(frozen=True)
class Bad:
    """A wrong file and what its refusal must say: field, value and what was allowed."""

    name: str
    file: Callable[[], bytes]
    says: tuple[str, ...]


LAYERS = ("sites", "block_output", "layers")
RANK = ("sites", "block_output", "rank")
DEEP = 100_000

BAD_FILES = [
    # Before the header.
    Bad("empty", lambda: b"", ("body", "0 bytes", "safetensors")),
    Bad("7 bytes", lambda: b"1234567", ("body", "7 bytes", "safetensors")),
    Bad(
        "header beyond the file",
        lambda: struct.pack("<Q", 10**9) + b"{}",
        ("header", "1000000000", "2 bytes"),
    ),
    Bad(
        "header of 2^64-1 bytes",
        lambda: b"\xff" * 8 + b"{}",
        ("header", str(2**64 - 1), "2 bytes"),
    ),
    Bad(
        "header over its cap",
        lambda: pack(b" " * (MAX_HEADER_BYTES + 1), b""),
        ("header", f"{MAX_HEADER_BYTES + 1} bytes", f"at most {MAX_HEADER_BYTES} bytes"),
    ),
    # The header.
    Bad("not JSON", lambda: pack(b"{nope}", b""), ("header", "JSON")),
    Bad("not UTF-8", lambda: pack(b'{"\xff": 1}', b""), ("header", "JSON", "0xff")),
    Bad("UTF-16", lambda: pack('{"a": 1}'.encode("utf-16"), b""), ("header", "JSON")),
    Bad("deep nesting", lambda: pack(b"[" * DEEP, b""), ("header", "JSON", "recursion")),
    Bad("a huge number", lambda: pack(b'{"a": ' + b"9" * 5000 + b"}", b""), ("header", "JSON")),
    Bad("a list", lambda: pack(b"[]", b""), ("header", "'list'", "a JSON object")),
    Bad(
        "a repeated key", lambda: pack(b'{"a": 1, "a": 2}', b""), ("header", "JSON", "'a'", "twice")
    ),
    Bad(
        "a repeated key inside",
        lambda: pack(b'{"__metadata__": {"reft": "", "reft": ""}}', b""),
        ("header", "JSON", "'reft'", "twice"),
    ),
    # The metadata.
    Bad(
        "no metadata",
        lambda: with_header(lambda header: header.pop("__metadata__")),
        ("__metadata__", "None", "exactly one key, 'reft'"),
    ),
    Bad(
        "metadata that is no object",
        lambda: with_header(lambda header: header.update(__metadata__=[1])),
        ("__metadata__", "[1]", "exactly one key, 'reft'"),
    ),
    Bad(
        "another metadata key",
        lambda: with_header(lambda header: header["__metadata__"].update(format="pt")),
        ("__metadata__", "['format', 'reft']", "exactly one key, 'reft'"),
    ),
    Bad(
        "a spec that is no text",
        lambda: with_header(lambda header: header["__metadata__"].update(reft={})),
        ("spec", "'dict'", "a JSON document as text"),
    ),
    # The spec's JSON.
    Bad("spec not JSON", lambda: with_spec_text(lambda _: "hey"), ("spec", "'hey'", "JSON")),
    Bad("spec deep", lambda: with_spec_text(lambda _: "[" * DEEP), ("spec", "'[[[", "JSON")),
    Bad("spec a list", lambda: with_spec_text(lambda _: "[]"), ("spec", "[]", "object")),
    Bad(
        "spec with half a surrogate",
        lambda: with_spec_text(lambda _: "\ud800"),
        ("spec", r"'\ud800'"),
    ),
    Bad(
        "spec with a repeated key",
        lambda: with_spec_text(lambda text: text[:-1] + ',"name":"other"}'),
        ("spec", "JSON", "'name'", "twice"),
    ),
    # Unknown and missing keys, at each level.
    *(
        Bad(
            f"unknown key {'.'.join(path)}",
            lambda path=path: with_spec(*path, value=17),
            (".".join(("spec", *path)), "17", "not permitted"),
        )
        for path in [
            ("typo",),
            ("base", "typo"),
            ("positions", "typo"),
            ("sites", "block_output", "typo"),
            ("task", "typo"),
            ("training", "typo"),
        ]
    ),
    Bad(
        "unknown key of a template",
        lambda: with_spec("template", value={"typo": 17}),
        ("spec.template.typo", "17", "not permitted"),
    ),
    Bad(
        "unknown site",
        lambda: with_spec("sites", value={"mlp": {}}),
        ("spec.sites.mlp", "'mlp'", "match pattern", "block_output"),
    ),
    Bad(
        "a linear site with a path that is none",
        lambda: with_spec("sites", value={"linear:../up": {}}),
        ("spec.sites.linear:../up", "'linear:../up'", "match pattern"),
    ),
    Bad(
        "no sites",
        lambda: with_spec("sites", value={}),
        ("spec", "sites: got none", "at least one site, a prefix or a head"),
    ),
    Bad(
        "missing key",
        lambda: with_spec_text(lambda text: text.replace('"method":"loreft",', "")),
        ("spec.method", "required"),
    ),
    # Wrong types, also those that a lenient reader would convert.
    *(
        Bad(
            f"{'.'.join(path)} = {value!r}",
            lambda path=path, value=value: with_spec(*path, value=value),
            (".".join(("spec", *path)), repr(value), allowed),
        )
        for path, value, allowed in [
            (("name",), 5, "string"),
            (("name",), None, "string"),
            (("name",), "no spaces", "match pattern"),
            (("name",), "../up", "match pattern"),
            (("name",), "newline\n", "match pattern"),
            (("format_version",), 2, "1"),
            (("format_version",), "1", "1"),
            (("base",), None, "object"),
            (("base",), [], "object"),
            (("base", "hidden_size"), "32", "integer"),
            (("base", "hidden_size"), 32.0, "integer"),
            (("base", "hidden_size"), True, "integer"),
            (("base", "hidden_size"), 0, "greater than or equal to 1"),
            (("base", "num_layers"), 10**30, "less than or equal to 1024"),
            (("base", "fingerprint"), "F" * 64, "match pattern"),
            (("dtype",), "float64", "'float32', 'float16' or 'bfloat16'"),
            (("positions", "rule"), 1, "string"),
            (("positions", "tied"), "yes", "boolean"),
            (("positions", "tied"), 0, "boolean"),
            (("positions", "anchor"), "end", "'prompt_end' or 'before_last'"),
            (("positions", "cap"), "none", "'shared' or 'half'"),
            ((*LAYERS,), "03", "array"),
            ((*LAYERS,), [], "at least 1 item"),
            ((*RANK,), "2", "integer"),
            ((*RANK,), 1025, "less than or equal to 1024"),
            ((*RANK,), -1, "greater than or equal to 0"),
            (("sites", "block_output", "activation"), "softmax", "'identity', 'relu'"),
            (("sites", "block_output", "phase"), "decode", "'prompt' or 'all'"),
            (("sites", "block_output", "source"), "x", "'output' or 'input'"),
            (("sites", "block_output", "in_size"), 0, "greater than or equal to 1"),
            (("sites", "block_output", "in_size"), "32", "integer"),
            (("sites", "block_output", "out_size"), 2**20 + 1, "less than or equal to 1048576"),
            (("sites", "block_output", "scale"), math.nan, "finite"),
            (("strength",), math.nan, "finite"),
            (("strength",), math.inf, "finite"),
            (("strength",), -math.inf, "finite"),
            (("strength",), 1e7, "less than or equal to 1000000"),
            (("strength",), "1", "number"),
            (("strength",), True, "number"),
            (("task", "kind"), "ranking", "'generation'"),
            (("task", "labels"), ["one"], "at least 2 items"),
            (("training", "seed"), "7", "integer"),
            (("training", "seed"), 7.0, "integer"),
            (("description",), [], "string"),
        ]
    ),
    Bad(
        "a layer that is text",
        lambda: with_spec(*LAYERS, value=[0, "3"]),
        ("spec.sites.block_output.layers.1", "'3'", "integer"),
    ),
    Bad(
        "a metric that is NaN",
        lambda: with_spec("training", "metrics", value={"loss": math.nan}),
        ("spec.training.metrics.loss", "nan", "finite"),
    ),
    Bad(
        "an overlong description",
        lambda: with_spec("description", value="x" * 8193),
        ("spec.description", "'xxx", "at most 8192 characters"),
    ),
    # Values that contradict one another.
    Bad(
        "a layer out of range",
        lambda: with_spec(*LAYERS, value=[0, 4]),
        ("spec", "sites.block_output.layers", "4", "at most 3"),
    ),
    *(
        Bad(
            f"layers {layers}",
            lambda layers=layers: with_spec(*LAYERS, value=layers),
            ("spec.sites.block_output", str(layers), "layers must be ascending, unique"),
        )
        for layers in ([-1, 0], [0, 0], [3, 0])
    ),
    Bad(
        "rank 0",
        lambda: with_spec(*RANK, value=0),
        ("spec.sites.block_output", "of rank 0", "a rank of at least 1"),
    ),
    Bad(
        "rank beyond the hidden size",
        lambda: with_spec(*RANK, value=33),
        ("spec", "sites.block_output.rank", "33", "at most the site's width 32"),
    ),
    *(
        Bad(
            f"parts {parts}",
            lambda parts=parts: with_spec("sites", "block_output", "parts", value=parts),
            ("spec.sites.block_output", parts[0], "parts", allowed),
        )
        for parts, allowed in [
            (["down"], "'down' and 'up' come together"),
            (["bias"], "need 'down' and 'up'"),
            (["skip", "shift"], "need 'down' and 'up'"),
            (["shift"], "need 'down' and 'up'"),  # with rank 2
            (["down", "up", "up"], "unique"),
        ]
    ),
    Bad(
        "unknown part",
        lambda: with_spec("sites", "block_output", "parts", value=["down", "up", "top"]),
        ("spec.sites.block_output.parts.2", "'top'", "'down', 'skip'"),
    ),
    Bad(
        "bad position rule",
        lambda: with_spec("positions", "rule", value="f0"),
        ("spec.positions", "'f0'", "'fN', 'lN'"),
    ),
    Bad(
        "overlong position rule",
        lambda: with_spec("positions", "rule", value="1," * 20_000 + "1"),
        ("spec.positions.rule", "'1,1,", "at most 32768 characters"),
    ),
    Bad(
        "template without content",
        lambda: with_spec("template", value={"user": "hello"}),
        ("spec.template", "'hello'", "'{content}' exactly once"),
    ),
    *(
        Bad(
            f"subspaces {ranks}",
            lambda ranks=ranks: with_spec("subspaces", value={"tone": ranks}),
            ("spec", "subspaces.tone", str(ranks), "ranks 0 to 1"),
        )
        for ranks in ([], [2], [-1, 0])
    ),
    Bad(
        "a prefix of an unknown kind",
        lambda: with_spec("prefix", value={"kind": "token", "length": 1}),
        ("spec.prefix.kind", "'token'", "'kv' or 'embedding'"),
    ),
    Bad(
        "an unknown key of a prefix",
        lambda: with_spec("prefix", value={"kind": "embedding", "length": 1, "typo": 17}),
        ("spec.prefix.typo", "17", "not permitted"),
    ),
    Bad(
        "a prefix whose tensors are absent",
        lambda: with_spec("prefix", value={"kind": "embedding", "length": 2}),
        ("prefix.embedding", "missing", "(2, 32)"),
    ),
    # The tensors.
    Bad(
        "a missing tensor",
        lambda: with_header(lambda header: header.pop(DOWN)),
        (DOWN, "missing", "(32, 2)"),
    ),
    Bad(
        "a tensor too many",
        lambda: with_header(lambda header: header.update({"evil\n": header[DOWN]})),
        ("tensors", r"'evil\n'", "only tensors the spec implies"),
    ),
    Bad(
        "one unit's tensors under a tied rule",
        lambda: with_spec("positions", "tied", value=True),
        ("tensors", "'layers.0.block_output.1.", "only tensors the spec implies"),
    ),
    Bad(
        "an entry that is no object",
        lambda: with_header(lambda header: header.update({DOWN: 5})),
        (DOWN, "5", "object"),
    ),
    Bad(
        "an unknown key in an entry",
        lambda: with_tensor(DOWN, note=17),
        (DOWN, "'note'", "dtype, shape, data_offsets"),
    ),
    Bad("a wrong rank", lambda: with_spec(*RANK, value=3), (f"{DOWN}.shape", "[32, 2]", "[32, 3]")),
    Bad(
        "a transposed shape",
        lambda: with_tensor(DOWN, shape=[2, 32]),
        (f"{DOWN}.shape", "[2, 32]", "[32, 2]"),
    ),
    Bad(
        "a negative shape",
        lambda: with_tensor(DOWN, shape=[-32, 2]),
        (f"{DOWN}.shape", "[-32, 2]", "[32, 2]"),
    ),
    Bad("no shape", lambda: with_tensor(DOWN, shape=None), (f"{DOWN}.shape", "None", "[32, 2]")),
    Bad("a wrong dtype", lambda: with_tensor(DOWN, dtype="F64"), (f"{DOWN}.dtype", "'F64'", "F32")),
    Bad(
        "another dtype than the spec's",
        lambda: with_spec("dtype", value="bfloat16"),
        (".dtype", "'F32'", "BF16"),
    ),
    *(
        Bad(
            f"data_offsets {offsets}",
            lambda offsets=offsets: with_tensor(DOWN, data_offsets=offsets),
            ("body", "not a valid safetensors file"),
        )
        for offsets in ([0, 4], [0, 256], [8, 2**63], [-1, 255], [264, 8], [8.5, 264], None)
    ),
    Bad(
        "offsets of two sizes swapped",
        lambda: swap_offsets(BIAS, DOWN),
        ("body", "not a valid safetensors file"),
    ),
    Bad("truncated data", lambda: good_file()[:-1], ("body", "not a valid safetensors file")),
    Bad("trailing bytes", lambda: good_file() + b"\0", ("body", "not a valid safetensors file")),
    *(
        Bad(
            f"{name} in the data",
            lambda bits=bits: with_data(0, bits),
            (BIAS, "NaN or infinity", "finite values only"),
        )
        for name, bits in [
            ("NaN", 0x7FC00000),
            ("a signalling NaN", 0x7F800001),
            ("infinity", 0x7F800000),
            ("minus infinity", 0xFF800000),
        ]
    ),
]
