"""Steering vectors, also called activation addition. Turner et al. 2023 (arXiv 2308.10248)."""

from __future__ import annotations

from reft_core.methods.constant import Constant


class Steering(Constant):
    """Δ(h) = v with v (d,), scaled by the request's strength.

    The paper takes v as a difference of activations, which ``reft adapter steer`` computes.
    Trained, which the paper does not, it starts at zero, where the base model is.
    """

    method = "steering"
    equation = "v"
    citation = "arXiv 2308.10248, §3"
