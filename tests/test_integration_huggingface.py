"""Models of transformers with attention by cattn, tiny and of random weights: results and gradients beside those of
"eager", masks that are said by numbers, caches, weights, dropout, errors."""

import itertools
import subprocess
import sys
import types

import numpy as np
import pytest

from cattn.integrations import huggingface as integration

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import masking_utils  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of transformers
integration.register()

VOCABULARY, WIDTH, HEADS, WINDOW = 60, 32, 4, 5
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": HEADS, "max_position_embeddings": 64, **SPECIAL}
DECODER = SIZES | {"num_key_value_heads": 2}
TWO_STACKS = SPECIAL | {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "decoder_start_token_id": 1}
PICTURES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS,
            "image_size": 16, "patch_size": 4}

# {name: (the class's name, configuration)}, of models that tokens go into, and probabilities of tokens come from.
ENCODERS = {
    "bert": ("BertForMaskedLM", SIZES),
    "roberta": ("RobertaForMaskedLM", SIZES),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": VOCABULARY, "dim": WIDTH, "hidden_dim": 48, "n_layers": 2,
                                             "n_heads": HEADS, "max_position_embeddings": 64}),
    "modernbert": ("ModernBertForMaskedLM", SIZES | {"local_attention": WINDOW + 1, "global_attn_every_n_layers": 2,
                                                     "cls_token_id": 1, "sep_token_id": 2}),
}
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", SPECIAL | {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS,
                                           "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "llama": ("LlamaForCausalLM", DECODER),
    "mistral": ("MistralForCausalLM", DECODER | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", DECODER | {"use_sliding_window": True, "sliding_window": WINDOW,
                                             "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", DECODER | {"head_dim": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3ForCausalLM", DECODER | {"head_dim": 8, "sliding_window": WINDOW,
                                               "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("GptOssForCausalLM", DECODER | {"head_dim": 8, "sliding_window": WINDOW, "num_local_experts": 4,
                                                "num_experts_per_tok": 2}),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "llama4": ("Llama4ForCausalLM", DECODER | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
                                               "attention_chunk_size": WINDOW}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DECODER | {
        "num_key_value_heads": HEADS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 6, "first_k_dense_replace": 1}),
}
ENCODER_DECODERS = {
    "bart": ("BartForConditionalGeneration", TWO_STACKS),
    "t5": ("T5ForConditionalGeneration", SPECIAL | {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 1}),   # its own would be relu, with a jump
    "whisper": ("WhisperForConditionalGeneration", TWO_STACKS | {"num_mel_bins": 8, "max_source_positions": 15,
                                                                 "max_target_positions": 30}),
}
VISION = {
    "vit": ("ViTModel", PICTURES),
    "dinov2": ("Dinov2Model", PICTURES),
    "clip": ("CLIPModel", {"text_config": SIZES, "vision_config": PICTURES, "projection_dim": 16}),
}
ALL = ENCODERS | DECODERS | ENCODER_DECODERS | VISION
MADE = {"llama4": 1}    # masks that are made for each forward pass: of chunks


def config_of(name):
    class_name, options = ALL[name]
    return getattr(transformers, class_name).config_class(**options)


def model_of(name, dtype=torch.float32, **options):
    """A model in eval mode. Its weights are larger than initial ones, for attention that prefers some keys."""
    config = config_of(name)
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = getattr(transformers, ALL[name][0])(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1 / WIDTH**0.5)
                if name == "t5" and key.endswith("Attention.q.weight"):     # T5 has the scale of scores here
                    parameter /= 8**0.5
            else:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1))
    return model.to(dtype)


def attention_by_eager(module, query, key, value, attention_mask, **options):
    """What the model's own module calls attention."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, attention_mask, **options)


def mask_for_float64(*, dtype, **options):
    """Some models cast scores of float64 to float32: the lowest number of float64 would be minus infinity there, and a
    row of such numbers NaN."""
    return masking_utils.eager_mask(dtype=torch.float32, **options)


transformers.AttentionInterface.register("exact", attention_by_eager)
transformers.AttentionMaskInterface.register("exact", mask_for_float64)

PADDINGS = {"none": None, "right": [(0, 12), (0, 7), (0, 10)], "left": [(0, 12), (5, 12), (2, 12)]}


def padding_mask(padding, length=12):
    """(3, length) of 1 where a token is, scaled from 12 to `length`."""
    mask = torch.ones(3, length, dtype=torch.long)
    if padding == "gaps":
        mask[1, 3:5] = mask[2, 0] = mask[2, 6] = mask[2, -1] = 0
    elif padding != "none":
        for row, (start, stop) in zip(mask, PADDINGS[padding], strict=True):
            row[: start * length // 12] = row[stop * length // 12:] = 0
    return mask


def inputs_of(name, padding):
    """(arguments of a call, {name of an output: which of its rows belong to tokens})."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY - 1, (3, 12), generator=generator)
    mask = padding_mask(padding)
    given = {} if padding == "none" else {"attention_mask": mask}
    if name in ENCODER_DECODERS:
        of_decoder = padding_mask(padding, 7)
        inputs = {"decoder_input_ids": tokens[:, :7]}
        if padding != "none":
            inputs["decoder_attention_mask"] = of_decoder
        if name == "whisper":
            inputs["input_features"] = torch.randn(3, 8, 30, generator=generator)
        else:
            inputs |= {"input_ids": tokens.flip(1), **given}
        return inputs, {"logits": of_decoder[:, :, None]}
    if name in VISION:
        inputs = {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
        if name != "clip":
            return inputs, {"last_hidden_state": 1}
        tokens[:, 5] = VOCABULARY - 1       # the last token of a text has the highest number
        return inputs | {"input_ids": tokens, **given}, {"text_embeds": 1, "image_embeds": 1}
    return {"input_ids": tokens, **given}, {"logits": mask[:, :, None]}


def cast(inputs, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def results_of(model, implementation, inputs, rows):
    """{output: its rows of tokens} and {parameter: gradient}, of a weighted sum of the outputs."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    outputs = model(**cast(inputs, model.dtype))
    results = {name: outputs[name] * weight for name, weight in rows.items()}
    generator = torch.Generator().manual_seed(2)
    total = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in results.values())
    total.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: x.detach() for name, x in results.items()}, gradients


def layers_of(model):
    """How often a forward pass attends: once in each layer, in decoders of two stacks twice."""
    return sum("attention" in type(module).__name__.lower() and hasattr(module, "is_causal")
               for module in model.modules())


@pytest.fixture
def seen(monkeypatch):
    """The arguments of each call of the kernel, in `packed` of those for packed sequences, and in `masks` those of each
    mask that was made."""
    calls = types.SimpleNamespace(options=[], packed=[], masks=[])

    def attention(query, key, value, attn_mask=None, **options):
        calls.options.append({"attn_mask": attn_mask, "kv_heads": key.shape[1], **options})
        return own(query, key, value, attn_mask, **options)

    def varlen_attention(query, key, value, *cu_seqlens, **options):
        calls.packed.append({"cu_seqlens": cu_seqlens, **options})
        return own_packed(query, key, value, *cu_seqlens, **options)

    def sdpa_mask(**options):
        calls.masks.append(options)
        return own_mask(**options)

    own, own_packed, own_mask = integration.attention, integration.varlen_attention, masking_utils.sdpa_mask
    monkeypatch.setattr(integration, "attention", attention)
    monkeypatch.setattr(integration, "varlen_attention", varlen_attention)
    monkeypatch.setattr(masking_utils, "sdpa_mask", sdpa_mask)
    return calls


# Results.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "padding"), [
    (name, padding) for name in ALL for padding in (*PADDINGS, "gaps")
    if padding == "none" or name not in ("vit", "dinov2")])
def test_results_and_gradients(name, padding, dtype, seen):
    """err(cattn) <= 2 err(eager) + 4 eps scale, as in tolerance.py: both beside eager attention in a model of float64
    with the same weights, `scale` the largest number of the result, or of the gradient. That of a bias of keys is 0, as
    the softmax does not see what all scores of a query share, and has the scale of the others."""
    inputs, rows = inputs_of(name, padding)
    inputs = cast(inputs, dtype)
    model = model_of(name, dtype)
    model.config._experts_implementation = "eager"      # the one of float64 too
    exact = results_of(model_of(name, dtype, _experts_implementation="eager").double(), "exact", inputs, rows)
    plain = results_of(model, "eager", inputs, rows)
    seen.masks.clear()
    results = results_of(model, "cattn", inputs, rows)
    assert len(seen.options) == layers_of(model)
    assert len(seen.masks) == MADE.get(name, 0)
    eps = torch.finfo(dtype).eps
    for of_cattn, of_eager, right in zip(results, plain, exact, strict=True):
        assert of_cattn.keys() == of_eager.keys() == right.keys()
        largest = max(x.abs().max() for x in right.values())
        for key, x in right.items():
            assert of_cattn[key].dtype == dtype
            error, error_of_eager = ((result[key].double() - x).abs().max() for result in (of_cattn, of_eager))
            scale = x.abs().max()
            assert error_of_eager <= 30 * eps * largest, f"{key}: this is not the same model in float64"
            assert error <= 2 * error_of_eager + 4 * eps * (scale if scale > 1e-6 * largest else largest), key


# Masks.


CAUSAL = {"is_causal": True, "q_offset": 0}
WINDOWED = CAUSAL | {"window": (WINDOW - 1, None)}


@pytest.mark.parametrize(("name", "layers"), [
    ("bert", [{"q_offset": 0}] * 2),
    ("modernbert", [{"q_offset": 0}, {"q_offset": 0, "window": (WINDOW // 2 + 1,) * 2}]),
    ("llama", [CAUSAL] * 2),
    ("mistral", [WINDOWED] * 2),
    ("qwen2", [CAUSAL, WINDOWED]),
    ("gemma2", [WINDOWED, CAUSAL]),
    ("gpt_oss", [WINDOWED, CAUSAL]),
])
def test_what_is_said_by_numbers(name, layers, seen):
    """No mask is made, nor are heads repeated, where lengths and windows say it all."""
    model = model_of(name)
    model.set_attn_implementation("cattn")
    starts, stops = ([row[i] for row in PADDINGS[side]] for side, i in (("left", 0), ("right", 1)))
    for padding, lengths in (("none", {}), ("right", {"kv_lens": stops}), ("left", {"kv_starts": starts})):
        seen.options.clear()
        inputs, _ = inputs_of(name, padding)
        with torch.no_grad():
            model(**inputs)
        for options, expected in zip(seen.options, layers, strict=True):
            masks = {key: options[key] for key in ("is_causal", "window", "q_offset", "kv_lens", "kv_starts")
                     if key in options}
            if padding == "none" and expected == {"q_offset": 0}:
                expected = {"is_causal": False, "q_offset": 0}      # transformers makes no mask
            assert masks.keys() == expected.keys() | lengths.keys()
            assert all(np.array_equal(masks[key], value) for key, value in (expected | lengths).items())
            assert options["attn_mask"] is None
            assert options["kv_heads"] == getattr(model.config, "num_key_value_heads", HEADS)
    assert not seen.masks
    if name == "gemma2":
        assert [options["softcap"] for options in seen.options] == [5.0, 5.0]
    if name == "gpt_oss":
        assert all(options["sinks"].shape == (HEADS,) for options in seen.options)


def test_padding_inside_is_a_mask_of_keys(seen):
    model = model_of("mistral")
    model.set_attn_implementation("cattn")
    inputs, _ = inputs_of("mistral", "gaps")
    with torch.no_grad():
        model(**inputs)
    for options in seen.options:
        assert options["attn_mask"].shape == (3, 1, 1, 12)
        assert torch.equal(options["attn_mask"][:, 0, 0], inputs["attention_mask"].bool())
        assert options["window"] == (WINDOW - 1, None)
    assert not seen.masks


def both(model, **inputs):
    """Logits by "eager" and by "cattn"."""
    results = []
    for implementation in "eager", "cattn":
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(**inputs).logits)
    return results


def assert_same(a, b, weight=1):
    """For results of these models in float32: err(eager) is at most 10 eps of the largest number in
    test_results_and_gradients, and that of cattn twice that, and 4 eps."""
    assert ((a - b) * weight).abs().max() <= 34 * torch.finfo(torch.float32).eps * (a * weight).abs().max()


def test_masks_of_the_caller(seen):
    inputs, _ = inputs_of("llama", "none")
    visible = torch.rand((3, 1, 12, 12), generator=torch.Generator().manual_seed(0)) < 0.5
    visible |= torch.eye(12, dtype=torch.bool)
    numbers = torch.zeros(()).where(visible, torch.finfo(torch.float32).min)
    model = model_of("llama")
    eager, result = both(model, **inputs, attention_mask=numbers)
    assert_same(eager, result)
    with torch.no_grad():
        assert_same(eager, model(**inputs, attention_mask=visible).logits)
    assert [options["attn_mask"].dtype for options in seen.options] == [torch.float32] * 2 + [torch.bool] * 2


def test_positions_that_start_again(seen):
    """In more than one row of the batch: a mask."""
    inputs, _ = inputs_of("mistral", "none")
    positions = torch.tensor([[*range(7), *range(5)]] * 3)
    assert_same(*both(model_of("mistral"), **inputs, position_ids=positions, use_cache=False))
    assert [options["attn_mask"].shape for options in seen.options] == [(3, 1, 12, 12)] * 2


def flattened(sentences, name, *, lengths):
    """The arguments of a call, by transformers' own collator."""
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=lengths)
    inputs = dict(collate([{"input_ids": sentence} for sentence in sentences]))
    del inputs["labels"]
    inputs["position_ids"] += name == "roberta"     # whose first position is behind that of padding, here 0
    # Beside a cache transformers does not look whether positions start again.
    return inputs if lengths else inputs | {"use_cache": False}


SENTENCES = [[5, 9, 3, 7, 11], [8], [4, 4, 10, 6, 12, 3, 9]]


@pytest.mark.parametrize(("name", "lengths"), [
    *itertools.product(("bert", "roberta", "distilbert", "modernbert", "llama", "mistral", "gpt_oss"), [True]),
    *itertools.product(("llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3"), [False]),
])
def test_packed_sequences(name, lengths, seen):
    """Each as if it were alone, also by the gradients of all weights; no mask is made. By positions that start again,
    decoders know it, encoders by lengths."""
    model = model_of(name)
    inputs = flattened(SENTENCES, name, lengths=lengths)
    alone = []
    model.set_attn_implementation("eager")
    for sentence in SENTENCES:
        alone.append(model(torch.tensor([sentence])).logits[0])
    torch.cat(alone).square().sum().backward()
    alone_grads = [x.grad for x in model.parameters()]
    model.zero_grad()
    model.set_attn_implementation("cattn")
    seen.masks.clear()
    result = model(**inputs).logits[0]
    result.square().sum().backward()
    assert_same(torch.cat(alone), result)
    for expected, x in zip(alone_grads, model.parameters(), strict=True):
        if expected is not None:    # sums over all rows, whose roundings are as many
            assert (x.grad - expected).abs().max() <= 1e-4 * max(x.abs().max() for x in alone_grads if x is not None)
    assert len(seen.packed) == 2 and not seen.options and not seen.masks
    assert [list(options["cu_seqlens"][0]) for options in seen.packed] == [[0, 5, 6, 13]] * 2


def test_packed_bits_are_each_sentences_own():
    model = model_of("bert")
    model.set_attn_implementation("cattn")
    query, key, value = torch.randn(3, 1, 4, 13, 8)
    lengths = torch.tensor([0, 5, 6, 13])
    out, _ = integration._attention(model.bert.encoder.layer[0].attention.self, query, key, value, None,
                                    cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    for start, stop in ((0, 5), (5, 6), (6, 13)):
        part = slice(start, stop)
        alone, _ = integration._attention(model.bert.encoder.layer[0].attention.self, query[:, :, part],
                                          key[:, :, part], value[:, :, part], None)
        assert torch.equal(out[:, part], alone)


def test_weights_of_packed_sequences(seen):
    """By a mask, where positions say it; lengths alone are none."""
    model = model_of("llama")
    with torch.no_grad():
        model.set_attn_implementation("eager")
        inputs = flattened(SENTENCES, "llama", lengths=False)
        expected = model(**inputs, output_attentions=True)
        model.set_attn_implementation("cattn")
        result = model(**inputs, output_attentions=True)
    assert_same(expected.logits, result.logits)
    for one, other in zip(result.attentions, expected.attentions, strict=True):
        assert_same(other, one)
    assert not seen.packed


@pytest.mark.parametrize(("name", "change", "got"), [
    ("bert", {"output_attentions": True}, "got output_attentions$"),
    ("bert", {"attention_mask": torch.tensor([[0] * 3 + [1] * 10])}, "got a mask$"),
    ("bert", {"attention_mask": torch.tensor([[1] * 3 + [0] + [1] * 9])}, "got a mask$"),
    ("llama", {"attention_mask": torch.ones((1, 1, 13, 13), dtype=torch.bool)}, "got a mask$"),
    ("llama4", {}, "got a mask$"),      # of chunks
    ("bert", {"input_ids": torch.full((2, 13), 5), "position_ids": torch.arange(13).expand(2, 13)},
     "got a batch of 2$"),
    ("bert", {"cu_seq_lens_k": None}, "got lengths of queries or of keys alone$"),
    ("bert", {"cu_seq_lens_q": torch.tensor([0, 5, 12])}, "_q: expected an end of 13, the number of rows, got 12; "),
    ("bert", {"cu_seq_lens_k": torch.tensor([0, 5, 6, 12])}, "cu_seq_lens_k: expected an end of 13, the number of"),
    ("bert", {"cu_seq_lens_k": torch.tensor([0, 2, 6, 13])},
     r"cu_seq_lens_k: expected \[0, 5, 6, 13\], as cu_seq_lens_q, got \[0, 2, 6, 13\]$"),
    ("llama", {"use_cache": False, "cu_seq_lens_q": [0, 5, 13], "cu_seq_lens_k": [0, 5, 13]},
     r"cu_seq_lens_q: expected \[0, 5, 6, 13\], where position_ids start again, got \[0, 5, 13\]$"),
    ("llama", {"use_cache": False, "cu_seq_lens_k": None}, "got lengths of queries or of keys alone$"),
    ("bert", {"cu_seq_lens_q": []}, "cu_seq_lens_q: expected one number or more, got none; they are"),
])
def test_errors_of_packed_sequences(name, change, got):
    model = model_of(name)
    model.set_attn_implementation("cattn")
    with pytest.raises(ValueError, match=f'^attn_implementation="cattn": .*{got}'):
        model(**flattened(SENTENCES, name, lengths=True) | change)


def test_lengths_beside_positions(seen):
    """Where positions say it, lengths say it again, also where it is a mask that is asked for, because of weights."""
    model = model_of("llama")
    inputs = flattened(SENTENCES, "llama", lengths=True) | {"use_cache": False}
    assert_same(*both(model, **inputs))
    assert len(seen.packed) == 2
    assert_same(*both(model, **inputs, output_attentions=True))
    assert len(seen.packed) == 2


def test_lengths_and_a_static_cache():
    model = model_of("llama")
    model.set_attn_implementation("cattn")
    cache = transformers.StaticCache(model.config, max_cache_len=16)
    with pytest.raises(ValueError, match=r"got keys behind the last query, as in a static cache$"):
        model(torch.tensor([SENTENCES[0]]), past_key_values=cache, cu_seq_lens_q=[0, 5], cu_seq_lens_k=[0, 16])


def test_lengths_in_generation():
    model = model_of("llama")
    model.set_attn_implementation("cattn")
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected an end of 1, the number of rows, got 13; they are"):
        model.generate(**flattened(SENTENCES, "llama", lengths=True), max_new_tokens=3, min_new_tokens=3)


def test_decoders_that_see_both_ways(seen):
    inputs, rows = inputs_of("mistral", "right")
    assert_same(*both(model_of("mistral", is_causal=False), **inputs, use_cache=False), rows["logits"])
    assert [options["window"] for options in seen.options] == [(WINDOW, WINDOW)] * 2


def test_pictures_in_a_text():
    """Whose tokens see each other both ways."""
    text = DECODER | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(text_config=text, vision_config=PICTURES, mm_tokens_per_image=4,
                                       image_token_index=59, image_token_id=59)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    tokens = torch.randint(3, 59, (2, 16))
    tokens[:, 3:7] = 59
    assert_same(*both(model, input_ids=tokens, attention_mask=torch.ones_like(tokens),
                      token_type_ids=(tokens == 59).long(), pixel_values=torch.randn(2, 3, 16, 16)))


def test_models_with_an_attention_of_their_own(seen):
    """The mask is the one that they would have for "eager"."""
    options = SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS}
    results, tokens, mask = [], inputs_of("llama", "none")[0]["input_ids"], padding_mask("left")
    for implementation in "eager", "cattn":
        torch.manual_seed(0)
        config = transformers.BloomConfig(**options, attn_implementation=implementation)
        with torch.no_grad():
            results.append(transformers.BloomForCausalLM(config).eval()(tokens, attention_mask=mask).logits)
    assert torch.equal(*results)
    assert seen.masks and not seen.options


def mask_of(q_length=4, kv_length=6, *, made=False, width=3, dtype=torch.float32, **options):
    """What layers get, or the numbers of the mask for "eager"."""
    function = masking_utils.eager_mask if made else integration._mask
    padding = torch.tensor([[1] * kv_length, [0, 1, 1] + [1] * (kv_length - 3)], dtype=torch.bool)
    return function(batch_size=2, q_length=q_length, kv_length=kv_length, q_offset=kv_length - q_length,
                    mask_function=masking_utils.sliding_window_causal_mask_function(width), attention_mask=padding,
                    dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_the_numbers_of_eager(dtype):
    numbers = mask_of(made=True, dtype=dtype)
    query, key = torch.randn(2, 3, 4, 8).to(dtype), torch.randn(2, 3, 6, 8).to(dtype)
    for function in (
        lambda mask: mask + 1, lambda mask: mask[:, :, :, :3], lambda mask: mask[:, 0], lambda mask: mask == 0,
        lambda mask: query @ key.mT + mask, lambda mask: torch.cat([mask, mask], dim=1), lambda mask: mask.double(),
        lambda mask: torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask),
    ):
        result = function(mask_of(dtype=dtype))
        assert type(result) is torch.Tensor
        assert torch.equal(result, function(numbers))
    mask = mask_of(dtype=dtype)
    assert (mask.shape, mask.dtype, mask.device, mask.ndim) == (numbers.shape, dtype, numbers.device, 4)
    assert mask.to("cpu") is mask and mask.to(dtype) is mask and mask.contiguous() is mask


def attend(mask, query, key, **options):
    return integration._attention(torch.nn.Identity(), query, key, key, mask, **options)


def test_a_mask_that_was_changed_counts_as_it_is():
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    before, _ = attend(mask_of(), query, key)
    for change in (lambda mask: mask[:, :, 2].fill_(0), lambda mask: mask.masked_fill_(mask == mask, 0),
                   lambda mask: mask.__setitem__((slice(None), 0, 3), 0)):
        mask, numbers = mask_of(), mask_of(made=True)
        change(mask), change(numbers)
        result, _ = attend(mask, query, key)
        assert torch.equal(result, attend(numbers, query, key)[0])
        assert not torch.equal(result, before)


def test_a_mask_of_another_shape_than_the_keys():
    with pytest.raises(ValueError, match=r"attn_mask: expected a shape that broadcasts to \(2, 3, 4, 7\)"):
        attend(mask_of(), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8))


def test_without_a_mask():
    """As attention by "sdpa" has it: causal if the layer or the call says so, and several queries come."""
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    full, causal = (torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=is_causal).mT
                    for is_causal in (False, True))
    layers = {is_causal: types.SimpleNamespace(is_causal=is_causal) for is_causal in (False, True)}
    for layer, option, expected in (
        (layers[True], None, causal), (layers[False], None, full), (layers[False], True, causal),
        (layers[True], False, full), (torch.nn.Identity(), None, causal),
    ):
        result, weights = integration._attention(layer, query, key, key, None, is_causal=option)
        assert weights is None and result.is_contiguous()
        torch.testing.assert_close(result.transpose(1, 2), expected.mT, rtol=0, atol=4e-7 * float(key.abs().max()))
    alone, _ = integration._attention(layers[True], query[:, :, :1], key, key, None)
    assert torch.equal(alone, integration._attention(layers[False], query, key, key, None)[0][:, :1])


def test_joining_the_heads_copies_nothing():
    query, key = torch.randn(2, 6, 4, 8), torch.randn(2, 3, 6, 8)
    for dtype in torch.float32, torch.bfloat16:
        out = integration.attention(query.to(dtype), key.to(dtype), key.to(dtype))
        assert out.transpose(1, 2).is_contiguous()


def test_functions_that_mean_something_else_are_not_taken_for_numbers(monkeypatch, seen):
    """In another transformers: one key more is visible."""
    def overlay(width):
        return lambda batch, head, query, key: key >= query - width

    def windowed(width):
        return masking_utils.and_masks(overlay(width), masking_utils.causal_mask_function)

    monkeypatch.setattr(masking_utils, "sliding_window_causal_mask_function", windowed)
    patterns = integration._known_patterns()
    assert len(patterns) == len(integration._patterns) - 2    # it, and it for packed sequences
    monkeypatch.setattr(integration, "_patterns", patterns)
    assert_same(*both(model_of("mistral"), **inputs_of("mistral", "none")[0]))
    assert [options["attn_mask"].shape for options in seen.options] == [(3, 1, 12, 12)] * 2


# Generation.


HOW = ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"cache_implementation": "static", "num_beams": 2},
       {"use_cache": False}, {"do_sample": True}, {"prefill_chunk_size": 5})


@pytest.mark.parametrize(("name", "how"), [
    (name, how) for name in ("gpt2", "llama", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4", "bart", "t5")
    for how in (HOW if name in DECODERS else HOW[:-1])], ids=str)
def test_generate(name, how, seen):
    model = model_of(name)
    results = []
    tokens, mask = inputs_of("llama", "none")[0]["input_ids"], padding_mask("left")
    for implementation in "eager", "cattn":
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        seen.masks.clear()
        results.append(model.generate(tokens, attention_mask=mask, max_new_tokens=8, min_new_tokens=8,
                                      **{"do_sample": False} | how))
    assert torch.equal(*results)
    passes = len(seen.options) / layers_of(model)
    assert passes >= 8 or name in ENCODER_DECODERS
    assert len(seen.masks) == passes * MADE.get(name, 0)


def test_a_token_after_a_cache(seen):
    """Positions count from the first key of the cache: it may have dropped some, or have room for more."""
    model = model_of("mistral")
    model.set_attn_implementation("cattn")
    tokens = torch.randint(3, VOCABULARY, (1, 8))
    for how, keys in (({}, WINDOW), ({"cache_implementation": "static"}, WINDOW)):
        seen.options.clear()
        model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False, **how)
        last = seen.options[-1]
        assert (last["q_offset"], last["window"], last["is_causal"]) == (keys - 1, (WINDOW - 1, None), True)
        assert last.get("kv_lens") is None


# Weights.


@pytest.mark.parametrize("name", [*ENCODERS, "gpt2", "llama", "mistral", "gemma2", "gpt_oss", "bart", "t5", "vit"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_output_attentions(name, differentiated):
    """With gradients they come from plain PyTorch, and have gradients as well: of the weights, a sum of squares."""
    inputs, rows = inputs_of(name, "none")
    model = model_of(name)
    found = []
    for implementation in "eager", "cattn":
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with torch.set_grad_enabled(differentiated):
            outputs = model(**inputs, output_attentions=True)
        weights = {key: value for key, value in outputs.items() if key.endswith("attentions") and value}
        found.append((weights, outputs[next(iter(rows))]))
        if differentiated:
            sum(x.square().sum() for several in weights.values() for x in several).backward()
            found[-1] += ({key: x.grad for key, x in model.named_parameters() if x.grad is not None},)
    (eager, out_of_eager, *gradients_of_eager), (weights, out, *gradients) = found
    assert eager.keys() == weights.keys() and len(weights) == (3 if name in ENCODER_DECODERS else 1)
    assert_same(out_of_eager, out)
    for key, several in eager.items():
        assert len(several) == len(weights[key]) == 2
        for a, b in zip(several, weights[key], strict=True):
            assert_same(a, b)
            assert b.requires_grad == differentiated
    if differentiated:
        largest = max(x.abs().max() for x in gradients_of_eager[0].values())
        for key, x in gradients_of_eager[0].items():
            assert (x - gradients[0][key]).abs().max() <= 64 * torch.finfo(torch.float32).eps * largest, key


def test_weights_of_rows_that_see_nothing_are_0():
    model = model_of("mistral")
    model.set_attn_implementation("cattn")
    inputs, _ = inputs_of("mistral", "left")
    for differentiated in False, True:
        with torch.set_grad_enabled(differentiated):
            for weights in model(**inputs, output_attentions=True).attentions:
                sums = weights.sum(dim=-1).transpose(0, 1)
                expected = inputs["attention_mask"].float()
                torch.testing.assert_close(sums, expected.expand(sums.shape), rtol=0, atol=1e-6)


def test_weights_while_generating():
    model = model_of("llama")
    model.set_attn_implementation("cattn")
    result = model.generate(torch.randint(3, VOCABULARY, (2, 6)), max_new_tokens=3, min_new_tokens=3, do_sample=False,
                            output_attentions=True, return_dict_in_generate=True)
    assert [step[0].shape for step in result.attentions] == [(2, HEADS, 6, 6), (2, HEADS, 1, 7), (2, HEADS, 1, 8)]


# Training.


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dropout(name):
    p = 0.25
    key = "attention_probs_dropout_prob" if name == "bert" else "attention_dropout"
    model = model_of(name, **{key: p, "hidden_dropout_prob": 0.0})
    model.set_attn_implementation("cattn")
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (4, 40))}

    def first_weights(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**inputs, output_attentions=True).attentions[0]

    whole = first_weights(0)
    model.train()
    weights, again, others = (first_weights(seed) for seed in (0, 0, 1))
    assert torch.equal(weights, again) and not torch.equal(weights, others)
    kept = weights != 0
    assert torch.allclose(weights[kept] * (1 - p), whole[kept], rtol=4e-7, atol=0)
    visible = int((whole != 0).sum())
    assert abs(int(kept.sum()) - visible * (1 - p)) <= 5 * (visible * p * (1 - p)) ** 0.5  # standard deviations


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "mistral"])
def test_checkpoints_compute_the_same_again(name, reentrant, seen):
    model = model_of(name).train()
    model.set_attn_implementation("cattn")
    inputs, _ = inputs_of(name, "right")
    found = []
    for checkpoints in False, True:
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        seen.options.clear()
        torch.manual_seed(0)
        loss = model(**inputs, labels=inputs["input_ids"], **({} if name == "bert" else {"use_cache": False})).loss
        loss.backward()
        found.append((float(loss.detach()), {key: x.grad.clone() for key, x in model.named_parameters()
                                            if x.grad is not None}, len(seen.options)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(x, found[1][1][key]) for key, x in found[0][1].items())
    assert found[1][2] == 2 * found[0][2]
    assert not seen.masks


def test_training_learns():
    """Which token came 3 before: the loss falls as by "eager"."""
    losses = []
    tokens = torch.randint(3, 20, (8, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.full((8, 3), -100), tokens[:, :-3]], dim=1)
    for implementation in "eager", "cattn":
        model = model_of("llama").train()
        model.set_attn_implementation(implementation)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            logits = model(tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses) < 0.5
    assert abs(losses[0] - losses[1]) < 0.01 * losses[0]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_autocast(name, seen):
    """Tensors are cast as for PyTorch's own function, also the queries and keys that positions made float32."""
    inputs, rows = inputs_of(name, "right")
    model = model_of(name)
    exact, _ = both(model, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, result = both(model, **inputs)
    assert result.dtype == torch.bfloat16
    weight = rows["logits"]
    error, error_of_eager = (((x.float() - exact) * weight).abs().max() for x in (result, eager))
    assert error <= 2 * error_of_eager + 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_compiled(name):
    """Attention is left out of the graphs."""
    model = model_of(name)
    model.set_attn_implementation("cattn")
    inputs, rows = inputs_of(name, "left")
    with torch.no_grad():
        expected = model(**inputs).logits
        result = torch.compile(model, backend="eager")(**inputs).logits
    assert torch.equal(result * rows["logits"], expected * rows["logits"])


# Errors.


def test_traced_and_exported_models():
    model = model_of("bert")
    model.set_attn_implementation("cattn")
    tokens = torch.randint(3, VOCABULARY, (2, 8))
    cure = r'"cattn" is not for traced or exported models; model.set_attn_implementation\("sdpa"\) is'
    with pytest.raises(RuntimeError, match=cure):
        torch.jit.trace(model, (tokens,), strict=False)
    with pytest.raises(RuntimeError, match=cure):
        torch.export.export(model, (tokens,), strict=False)
    with pytest.raises(RuntimeError, match=cure):
        torch.export.export(model, (tokens,), {"attention_mask": padding_mask("left", 8)[:2]}, strict=False)


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_what_no_mask_says(name):
    with pytest.raises(ValueError, match=rf'"cattn": Identity passes {name}, .*_implementation\("eager"\) does'):
        attend(None, torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), **{name: torch.zeros(1)})
    attend(None, torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), **{name: None})


def test_tensors_elsewhere():
    with pytest.raises(ValueError, match="query: expected a tensor on the CPU, got one on meta"):
        attend(None, *torch.randn(2, 2, 3, 4, 8, device="meta"))


@pytest.mark.parametrize(("found", "message"), [
    (None, r"\(.*transformers.*\)"), (types.SimpleNamespace(__version__="5.3.9"), r"\(this is 5\.3\.9\)")])
def test_missing_or_old(found, message, monkeypatch):
    monkeypatch.setattr(integration, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers", found)
    cure = rf'huggingface: needs transformers 5\.4 or newer {message}: `pip install "cattn\[huggingface\]"`'
    with pytest.raises(ImportError, match=cure):
        integration.register()


def test_the_import_is_cheap():
    code = ("import sys, cattn.integrations.huggingface\n"
            "assert not {'torch', 'transformers'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], check=True)
