"""The classification head that pyreft saves beside its units."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from reft_core.adapter import Head
from reft_core.convert.options import ConvertOptions
from reft_core.convert.tensor_file import read_pickle
from reft_core.edits import Activation
from reft_core.errors import InvalidRequest, UnsupportedFeature
from reft_core.spec import HeadSpec

HEAD_FILE = "pytorch_model.bin"


def read_head(path: Path, options: ConvertOptions) -> tuple[HeadSpec, Head] | None:
    """The classification head among the parameters that were trained beside the units.

    pyreft's trainer always writes this file, mostly empty. RoBERTa's head is a dense layer,
    tanh and a projection on the first token's state; BERT's projects the model's own pooler.
    Anything else in the file is a trained base parameter, which no adapter holds.
    """
    tensors = read_pickle(path)
    d, key = options.base.hidden_size, "classifier.weight"
    dense = key not in tensors
    if dense:
        key = "classifier.out_proj.weight"
    if key not in tensors:
        if tensors.keys:
            raise UnsupportedFeature.because(
                path.name, tensors.keys, "no trained parameters but a classification head"
            )
        return None
    num_labels = tensors.shape(key, 2, f"a (labels, {d}) tensor")[0]
    labels = options.required(
        "labels",
        f"the {num_labels} names of the head's classes",
        "a pyreft directory does not record them",
    )
    if len(labels) != num_labels:
        raise InvalidRequest.because("labels", labels, f"{num_labels} names, one a class")
    layers: dict[str, Tensor] = {}
    if dense:
        layers["dense_weight"] = tensors.take("classifier.dense.weight", (d, d)).mT.contiguous()
        layers["dense_bias"] = tensors.take("classifier.dense.bias", (d,))
    layers["out_weight"] = tensors.take(key, (num_labels, d)).mT.contiguous()
    layers["out_bias"] = tensors.take(key.replace("weight", "bias"), (num_labels,))
    tensors.finish()
    activation: Activation = "tanh" if dense else "identity"
    spec = HeadSpec(
        pooling="first" if dense else "pooler", hidden=d if dense else None, activation=activation
    )
    return spec, Head(**layers, activation=activation)
