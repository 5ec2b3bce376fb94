"""Who is asked what when prefill and decode are apart, on workers that pretend."""

from __future__ import annotations

from typing import Any

from benchmarks.vllm_disaggregation import hand_over, requests_of


class FakeWorker:
    """Answers with the prompt's length, which its files may have told it, and the adapter."""

    def __init__(self, files: dict[str, dict[str, Any]]) -> None:
        self._files = files

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        assert op == "answer"
        count = arguments["output_tokens"]
        return {"tokens": [self._answer(request, count) for request in arguments["requests"]]}

    def _answer(self, request: dict[str, Any], count: int) -> list[int]:
        handed = request.get("kv", {})
        if "write" in handed:
            self._files[handed["write"]] = request
        source = self._files[handed["read"]] if "read" in handed else request
        # Whoever has to compute a prompt's last token again needs its adapter.
        is_again = "read" in handed and len(request["prompt"]) == handed["tokens"]
        adapter = (request if is_again else source)["adapter"]
        adapter = 99 if adapter is None else adapter
        return [10 * len(source["prompt"]) + adapter] * count


def test_the_first_token_makes_the_difference() -> None:
    requests = requests_of([[1] * length for length in range(3, 12)])
    files: dict[str, dict[str, Any]] = {}
    found = hand_over(FakeWorker(files), FakeWorker(files), requests, 4)  # type: ignore[arg-type]
    assert all(len(answer) == 4 for answer in found["alone"])
    assert found["with_token"] == found["with_plugin"] == found["alone"]
    same = [a == b for a, b in zip(found["with_prompt"], found["alone"], strict=True)]
    assert same == [request["adapter"] is None for request in requests]
    assert sum(same) == 1
