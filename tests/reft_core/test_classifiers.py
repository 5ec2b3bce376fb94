"""Both classifiers are asked alike: the same requests, whichever kind of base model answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reft_core.adapter import Adapter, decode_adapter
from reft_core.classification import (
    Classification,
    Classifier,
    EncoderClassifier,
    EncoderEngine,
    LikelihoodClassifier,
    TextRequest,
    classifier_on,
    classify,
)
from reft_core.engine.config import EngineConfig
from reft_core.engine.engine import EmbeddedEngine
from reft_core.engine.interface import AdapterChoice, AdapterHost
from reft_core.errors import (
    DeadlineExceeded,
    EngineOverloaded,
    EngineUnavailable,
    InvalidRequest,
    PromptTooLong,
    ReftError,
    RequestFailed,
)
from reft_core.loading import LoadedModel
from reft_core.spec import HeadSpec, TaskSpec, TemplateSpec
from tests.factories import (
    random_adapter,
    random_classifier_bytes,
    random_prefix_adapter,
    tiny_loaded,
    tiny_model,
)
from tests.reference.slow import Stack, reference_classify, reference_logits
from tests.reft_core.test_classification import encoder, loaded

LABELS = ("no", "yes", "perhaps so")
BEGINNING = ("a", "a b", "no")
"""Of which one begins another."""
WORDS = ("<s>", "</s>", "ask", "answer", "no", "yes", "perhaps", "so", *"abcdefghij")
TEMPLATE = TemplateSpec(user="ask {content} ", generation="answer")
WAIT_S = 20


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word; texts begin with ``<s>``. Ids start where special ones of the models end."""
    vocab = {word: 3 + place for place, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}<s> {{ m.content }}{% endfor %}",
    )


@dataclass(frozen=True)
class Kind:
    """One kind of classifier, and what is right about it."""

    name: str
    loaded: Callable[[], LoadedModel]
    engine: Callable[[LoadedModel, EngineConfig], AdapterHost]
    adapter: Callable[[int], Adapter]
    """With labels of its own, that differ from adapter to adapter."""
    expected: Callable[[str, Stack, tuple[str, ...]], list[float]]
    """Log-probabilities of labels by the slow reference."""


def encoder_adapter(seed: int) -> Adapter:
    """With a trained head over two, three or four labels."""
    count = 2 + seed % 3
    head = HeadSpec(hidden=7, activation="tanh") if seed % 2 else HeadSpec(pooling="mean")
    data = random_classifier_bytes(
        loaded("bert").description, count, head, seed=seed, positions="f2", labels=labels_of(seed)
    )
    return decode_adapter(data)


def causal_adapter(seed: int) -> Adapter:
    """With a template, and labels to score."""
    return random_adapter(
        tiny_loaded().description,
        seed=seed,
        rank=4,
        name=f"scored-{seed}",
        positions="f1+l2",
        template=TEMPLATE if seed % 2 else None,
        task=TaskSpec(labels=labels_of(seed)),
    )


def labels_of(seed: int) -> tuple[str, ...]:
    return (*LABELS, "a b c")[: 2 + seed % 3]


def expected_of_head(text: str, stack: Stack, labels: tuple[str, ...]) -> list[float]:
    tokens = list(word_tokenizer()(text)["input_ids"])
    (known,) = [used.spec.task.labels for used, _ in stack if used.head]
    assert known is not None
    logprobs = reference_classify(encoder("bert"), tokens, stack).log_softmax(-1)
    return [float(logprobs[known.index(label)]) for label in labels]


@cache
def reference_model() -> PreTrainedModel:
    return tiny_model()


def expected_of_likelihood(text: str, stack: Stack, labels: tuple[str, ...]) -> list[float]:
    tokenizer = word_tokenizer()
    templated = bool(stack) and stack[0][0].spec.template is not None
    asked = f"ask {text} answer" if templated else text
    prompt = list(tokenizer(asked)["input_ids"])
    found = []
    # "no" begins "no way": only then does the end behind a label count.
    end = " </s>" * any(b.startswith(f"{a} ") for a in labels for b in labels)
    for label in labels:
        answer = tokenizer(label + end, add_special_tokens=False)["input_ids"]
        logits = reference_logits(reference_model(), [*prompt, *answer], len(prompt), stack=stack)
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(sum(float(row[token]) for row, token in zip(rows, answer, strict=True)))
    return found


def with_words(model: LoadedModel) -> LoadedModel:
    return replace(model, tokenizer=word_tokenizer())


KINDS = {
    "encoder": Kind(
        "encoder",
        lambda: with_words(loaded("bert")),
        EncoderEngine,
        encoder_adapter,
        expected_of_head,
    ),
    "causal": Kind(
        "causal",
        lambda: with_words(tiny_loaded()),
        EmbeddedEngine,
        causal_adapter,
        expected_of_likelihood,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def classifier(kind: Kind) -> Iterator[Classifier]:
    """On an engine that is not started."""
    found = make_classifier(kind)
    yield found
    found.engine.stop()


def make_classifier(kind: Kind, **config: int) -> Classifier:
    model = kind.loaded()
    engine = kind.engine(model, EngineConfig(**({"max_model_len": 40} | config)))
    return classifier_on(engine, model.tokenizer)


def ask(name: str, text: str, *stack: tuple[Adapter, float], **options: object) -> TextRequest:
    choices = tuple(AdapterChoice(adapter.digest, strength) for adapter, strength in stack)
    return TextRequest(name, text, choices, **options)  # type: ignore[arg-type]


TEXTS = ("a b c", "d", "e f g h i j a b c d", "b a", "no a yes b", "j i h g f")


def test_both_answer_the_same_requests(kind: Kind, classifier: Classifier) -> None:
    """Adapters with different labels in one batch; strengths, stacks and chosen labels."""
    adapters = [kind.adapter(seed) for seed in range(4)]
    steering = random_adapter(classifier.engine.model, method="steering", positions="prompt")
    for adapter in (*adapters, steering):
        classifier.engine.load_adapter(adapter)
    stacks: list[tuple[tuple[Adapter, float], ...]] = [
        *(((adapter, 1.0),) for adapter in adapters),
        ((adapters[0], 0.0),),
        ((adapters[1], 1.0), (steering, 0.7)),
    ]
    asked = [
        (text, stack, labels)
        for place, stack in enumerate(stacks)
        for text in TEXTS[place % 3 :: 3]
        for labels in (None, ("yes", "no"), *(() if kind.name == "encoder" else [BEGINNING]))
    ]
    classifier.engine.start()
    found = classify(
        classifier,
        [
            ask(f"r{place}", text, *stack, labels=labels)
            for place, (text, stack, labels) in enumerate(asked)
        ],
    )
    for outcome, (text, stack, chosen) in zip(found, asked, strict=True):
        labels = chosen or stack[0][0].spec.task.labels
        assert outcome.labels == labels
        right = kind.expected(text, stack, labels)
        assert outcome.logprobs == pytest.approx(right, abs=1e-3)
        assert outcome.best == labels[right.index(max(right))]
        weights = torch.tensor(right, dtype=torch.float64).softmax(-1).tolist()
        assert outcome.probs == pytest.approx(weights, abs=1e-3)
        assert sum(outcome.probs) == pytest.approx(1)


def test_a_ticket_counts(kind: Kind, classifier: Classifier) -> None:
    adapter = kind.adapter(0)
    classifier.engine.load_adapter(adapter)
    ticket = classifier.submit(ask("r", "a b c", (adapter, 1.0)), lambda _: None)
    assert ticket.num_prompt_tokens == 4
    layers = classifier.engine.model.num_layers
    if isinstance(classifier, EncoderClassifier):
        assert (ticket.num_label_tokens, ticket.num_edits) == (0, 2 * layers)
    else:
        # Two labels of one token; the last layer edits what the logits read.
        assert (ticket.num_label_tokens, ticket.num_edits) == (2, 2 * (3 * layers - 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None, "adapters": ()}, "expected (at least one|exactly one)"),
        ({"adapters": (AdapterChoice("0" * 64),)}, "expected a loaded digest"),
        ({"text": " ".join("a" * 60)}, "at most 40"),
    ],
)
def test_both_refuse_alike(kind: Kind, classifier: Classifier, change: dict, message: str) -> None:
    adapter = kind.adapter(1)
    classifier.engine.load_adapter(adapter)
    good = ask("r", "a b", (adapter, 1.0))
    with pytest.raises((InvalidRequest, PromptTooLong), match=message):
        classifier.submit(replace(good, **change), lambda _: None)
    classifier.submit(good, lambda _: None)
    with pytest.raises(InvalidRequest, match="expected an unused id"):
        classifier.submit(good, lambda _: None)


def test_both_end_alike(kind: Kind) -> None:
    """Cancelled: nothing comes. Too late, or stopped: an error comes, once."""
    classifier = make_classifier(kind)
    adapter = kind.adapter(2)
    classifier.engine.load_adapter(adapter)
    outcomes: dict[str, list[object]] = {"cancelled": [], "late": [], "good": []}
    done = threading.Event()

    def sink_of(name: str) -> Callable[[Classification | ReftError], None]:
        def sink(outcome: Classification | ReftError) -> None:
            outcomes[name].append(outcome)
            if name == "good":
                done.set()

        return sink

    for name in outcomes:
        deadline = 1e-6 if name == "late" else None
        request = ask(name, "a b", (adapter, 1.0), deadline_s=deadline)
        classifier.submit(request, sink_of(name))
    classifier.cancel("cancelled")
    classifier.cancel("unknown")
    classifier.engine.start()
    assert done.wait(WAIT_S)
    assert classifier.engine.drain(WAIT_S)
    with pytest.raises(EngineUnavailable):
        classifier.submit(ask("r", "a", (adapter, 1.0)), lambda _: None)
    classifier.engine.stop()
    assert [len(found) for found in outcomes.values()] == [0, 1, 1]
    assert isinstance(outcomes["late"][0], DeadlineExceeded)
    assert isinstance(outcomes["good"][0], Classification)
    assert not classifier.engine.healthy

    stopped = make_classifier(kind)
    stopped.engine.load_adapter(adapter)
    found: list[object] = []
    stopped.submit(ask("r", "a", (adapter, 1.0)), found.append)
    stopped.engine.stop()
    assert [type(outcome) for outcome in found] == [EngineUnavailable]


def test_both_bound_their_queue(kind: Kind) -> None:
    """A text of a causal model takes a place for each label, here two; one that finds too few
    leaves none behind.
    """
    classifier = make_classifier(kind, max_waiting=3, max_num_seqs=1)
    adapter = kind.adapter(0)
    classifier.engine.load_adapter(adapter)
    requests = [ask(f"r{place}", "a b", (adapter, 1.0)) for place in range(5)]
    num_accepted = 4 if isinstance(classifier, EncoderClassifier) else 2
    for request in requests[:num_accepted]:
        classifier.submit(request, lambda _: None)
    with pytest.raises(EngineOverloaded):
        classifier.submit(requests[num_accepted], lambda _: None)
    classifier.engine.start()
    assert classifier.engine.drain(WAIT_S)
    classifier.engine.stop()


def test_the_text_is_computed_once_for_all_labels() -> None:
    """Sequences that begin alike share their prompt; only its last token is each label's own."""
    classifier = make_classifier(KINDS["causal"])
    assert isinstance(classifier, LikelihoodClassifier)
    classifier.engine.start()
    text, labels = " ".join("abcdefghij" * 3), ("no", "yes", "perhaps so", "a", "b", "c", "d", "e")
    (found,) = classify(classifier, [TextRequest("r", text, labels=labels)])
    stats = classifier.engine.stats()
    classifier.engine.stop()
    length = 31
    assert found.logprobs == pytest.approx(expected_of_likelihood(text, [], labels), abs=1e-3)
    assert stats.prompt_tokens_total <= length + len(labels) - 1
    assert stats.cached_tokens_total >= (length - 1) * (len(labels) - 1)
    assert found.num_cached_tokens == 0


def test_a_base_template_is_the_models_own() -> None:
    classifier = make_classifier(KINDS["causal"])
    adapter = causal_adapter(1)
    classifier.engine.load_adapter(adapter)
    lengths = [
        classifier.submit(
            ask(f"r{plain}", "a b", (adapter, 1.0), base_template=plain), lambda _: None
        ).num_prompt_tokens
        for plain in (False, True)
    ]
    classifier.engine.stop()
    assert lengths == [5, 3]


def test_a_head_knows_its_own_labels_only() -> None:
    classifier = make_classifier(KINDS["encoder"])
    adapter = encoder_adapter(0)
    classifier.engine.load_adapter(adapter)
    with pytest.raises(InvalidRequest, match="labels: got 'maybe', expected some of no, yes"):
        classifier.submit(ask("r", "a", (adapter, 1.0), labels=("no", "maybe")), lambda _: None)
    swap = random_adapter(classifier.engine.model, method="interchange")
    classifier.engine.load_adapter(swap)
    choices = (AdapterChoice(swap.digest, source=(5,)), AdapterChoice(adapter.digest))
    with pytest.raises(InvalidRequest, match=r"source: .* none on an encoder"):
        classifier.submit(TextRequest("r", "a", choices), lambda _: None)
    prefix = random_prefix_adapter(classifier.engine.model, "embedding")
    classifier.engine.load_adapter(prefix)
    choices = (AdapterChoice(prefix.digest), AdapterChoice(adapter.digest))
    with pytest.raises(InvalidRequest, match="none with a prefix"):
        classifier.submit(TextRequest("r", "a", choices), lambda _: None)


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The words' tokenizer, whose pairs are told apart by segments."""
    tokenizer = Tokenizer.from_str(word_tokenizer().backend_tokenizer.to_str())
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_a_pair_of_texts_and_a_number_for_an_answer() -> None:
    engine = EncoderEngine(loaded("bert"), EngineConfig(max_model_len=40))
    classifier = classifier_on(engine, pair_tokenizer())
    graded = decode_adapter(
        random_classifier_bytes(loaded("bert").description, 1, HeadSpec(), positions="f2")
    )
    for adapter in (graded, encoder_adapter(0)):
        engine.load_adapter(adapter)
    with pytest.raises(InvalidRequest, match=r"labels: .* none: the head says a number"):
        classifier.submit(ask("r", "a", (graded, 1.0), labels=("no", "yes")), lambda _: None)
    engine.start()
    value, other, labelled = classify(
        classifier,
        [
            ask("value", "a b", (graded, 1.0), text_pair="c d e"),
            ask("other", "a b c d e", (graded, 1.0)),
            ask("labelled", "a b", (encoder_adapter(0), 1.0), text_pair="c d e"),
        ],
    )
    engine.stop()
    tokens = [3, *word_tokenizer().convert_tokens_to_ids(list("ab")), 3]
    tokens += word_tokenizer().convert_tokens_to_ids(list("cde"))
    segments = [0, 0, 0, 1, 1, 1, 1]
    expected = reference_classify(encoder("bert"), tokens, [(graded, 1.0)], segments)
    assert value.value == pytest.approx(expected.item(), abs=1e-4)
    assert (value.labels, value.probs, value.best) == ((), (), None)
    assert other.value != pytest.approx(expected.item(), abs=1e-4)
    logits = reference_classify(encoder("bert"), tokens, [(encoder_adapter(0), 1.0)], segments)
    assert labelled.logprobs == pytest.approx(logits.log_softmax(-1).tolist(), abs=1e-4)
    assert labelled.value is None


def test_a_causal_model_reads_no_pairs() -> None:
    classifier = make_classifier(KINDS["causal"])
    with pytest.raises(InvalidRequest, match="text_pair: got 'b', expected none"):
        classifier.submit(TextRequest("r", "a", labels=("no", "yes"), text_pair="b"), print)
    classifier.engine.stop()


def test_a_text_that_fails_in_an_encoder_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = make_classifier(KINDS["encoder"])
    assert isinstance(classifier, EncoderClassifier)
    adapter = encoder_adapter(0)
    classifier.engine.load_adapter(adapter)
    heads = classifier.engine._heads
    logits = heads.logits

    def fragile(requests):
        if any(len(request.tokens) == 3 for request in requests):
            raise RuntimeError("broken kernel")
        return logits(requests)

    monkeypatch.setattr(heads, "logits", fragile)
    outcomes: dict[str, Classification | ReftError] = {}
    for text in ("a", "a b", "a b c"):
        classifier.submit(
            ask(text, text, (adapter, 1.0)), lambda found, text=text: outcomes.update({text: found})
        )
    classifier.engine.start()
    assert classifier.engine.drain(WAIT_S)
    classifier.engine.stop()
    failed = outcomes.pop("a b")
    assert isinstance(failed, RequestFailed)
    assert "broken kernel" in str(failed)
    assert all(isinstance(outcome, Classification) for outcome in outcomes.values())
    assert classifier.engine.stats().prompt_tokens_total == 2 + 4


def test_a_label_that_fails_ends_the_text_and_its_other_labels() -> None:
    classifier = make_classifier(KINDS["causal"], max_num_seqs=1)
    adapter = causal_adapter(0)
    classifier.engine.load_adapter(adapter)
    found: list[object] = []
    classifier.submit(ask("r", "a b", (adapter, 1.0)), found.append)
    classifier.engine.cancel("r/1")  # one of its requests, behind its back
    classifier.engine.start()
    assert classifier.engine.drain(WAIT_S)
    classifier.engine.stop()
    assert [type(outcome) for outcome in found] == [EngineUnavailable]
