"""Policy updates: calls for the policy, and for a draft worker beside it. Nothing marks the last one."""

SEAMS = """
managers.tp_worker:BaseTpWorker.update_weights_from_tensor self recv_req
"""

HOOKS = {}


class TakesUpdates:
    """A draft worker's part in an update. SGLang hands it tensors instead of the policy."""

    def update_weights_from_disk(self, recv_req) -> tuple[bool, str]:
        return True, "the drafter follows the policy's weights in memory"

    def update_weights_from_ipc(self, recv_req) -> tuple[bool, str]:
        return True, "the drafter follows the policy's weights in memory"

    def update_weights_from_tensor(self, recv_req) -> tuple[bool, str]:
        return self.target_worker.update_weights_from_tensor(recv_req)
