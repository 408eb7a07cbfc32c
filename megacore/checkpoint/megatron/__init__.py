"""Checkpoints of Megatron-LM and Megatron-Core as sources of weights.

| what     | read                                                                                                 |
|----------|------------------------------------------------------------------------------------------------------|
| formats  | torch (legacy `mp_rank_XX` files), torch_dist                                                        |
| layouts  | tensor, pipeline and virtual pipeline stages of any sizes; any dp                                    |
| names    | Megatron-Core's, with norms fused or not; those of `language_model.encoder`, before Megatron-Core    |
| models   | GPT and Llama: LayerNorm or RMSNorm; gelu, squared relu or swiglu; MHA, GQA, MQA; biases; learned    |
|          | positions or RoPE (partial, Llama 3's scaling, linear interpolation); norms of queries and keys      |
|          | (RMSNorm); sliding windows; tied or not; vocabularies that were padded                               |

Not supported, and refused by name: mixtures of experts, multi-latent attention, multi-token prediction, hybrid and
Mamba models, T5, BERT and vision models, heterogeneous layers, YaRN and interleaved RoPE, zero-centred LayerNorm, quick
geglu, quantised weights (fp8, fp4); the formats zarr, fsdp_dtensor and torch_dcp; files of PyTorch before 1.6; the row
orders of checkpoint_version below 2. Left out without a word, since weights alone are imported: optimizer state, random
states, `_extra_state` (scales of fp8), the tokenizer (which Megatron-LM keeps elsewhere).

These files have no hashes: what is missing or cut short is noticed, but not a change inside of a tensor's numbers.
"""
