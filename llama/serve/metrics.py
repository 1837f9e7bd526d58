"""What /metrics shows, in Prometheus's text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NEXT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms that may be used from any thread. Their number does not depend on what clients send."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "llama_requests", "Requests, by endpoint and HTTP status.", ["endpoint", "status"], registry=self.registry
        )
        self.prompt_tokens = self._counter("llama_prompt_tokens", "Tokens of prompts.")
        self.reused_tokens = self._counter(
            "llama_prompt_tokens_reused", "Tokens of prompts that were not computed, because the cache had them."
        )
        self.generated_tokens = self._counter("llama_generated_tokens", "Generated tokens.")
        self.cancelled = self._counter("llama_requests_cancelled", "Requests whose client went away.")
        self.first_token = Histogram(
            "llama_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.next_token = Histogram(
            "llama_time_between_tokens_seconds",
            "Between two steps of a request.",
            buckets=NEXT_TOKEN_BUCKETS,
            registry=self.registry,
        )

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read when the metrics are."""
        Gauge(name, help, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, registry=self.registry)
