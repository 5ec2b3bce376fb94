from __future__ import annotations

import pytest

from reft_core.errors import InvalidRequest, TrainingError
from reft_core.methods import METHODS
from trainer.compare.config import CompareConfig
from trainer.compare.contenders import CONTENDERS, DEFAULT_METHODS, get_contenders
from trainer.sections import validated


def test_every_trainable_method_of_the_registry_can_be_compared() -> None:
    missing = {name for name, method in METHODS.items() if not method.interchanges}
    assert missing <= CONTENDERS.keys()
    assert {"prefix_tuning", "prompt_tuning", "mam"} <= CONTENDERS.keys()
    assert set(DEFAULT_METHODS) <= CONTENDERS.keys()


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_a_longer_search_goes_on_where_a_shorter_one_ended(name: str) -> None:
    contender = CONTENDERS[name]
    four, eight = contender.settings(4), contender.settings(8)
    assert eight[: len(four)] == four
    assert len(eight) == (1 if name == "zero_shot" else 8), "equal effort"
    if contender.learning_rates:
        low, high = contender.learning_rates
        rates = [setting["learning_rate"] for setting in eight]
        assert all(low <= rate <= high for rate in rates)
        assert rates[0] == pytest.approx((low * high) ** 0.5, rel=0.05)
        assert max(rates) / min(rates) > (high / low) ** 0.7, "they cover the interval"


def test_misspelt_names_are_told_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match=r"no method 'loraft', did you mean 'lo"):
        get_contenders(["loraft"])
    with pytest.raises(InvalidRequest, match="each method once"):
        get_contenders(["red", "red"])
    with pytest.raises(TrainingError, match=r"seedz: unknown setting, did you mean 'seeds'\?"):
        validated(CompareConfig, "compare", {"seedz": 1})
    with pytest.raises(TrainingError, match=r"compare: methods: .*did you mean 'peft_lora'"):
        validated(CompareConfig, "compare", {"methods": "peft_lra"})


def test_a_reference_is_one_of_the_methods() -> None:
    given = {"methods": "peft_lora,loreft", "reference": "peft_lora"}
    assert validated(CompareConfig, "compare", given).reference == "peft_lora"
    with pytest.raises(
        TrainingError, match=r"reference: got 'peft_lra', expected .*did you mean 'peft_lora'\?"
    ):
        validated(CompareConfig, "compare", given | {"reference": "peft_lra"})
    with pytest.raises(
        TrainingError, match=r"reference: got 'lora', expected .*; known are red, direft"
    ):
        validated(CompareConfig, "compare", {"methods": "red,direft", "reference": "lora"})


def test_lists_may_be_written_as_one_text() -> None:
    config = CompareConfig.model_validate({"methods": "loreft, red", "seeds": "3,4"})
    assert config.methods == ("loreft", "red")
    assert config.seeds == (3, 4)
    assert CompareConfig.model_validate_json(config.model_dump_json()) == config
