"""BitFit: trained biases. Ben Zaken et al. 2022 (arXiv 2106.10199)."""

from __future__ import annotations

from reft_core.methods.constant import Constant


class BitFit(Constant):
    """Δ = b (d_out,): a trained bias on linear maps (Ben Zaken et al. 2022).

    The paper trains the biases a model has. b is added to the frozen one, so from zero it takes
    the same steps; maps without a bias get one.

    Biases of layer norms are not trained here. One in front of linear maps acts as β·W on each
    of them, and a map's own b covers that with d_out free numbers, so nothing is lost where all
    of them are trained. Two kinds are out of reach of an edit in a layer: that of the norm
    after the last layer, and, in models that normalise after the residual sum (BERT), that of
    the norm after the attention. BERT's other one, at a layer's end, is ``steering`` at
    ``block_output``.
    """

    method = "bitfit"
    equation = "b"
    citation = "arXiv 2106.10199"
    sites = ("linear",)
    phase = "all"
