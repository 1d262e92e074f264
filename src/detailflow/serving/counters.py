"""What the service counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one service, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "detailflow_requests",
            "Requests by method, path and status.",
            ("method", "path", "status"),
            registry=registry,
        )
        self.latency = Histogram(
            "detailflow_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_progress = Gauge(
            "detailflow_requests_in_progress", "Requests without an answer yet.", registry=registry
        )
        self.queued = Gauge("detailflow_queue_images", "Images that wait for a batch.", registry=registry)
        self.waited = Histogram(
            "detailflow_queue_seconds",
            "Seconds that an image waited for its batch.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "detailflow_batch_images", "Images computed at once.", buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "detailflow_batch_seconds", "Seconds that a batch took.", buckets=_SECONDS, registry=registry
        )
        self.images = Counter("detailflow_images", "Images that were finished.", registry=registry)
        self.cancelled = Counter(
            "detailflow_images_cancelled",
            "Images given up, as their client left or their time was over.",
            registry=registry,
        )

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
