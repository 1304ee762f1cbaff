"""Test-only SGLang plugin: torch_native attention for all requests at once.

SGLang loops over them, which takes most of the time of a server that samples for thousands.
"""


def activate() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    backend = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend."
    HookRegistry.register(f"{backend}_run_sdpa_forward_decode", _decode, HookType.REPLACE)
    HookRegistry.register(f"{backend}_run_sdpa_forward_extend", _extend, HookType.AROUND)


def _decode(
    backend, query_BHD, output_BHD, k_cache, v_cache, req_to_token, rows_B, seq_lens_B,
    encoder_lens=None, scaling=None, enable_gqa=False, causal=False, **_,
):  # fmt: skip
    output_BHD[:] = _attend(
        query_BHD.unsqueeze(1), k_cache, v_cache, req_to_token, rows_B, seq_lens_B, scaling, enable_gqa
    ).squeeze(1)
    return output_BHD


def _extend(
    original, backend, query, output, k_cache, v_cache, req_to_token, rows_B, seq_lens_B, prefix_lens_B, new_lens_B,
    encoder_lens=None, scaling=None, enable_gqa=False, causal=False, **more,
):  # fmt: skip
    width = int(new_lens_B[0])
    if not causal or (new_lens_B != width).any():
        return original(
            backend, query, output, k_cache, v_cache, req_to_token, rows_B, seq_lens_B, prefix_lens_B, new_lens_B,
            encoder_lens, scaling, enable_gqa, causal, **more,
        )  # fmt: skip
    query_BNHD = query.view(len(rows_B), width, *query.shape[1:])
    output.view(query_BNHD.shape)[:] = _attend(
        query_BNHD, k_cache, v_cache, req_to_token, rows_B, seq_lens_B, scaling, enable_gqa
    )
    return output


def _attend(query_BNHD, k_cache, v_cache, req_to_token, rows_B, seq_lens_B, scaling, enable_gqa):
    """Of the last N tokens of each sequence, causally."""
    import torch

    width = query_BNHD.shape[1]
    position_T = torch.arange(int(seq_lens_B.max()))
    last_BN = seq_lens_B.view(-1, 1) - width + torch.arange(width)
    visible_BNT = position_T <= last_BN.unsqueeze(2)
    slots_BT = req_to_token[rows_B, : len(position_T)]
    # Behind a sequence: its first token, since what lies there may be NaN, of which no mask gets rid.
    slots_BT = torch.where(position_T < seq_lens_B.view(-1, 1), slots_BT, slots_BT[:, :1])
    batch, _, heads, dim = query_BNHD.shape
    groups = k_cache.shape[1]
    query_BGMD = query_BNHD.view(batch, width, groups, -1, dim).permute(0, 2, 1, 3, 4).reshape(batch, groups, -1, dim)
    output_BGMD = torch.nn.functional.scaled_dot_product_attention(
        query_BGMD,
        k_cache[slots_BT].transpose(1, 2),
        v_cache[slots_BT].transpose(1, 2),
        attn_mask=visible_BNT.repeat_interleave(heads // groups, 1).unsqueeze(1),
        scale=scaling,
    )
    return output_BGMD.view(batch, groups, width, -1, dim).permute(0, 2, 1, 3, 4).reshape(query_BNHD.shape)
