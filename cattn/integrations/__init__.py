"""cattn under other libraries. `import cattn` imports nothing of this, and each module its library only when used.

    dask           attention over dask arrays, on one machine or many
    huggingface    register(): attn_implementation="cattn" of transformers
    onnx           new_ops(): ONNX's Attention and RotaryEmbedding, for onnx's reference evaluator
    torch          enable(): under torch.nn.functional.scaled_dot_product_attention; attention(): tensors, every option
"""
