"""Beside the stations: our metrics once more under the names that dashboards made for vLLM ask for (`vllm_metrics`).

Nothing is counted twice: at a scrape, families of ours are copied under the other name, with the labels `model_name`
and, of a replica's, `engine`. `finished_reason` counts what clients got, so cached answers, too.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

NAMES = {
    "shoal_num_requests_running": ("vllm:num_requests_running",),
    "shoal_num_requests_waiting": ("vllm:num_requests_waiting",),
    "shoal_kv_cache_usage_perc": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "shoal_num_preemptions": ("vllm:num_preemptions",),
    "shoal_prompt_tokens": ("vllm:prompt_tokens",),
    "shoal_generation_tokens": ("vllm:generation_tokens",),
    "shoal_prefix_cache_queries": ("vllm:prefix_cache_queries",),
    "shoal_prefix_cache_hits": ("vllm:prefix_cache_hits",),
    "shoal_spec_drafts": ("vllm:spec_decode_num_drafts",),
    "shoal_spec_drafted_tokens": ("vllm:spec_decode_num_draft_tokens",),
    "shoal_spec_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens",),
    "shoal_time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "shoal_inter_token_latency_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "shoal_e2e_request_latency_seconds": ("vllm:e2e_request_latency_seconds",),
    "shoal_router_queue_seconds": ("vllm:request_queue_time_seconds",),
    "shoal_request_prompt_tokens": ("vllm:request_prompt_tokens",),
    "shoal_request_generation_tokens": ("vllm:request_generation_tokens",),
    "shoal_choices_finished": ("vllm:request_success",),
}


class OurNames(Collector):
    """The families of `source`, without the moments at which their series were created."""

    def __init__(self, source: Collector) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class BothNames(Collector):
    """The families of `source`, and each that vLLM has under its name, too. `model`: the label `model_name`."""

    def __init__(self, source: Collector, *, model: str) -> None:
        self._source = source
        self._model = model

    def collect(self) -> Iterator[Metric]:
        for family in self._source.collect():
            yield family
            for name in NAMES.get(family.name, ()):
                yield self._renamed(family, name)

    def _renamed(self, family: Metric, name: str) -> Metric:
        copy = Metric(name, family.documentation, family.type)
        copy.samples = [
            sample._replace(name=name + sample.name.removeprefix(family.name), labels=self._labels(sample))
            for sample in family.samples
        ]
        return copy

    def _labels(self, sample: Sample) -> dict[str, str]:
        labels = {"engine" if name == "replica" else name: value for name, value in sample.labels.items()}
        return {"model_name": self._model} | labels
