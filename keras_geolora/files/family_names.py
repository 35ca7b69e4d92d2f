"""What transformers 5 calls the layers of KerasHub's backbones, as data.

Keys are paths of layers in KerasHub, values are names of modules in the model
of transformers without a head. `[1/3]` is the second third of the columns of a
kernel, and of the bias.
"""

ENCODER = {
    "self_attention_layer/query": "attention.self.query",
    "self_attention_layer/key": "attention.self.key",
    "self_attention_layer/value": "attention.self.value",
    "self_attention_layer/attention_output": "attention.output.dense",
    "self_attention_layer_norm": "attention.output.LayerNorm",
    "feedforward_intermediate_dense": "intermediate.dense",
    "feedforward_output_dense": "output.dense",
    "feedforward_layer_norm": "output.LayerNorm",
}


DECODER = {
    "self_attention_layernorm": "input_layernorm",
    "self_attention/query": "self_attn.q_proj",
    "self_attention/key": "self_attn.k_proj",
    "self_attention/value": "self_attn.v_proj",
    "self_attention/query_dense_layernorm": "self_attn.q_norm",
    "self_attention/key_dense_layernorm": "self_attn.k_norm",
    "self_attention/attention_output": "self_attn.o_proj",
    "feedforward_layernorm": "post_attention_layernorm",
    "feedforward_gate_dense": "mlp.gate_proj",
    "feedforward_intermediate_dense": "mlp.up_proj",
    "feedforward_output_dense": "mlp.down_proj",
}


LLAMA = ("transformer_layer_", "layers.", DECODER)


def experts_of(block, moe):
    """Returns the names of a block with experts.

    The experts are parameters, not modules: `mlp.experts.gate_up_proj` has a
    matrix for each of them.

    Args:
        block: Dict from path to name, of a block without experts.
        moe: String, the path of the layer with the experts.
    """
    experts = f"{moe}/experts/expert_feedforward"
    shared = f"{moe}/shared_expert_dense/feedforward"
    return {
        **block,
        f"{experts}_gate_dense": "mlp.experts.gate_up_proj",
        f"{experts}_output_dense": "mlp.experts.down_proj",
        f"{moe}/sparse_feedforward_gate_dense": "mlp.gate",
        f"{moe}/shared_expert_gate_dense": "mlp.shared_expert_gate",
        f"{shared}_gate_dense": "mlp.shared_expert.gate_proj",
        f"{shared}_intermediate_dense": "mlp.shared_expert.up_proj",
        f"{shared}_output_dense": "mlp.shared_expert.down_proj",
    }


MIXTRAL = {
    **experts_of(DECODER, "mixtral_sparse_moe_block"),
    "mixtral_sparse_moe_block/experts/expert_feedforward_gate_dense": (
        "mlp.experts.gate_up_proj[0/2]"
    ),
    "mixtral_sparse_moe_block/experts/expert_feedforward_intermediate_dense": (
        "mlp.experts.gate_up_proj[1/2]"
    ),
}


# The path of a block up to its number, its name up to its number, and the
# layers of a block.
FAMILIES = {
    "BertBackbone": ("transformer_layer_", "encoder.layer.", ENCODER),
    "RobertaBackbone": ("transformer_layer_", "encoder.layer.", ENCODER),
    "XLMRobertaBackbone": ("transformer_layer_", "encoder.layer.", ENCODER),
    "DebertaV3Backbone": (
        "disentangled_attention_encoder_layer_",
        "encoder.layer.",
        {
            **ENCODER,
            "self_attention_layer/query": "attention.self.query_proj",
            "self_attention_layer/key": "attention.self.key_proj",
            "self_attention_layer/value": "attention.self.value_proj",
        },
    ),
    "DistilBertBackbone": (
        "transformer_layer_",
        "transformer.layer.",
        {
            "self_attention_layer/query": "attention.q_lin",
            "self_attention_layer/key": "attention.k_lin",
            "self_attention_layer/value": "attention.v_lin",
            "self_attention_layer/attention_output": "attention.out_lin",
            "self_attention_layer_norm": "sa_layer_norm",
            "feedforward_intermediate_dense": "ffn.lin1",
            "feedforward_output_dense": "ffn.lin2",
            "feedforward_layer_norm": "output_layer_norm",
        },
    ),
    "LlamaBackbone": LLAMA,
    "MistralBackbone": LLAMA,
    "QwenBackbone": LLAMA,
    "Qwen3Backbone": LLAMA,
    "MixtralBackbone": ("transformer_layer_", "layers.", MIXTRAL),
    "QwenMoeBackbone": (
        "transformer_layer_",
        "layers.",
        experts_of(DECODER, "qwen_sparse_moe_block"),
    ),
    "Qwen3MoeBackbone": (
        "transformer_layer_",
        "layers.",
        experts_of(DECODER, "qwen3_sparse_moe_block"),
    ),
    "GemmaBackbone": (
        "decoder_block_",
        "layers.",
        {
            "pre_attention_norm": "input_layernorm",
            "attention/query": "self_attn.q_proj",
            "attention/key": "self_attn.k_proj",
            "attention/value": "self_attn.v_proj",
            "attention/attention_output": "self_attn.o_proj",
            # `pre_ffw_norm` has another name in Gemma 2.
            "ffw_gating": "mlp.gate_proj",
            "ffw_gating_2": "mlp.up_proj",
            "ffw_linear": "mlp.down_proj",
        },
    ),
    "GPT2Backbone": (
        "transformer_layer_",
        "h.",
        {
            "self_attention_layer_norm": "ln_1",
            "self_attention/query": "attn.c_attn[0/3]",
            "self_attention/key": "attn.c_attn[1/3]",
            "self_attention/value": "attn.c_attn[2/3]",
            "self_attention/attention_output": "attn.c_proj",
            "feedforward_layer_norm": "ln_2",
            "feedforward_intermediate_dense": "mlp.c_fc",
            "feedforward_output_dense": "mlp.c_proj",
        },
    ),
    "ViTBackbone": (
        "vit_encoder/transformer_block_",
        "layers.",
        {
            "ln_1": "layernorm_before",
            "mha/query": "attention.q_proj",
            "mha/key": "attention.k_proj",
            "mha/value": "attention.v_proj",
            "mha/attention_output": "attention.o_proj",
            "ln_2": "layernorm_after",
            "mlp/dense": "mlp.fc1",
            "mlp/dense_1": "mlp.fc2",
        },
    ),
}


# Layers outside of the blocks.
OUTSIDE_OF_DECODER = {
    "token_embedding": "embed_tokens",
    "sequence_output_layernorm": "norm",
}
ROBERTA = {
    # Its table of positions has two rows more in transformers.
    "embeddings/token_embedding": "embeddings.word_embeddings",
    "embeddings_layer_norm": "embeddings.LayerNorm",
}
OTHERS = {
    "BertBackbone": {
        "token_embedding": "embeddings.word_embeddings",
        "position_embedding": "embeddings.position_embeddings",
        "segment_embedding": "embeddings.token_type_embeddings",
        "embeddings_layer_norm": "embeddings.LayerNorm",
        "pooled_dense": "pooler.dense",
    },
    "RobertaBackbone": ROBERTA,
    "XLMRobertaBackbone": ROBERTA,
    "DebertaV3Backbone": {
        "token_embedding": "embeddings.word_embeddings",
        "embeddings_layer_norm": "embeddings.LayerNorm",
        "rel_embedding/rel_embeddings_layer_norm": "encoder.LayerNorm",
    },
    "DistilBertBackbone": {
        "token_and_position_embedding/token_embedding": (
            "embeddings.word_embeddings"
        ),
        "token_and_position_embedding/position_embedding": (
            "embeddings.position_embeddings"
        ),
        "embeddings_layer_norm": "embeddings.LayerNorm",
    },
    **{
        f"{name}Backbone": OUTSIDE_OF_DECODER
        for name in (
            "Llama",
            "Mistral",
            "Qwen",
            "Qwen3",
            "Mixtral",
            "QwenMoe",
            "Qwen3Moe",
        )
    },
    "GemmaBackbone": {
        "token_embedding": "embed_tokens",
        "final_normalization": "norm",
    },
    "GPT2Backbone": {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "layer_norm": "ln_f",
    },
    "ViTBackbone": {
        "vit_patching_and_embedding/patch_embedding": (
            "embeddings.patch_embeddings.projection"
        ),
        "vit_encoder/ln": "layernorm",
    },
}


# The heads of classifiers, outside of the backbone in both libraries.
ROBERTA_HEAD = {
    "pooled_dense": "classifier.dense",
    "logits": "classifier.out_proj",
}
HEADS = {
    "BertBackbone": {"logits": "classifier"},
    "RobertaBackbone": ROBERTA_HEAD,
    "XLMRobertaBackbone": ROBERTA_HEAD,
    "DebertaV3Backbone": {
        "pooled_dense": "pooler.dense",
        "logits": "classifier",
    },
    "DistilBertBackbone": {
        "pooled_dense": "pre_classifier",
        "logits": "classifier",
    },
    "ViTBackbone": {"predictions": "classifier"},
}


FIRST_BLOCK = {"ViTBackbone": 1}


# Where transformers' models of tasks keep the backbone. Decoders: `model`.
IN_A_TASK = {
    "BertBackbone": "bert",
    "RobertaBackbone": "roberta",
    "XLMRobertaBackbone": "roberta",
    "DebertaV3Backbone": "deberta",
    "DistilBertBackbone": "distilbert",
    "GPT2Backbone": "transformer",
    "ViTBackbone": "vit",
}


# Families whose kernels transformers stores like Keras, not transposed.
TRANSPOSED = {"GPT2Backbone"}


# The module that turns hidden states into logits of tokens, in every task.
LM_HEAD = "lm_head"


# Parameters of a module with experts, in the order in which it has them.
EXPERTS = "gate_up_proj", "down_proj"
