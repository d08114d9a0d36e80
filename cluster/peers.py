"""How an ingress reaches the others of its deployment: through Serve, and only as often as metrics are scraped."""

from __future__ import annotations

import logging

from ray import serve

logger = logging.getLogger("shoal.cluster")

ANSWER_S = 1.0


class ServePeers:
    """A `Peers` of `router/ingress.py`: all ingresses of the deployment that this process is one of.

    is_alone: there will never be another.
    """

    def __init__(self, *, is_alone: bool) -> None:
        self._is_alone = is_alone

    async def __call__(self, telling: bytes) -> list[bytes]:
        """What they tell; this process is asked with them. Serve waits for all of them or none: where one hangs nothing
        is heard, and what they told last goes on to count."""
        if self._is_alone:
            return []
        try:
            here = serve.get_replica_context()
            answers = await (
                serve.get_deployment_handle(here.deployment, here.app_name)
                .broadcast("exchange", telling)
                .results_async(timeout_s=ANSWER_S, return_exceptions=True)
            )
        except Exception as error:  # noqa: BLE001 - whatever Serve lacks, what is known here is told
            logger.debug("the other ingresses were not asked: %s", type(error).__name__)
            return []
        return [answer for answer in answers if isinstance(answer, bytes)]
