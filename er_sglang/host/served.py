"""Our worker as the hooks see it, so that they need not import it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from er_sglang.drafting.updates import Freshness
from er_sglang.host.releases import adapter


class ServedWorker(adapter("updates").TakesUpdates, adapter("spec_worker").SpecWorker):
    """What a hook may ask of the SELF_QUANT worker of its scheduler.

    freshness: told of everything that happens to the policy's weights.
    """

    freshness: Freshness

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything launched on the device, a step that overlaps the scheduler included."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a step was launched since the server last ran idle."""

    @abstractmethod
    def idle(self) -> None:
        """No request is left, running or waiting."""

    @abstractmethod
    def change_settings(self, server_args: Mapping[str, object]) -> bool:
        """Obey a request to change settings while serving; False if it is refused. Every rank gets the same request
        before the same step."""

    @abstractmethod
    def snapshot(self) -> dict:
        """State for /server_info."""
