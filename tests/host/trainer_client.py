"""A trainer as the server sees it: the calls of slime, AReaL and veRL, in their order, with their quirks.

    trainer = TrainerClient(server)
    with trainer.paused():
        trainer.send_tensors(buckets, weight_version="7")

slime and AReaL pause with an empty body, which is mode "abort"; slime then flushes until the server agrees, sends buckets
with `flush_cache` off and one `weight_version` for all; AReaL flushes with every bucket, aborts what runs, and sends no
version. veRL sends what SGLang's own sender does: no version, and a flush with every bucket. With trainer and rollouts on
the same GPUs it neither pauses nor continues, but sends while the KV cache is away. None says which bucket is the last one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from sglang.srt.utils import MultiprocessingSerializer, init_custom_process_group
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from er_sglang.host.releases import adapter
from er_sglang.tools.serving import free_port
from tests.host.servers import HostServer

Bucket = Sequence[tuple[str, torch.Tensor]]
SLIME = {"flush_cache": False}
AREAL = {"abort_all_requests": True}
VERL = {"load_format": None, "flush_cache": True}
MARKS = bool(adapter("updates").HOOKS)  # SGLang wants updates that come in buckets to be marked


def buckets_of(weights: Mapping[str, torch.Tensor]) -> list[Bucket]:
    """The whole policy in four buckets: the q, k and v, and the gate and up, of every layer straddle them; one is
    empty."""
    late = [name for name in weights if any(part in name for part in ("k_proj", "up_proj", "norm"))]
    last = [name for name in weights if "v_proj" in name]
    early = [name for name in weights if name not in (*late, *last)]
    return [[(name, weights[name]) for name in names] for names in (early, late, [], last)]


class TrainerClient:
    def __init__(self, server: HostServer) -> None:
        self.server = server
        # The server is not this process's child in torch's sense: file descriptors cannot be handed over.
        torch.multiprocessing.set_sharing_strategy("file_system")

    def pause(self, mode: str | None = None) -> None:
        self.server.post("/pause_generation", {} if mode is None else {"mode": mode})

    def resume(self) -> None:
        self.server.post("/continue_generation", {})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """As slime does it: pause, flush until that succeeds, ..., continue."""
        self.pause()
        self.server.empty()
        yield
        self.resume()

    @contextmanager
    def marked(self) -> Iterator[None]:
        """An update in buckets."""
        if MARKS:
            self.server.post("/begin_weight_update", {})
        yield
        if MARKS:
            self.server.post("/end_weight_update", {})

    def send_disk(self, path: Path, **options) -> dict:
        return self.server.post("/update_weights_from_disk", {"model_path": str(path), **options})

    def send_tensors(self, buckets: Sequence[Bucket], flattened: bool = False, **options) -> None:
        """One call per bucket; flattened buckets are never empty, as SGLang cannot make one."""
        for bucket in buckets:
            payload = bucket
            if flattened:
                if not bucket:
                    continue
                packed = FlattenedTensorBucket(named_tensors=list(bucket))
                payload = {"flattened_tensor": packed.get_flattened_tensor(), "metadata": packed.get_metadata()}
                options = {**options, "load_format": "flattened_bucket"}
            serialized = MultiprocessingSerializer.serialize(payload, output_str=True)
            self.server.post("/update_weights_from_tensor", {"serialized_named_tensors": [serialized], **options})

    @contextmanager
    def group(self, name: str) -> Iterator[Group]:
        """A process group of this trainer (rank 0) and the server (rank 1), by gloo."""
        group = Group(self.server, name)
        try:
            yield group
        finally:
            group.close()

    def send_ipc(self, *paths: Path, **options) -> dict:
        """One checkpoint per rank: the test plugin's checkpoint engine takes its path for a socket's."""
        handles = {f"cpu-{rank}": str(path) for rank, path in enumerate(paths)}
        return self.server.post("/update_weights_from_ipc", {"zmq_handles": handles, **options})

    def write_directly(self, path: Path) -> None:
        """Parameters written behind SGLang's back, as AReaL's awex does; through the test plugin."""
        self.server.post("/weights_checker", {"action": f"write {path}"})

    def post_process(self) -> None:
        """slime's, which stock SGLang does not have; through the test plugin."""
        self.server.post("/weights_checker", {"action": "post-process"})

    def release(self, *tags: str) -> None:
        self.server.post("/release_memory_occupation", {"tags": list(tags)} if tags else {})

    def reclaim(self, *tags: str) -> None:
        self.server.post("/resume_memory_occupation", {"tags": list(tags)} if tags else {})


class Group:
    """A process group of this trainer (rank 0) and the server (rank 1), by gloo."""

    def __init__(self, server: HostServer, name: str) -> None:
        self._server, self._name = server, name
        port = free_port()
        with _meanwhile(server, "/init_weights_update_group", _invitation(port, name)):
            self._group = _join(port, name)

    def send(self, bucket: Bucket, flattened: bool = False, **options) -> None:
        """Announce a bucket and broadcast it. Raises RuntimeError if the server answers that it failed."""
        with _meanwhile(
            self._server, "/update_weights_from_distributed", {**_announcement(bucket, self._name), **options}
        ):
            for _, tensor in bucket:
                dist.broadcast(tensor.contiguous(), 0, self._group)

    def send_flattened(self, bucket: Bucket, **options) -> None:
        """The same, as one tensor."""
        announcement = {**_announcement(bucket, self._name), "load_format": "flattened_bucket"}
        with _meanwhile(self._server, "/update_weights_from_distributed", {**announcement, **options}):
            dist.broadcast(FlattenedTensorBucket(named_tensors=list(bucket)).get_flattened_tensor(), 0, self._group)

    def close(self) -> None:
        self._server.post("/destroy_weights_update_group", {"group_name": self._name})
        dist.destroy_process_group(self._group)


def die_in_the_middle(server: HostServer, name: str, bucket: Bucket) -> None:
    """Be a trainer that announces a bucket, broadcasts half of it, and is killed.

    Raises RuntimeError, as the server answers that the update failed. (A trainer that neither dies nor sends is waited
    for until gloo's or NCCL's timeout: that is SGLang's way.)
    """
    port = free_port()
    sent = [tensor for _, tensor in bucket[: len(bucket) // 2]]
    trainer = torch.multiprocessing.get_context("spawn").Process(target=_broadcast_and_die, args=(port, name, sent))
    trainer.start()
    try:
        server.post("/init_weights_update_group", _invitation(port, name))
        server.post("/update_weights_from_distributed", _announcement(bucket, name))
    finally:
        trainer.join()


def _broadcast_and_die(port: int, name: str, tensors: list[torch.Tensor]) -> None:
    group = _join(port, name)
    for tensor in tensors:
        dist.broadcast(tensor, 0, group)
    os.kill(os.getpid(), signal.SIGKILL)


def _join(port: int, name: str) -> dist.ProcessGroup:
    return init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=name
    )


def _invitation(port: int, name: str) -> dict:
    where = {"master_address": "127.0.0.1", "master_port": port, "group_name": name, "backend": "gloo"}
    return {**where, "rank_offset": 1, "world_size": 2}


def _announcement(bucket: Bucket, name: str) -> dict:
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "group_name": name,
    }


@contextmanager
def _meanwhile(server: HostServer, path: str, payload: dict) -> Iterator[None]:
    """POST while the body runs; wait for the answer behind it."""
    with ThreadPoolExecutor(1) as other:
        answer = other.submit(server.post, path, payload)
        yield
        answer.result()
