"""Test-only stand-in for checkpoint-engine, whose handles of CUDA memory a CPU cannot make: a handle is a checkpoint's
path."""


def update_weights_from_ipc(zmq_ctx, zmq_handle, device_id, run, post_hook):
    """Give ``run`` the checkpoint in two portions, as the real one does with each full buffer."""
    import torch
    from transformers import AutoModelForCausalLM

    weights = list(AutoModelForCausalLM.from_pretrained(zmq_handle, dtype=torch.float32).state_dict().items())
    run(weights[::2])
    run(weights[1::2])
