"""A tiny instance of every backbone that KerasHub exports, and its inputs.

`build(name)` gives both. A backbone is a row of `TEXT` or of `IMAGE`, or, where
it is made of other models or takes mixed inputs, a function in `COMPOSED`.
Shapes follow KerasHub's own tests.
"""

import keras
import keras_hub
import numpy as np

# Two parts of exported backbones are not exported themselves.
from keras_hub.src.models.gemma3n.gemma3n_audio_encoder import (
    Gemma3nAudioEncoder,
)
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

layers, models = keras_hub.layers, keras_hub.models

BATCH = 2
LENGTH = 8
VOCABULARY = 16


def names():
    """All exported backbones, also those that this file does not know."""
    return sorted(
        name
        for name in dir(models)
        if name.endswith("Backbone") and name != "Backbone"
    )


def build(name, **changes):
    """A new backbone with random weights, and a batch that it accepts.

    Arguments may be changed in what is a row, and in Whisper.
    """
    if name in COMPOSED:
        return COMPOSED[name](**changes)
    if name in TEXT:
        arguments, inputs = TEXT[name]
        return getattr(models, name)(**arguments | changes), text(*inputs)
    backbone = image_backbone(name, **changes)
    return backbone, floats(*backbone.input_shape[1:])


def small_bert():
    """A `BertBackbone` whose linear layers have one shape, and a batch."""
    return build("BertBackbone", num_layers=1, intermediate_dim=16)


# Inputs.


def text(*keys, length=LENGTH):
    """Integers by name: tokens, the segments they are in, or a mask."""
    rng = np.random.default_rng(0)
    shape = BATCH, length
    arrays = {}
    for key in keys:
        if key.endswith("token_ids"):
            arrays[key] = rng.integers(1, VOCABULARY - 2, shape, dtype="int32")
        elif key == "segment_ids":
            arrays[key] = rng.integers(0, 2, shape, dtype="int32")
        else:
            arrays[key] = np.ones(shape, dtype="int32")
    return arrays


def floats(*shape):
    return np.random.default_rng(0).random((BATCH, *shape), dtype="float32")


def each(values):
    """The same integers for every example of the batch."""
    return np.tile(np.array(values, dtype="int32"), (BATCH, 1))


def mask(positions):
    return each(np.isin(np.arange(LENGTH), positions))


# Language models: arguments and the names of the inputs.

PLAIN = "token_ids", "padding_mask"
SEGMENTS = "token_ids", "segment_ids", "padding_mask"
TWO_SIDES = (
    "encoder_token_ids",
    "encoder_padding_mask",
    "decoder_token_ids",
    "decoder_padding_mask",
)

SIZES = dict(hidden_dim=16, intermediate_dim=32)
STACK = dict(vocabulary_size=VOCABULARY, num_layers=2, **SIZES)
HEADS = STACK | dict(num_heads=2)
GROUPED = STACK | dict(num_query_heads=2, num_key_value_heads=1)
GROUPED_8 = GROUPED | dict(head_dim=8)
EXPERTS = dict(num_experts=2, top_k=2)
LINEAR_ATTENTION = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
SMOLLM = STACK | dict(
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_bias=False,
    attention_dropout=0.0,
    rope_layer_enabled_list=[True, True],
    layer_types=["attention", "attention"],
    mlp_bias=False,
    layer_norm_epsilon=1e-5,
    max_position_embeddings=16,
    rope_theta=10000.0,
    partial_rotary_factor=1.0,
)
T5GEMMA = dict(
    vocabulary_size=VOCABULARY,
    encoder_hidden_dim=16,
    encoder_intermediate_dim=32,
    encoder_num_layers=2,
    encoder_num_attention_heads=2,
    encoder_num_key_value_heads=1,
    encoder_head_dim=8,
    encoder_layer_types=["sliding_attention", "full_attention"],
    decoder_hidden_dim=16,
    decoder_intermediate_dim=32,
    decoder_num_layers=2,
    decoder_num_attention_heads=2,
    decoder_num_key_value_heads=1,
    decoder_head_dim=8,
    decoder_layer_types=["sliding_attention", "full_attention"],
    sliding_window=4,
    cross_attention_hidden_size=16,
)

TEXT = {
    # Encoders.
    "AlbertBackbone": (HEADS | dict(embedding_dim=8), SEGMENTS),
    "BertBackbone": (HEADS, SEGMENTS),
    "DebertaV3Backbone": (HEADS, PLAIN),
    "DistilBertBackbone": (HEADS, PLAIN),
    "ESM2Backbone": (HEADS, ["token_ids"]),
    "ESMBackbone": (HEADS, ["token_ids"]),
    "ElectraBackbone": (
        SIZES
        | dict(
            vocab_size=VOCABULARY, num_layers=2, num_heads=2, embedding_dim=8
        ),
        SEGMENTS,
    ),
    "FNetBackbone": (STACK, ["token_ids", "segment_ids"]),
    "RobertaBackbone": (HEADS, PLAIN),
    "RoformerV2Backbone": (
        HEADS | dict(head_size=8),
        ["token_ids", "segment_ids"],
    ),
    "XLMRobertaBackbone": (HEADS, PLAIN),
    "XLNetBackbone": (HEADS, SEGMENTS),
    # Decoders.
    "BloomBackbone": (HEADS, PLAIN),
    "FalconBackbone": (STACK | dict(num_attention_heads=2), PLAIN),
    "GPT2Backbone": (HEADS, PLAIN),
    "GPTNeoXBackbone": (HEADS, PLAIN),
    "GemmaBackbone": (GROUPED_8, PLAIN),
    "GptOssBackbone": (GROUPED | EXPERTS | dict(sliding_window=4), PLAIN),
    "Llama3Backbone": (GROUPED, PLAIN),
    "LlamaBackbone": (GROUPED, PLAIN),
    "MistralBackbone": (GROUPED | dict(sliding_window=4), PLAIN),
    "MixtralBackbone": (GROUPED | EXPERTS | dict(sliding_window=4), PLAIN),
    "OPTBackbone": (HEADS, PLAIN),
    "Phi3Backbone": (GROUPED, PLAIN),
    "Qwen2Backbone": (GROUPED, PLAIN),
    "Qwen3Backbone": (GROUPED_8, PLAIN),
    "Qwen3MoeBackbone": (
        GROUPED_8 | EXPERTS | dict(moe_intermediate_dim=16),
        PLAIN,
    ),
    "Qwen3_5Backbone": (GROUPED_8 | LINEAR_ATTENTION, PLAIN),
    "Qwen3_5MoeBackbone": (
        dict(
            vocabulary_size=VOCABULARY,
            num_layers=2,
            num_query_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            hidden_dim=16,
            moe_intermediate_dim=16,
            shared_expert_intermediate_size=16,
        )
        | EXPERTS
        | LINEAR_ATTENTION,
        PLAIN,
    ),
    "QwenBackbone": (GROUPED, PLAIN),
    "QwenMoeBackbone": (
        GROUPED
        | EXPERTS
        | dict(moe_intermediate_dim=16, shared_expert_intermediate_dim=32),
        PLAIN,
    ),
    "RWKV7Backbone": (
        dict(
            vocabulary_size=VOCABULARY,
            hidden_size=16,
            head_size=8,
            num_layers=2,
            intermediate_dim=32,
            gate_lora=8,
            mv_lora=8,
            aaa_lora=8,
            decay_lora=8,
        ),
        PLAIN,
    ),
    "SmolLM3Backbone": (SMOLLM, PLAIN),
    "SmolLMBackbone": (SMOLLM, PLAIN),
    # Encoders with decoders.
    "BartBackbone": (HEADS, TWO_SIDES),
    "EdRecBackbone": (
        SIZES
        | dict(
            vocab_size=VOCABULARY,
            num_layers_enc=2,
            num_layers_dec=2,
            num_heads=2,
        ),
        TWO_SIDES,
    ),
    "T5Backbone": (HEADS, TWO_SIDES),
    "T5Gemma2Backbone": (T5GEMMA, TWO_SIDES),
    "T5GemmaBackbone": (T5GEMMA, TWO_SIDES),
}


# Backbones of one image: arguments.

RESNET = dict(
    input_conv_filters=[8],
    input_conv_kernel_sizes=[7],
    stackwise_num_filters=[64, 8, 8],
    stackwise_num_blocks=[1, 1, 1],
    stackwise_num_strides=[1, 2, 2],
    block_type="bottleneck_block",
)
VIT = dict(patch_size=4, num_layers=2, num_heads=2, hidden_dim=16)

IMAGE = {
    "CSPNetBackbone": dict(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_strides=2,
        stackwise_depth=[1, 1],
        stackwise_num_filters=[16, 16],
        down_growth=True,
        bottle_ratio=(0.5, 1.0),
        block_ratio=(1.0, 0.5),
        expand_ratio=(2.0, 1.0),
        block_type="dark_block",
        stage_type="csp",
        stem_padding="same",
        image_shape=(16, 16, 3),
    ),
    "DINOV2Backbone": VIT
    | dict(
        intermediate_dim=32,
        image_shape=(16, 16, 3),
        position_embedding_shape=(16, 16, 3),
    ),
    "DINOV3Backbone": VIT | dict(intermediate_dim=32, image_shape=(8, 8, 3)),
    "DeiTBackbone": VIT | dict(intermediate_dim=32, image_shape=(8, 8, 3)),
    "DenseNetBackbone": dict(
        stackwise_num_repeats=[1, 1], growth_rate=8, image_shape=(16, 16, 3)
    ),
    "EfficientNetBackbone": dict(
        stackwise_kernel_sizes=[3, 3, 3],
        stackwise_num_repeats=[1, 1, 1],
        stackwise_input_filters=[8, 8, 8],
        stackwise_output_filters=[8, 8, 8],
        stackwise_expansion_ratios=[1, 2, 2],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25, 0.25],
        stackwise_strides=[1, 2, 2],
        stackwise_block_types=["v1", "fused", "unfused"],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        num_features=16,
        input_shape=(16, 16, 3),
    ),
    "HGNetV2Backbone": dict(
        stem_channels=[3, 8, 8],
        stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, True],
        depths=[1, 1],
        hidden_sizes=[16, 32],
        embedding_size=8,
        use_learnable_affine_block=True,
        hidden_act="relu",
        out_features=["stage1", "stage2"],
        image_shape=(32, 32, 3),
    ),
    "MiTBackbone": dict(
        layerwise_depths=[1, 1],
        hidden_dims=[8, 16],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        image_shape=(16, 16, 3),
    ),
    "MobileNetBackbone": dict(
        stackwise_expansion=[[8], [16]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[8], [8]],
        stackwise_kernel_size=[[3], [5]],
        stackwise_num_strides=[[2], [1]],
        stackwise_se_ratio=[[None], [0.25]],
        stackwise_activation=[["relu"], ["hard_swish"]],
        stackwise_padding=[[1], [2]],
        output_num_filters=16,
        input_num_filters=8,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        squeeze_and_excite=0.5,
        last_layer_filter=16,
        image_shape=(32, 32, 3),
    ),
    "MobileNetV5Backbone": dict(
        stackwise_block_types=[["er"], ["uir", "mqa"]],
        stackwise_num_blocks=[1, 2],
        stackwise_num_filters=[[8], [16, 16]],
        stackwise_strides=[[2], [2, 1]],
        stackwise_act_layers=[["relu"], ["relu", "relu"]],
        stackwise_exp_ratios=[[2.0], [2.0, 1.0]],
        stackwise_se_ratios=[[0.0], [0.0, 0.0]],
        stackwise_dw_kernel_sizes=[[0], [5, 3]],
        stackwise_dw_start_kernel_sizes=[[0], [0, 0]],
        stackwise_dw_end_kernel_sizes=[[0], [0, 0]],
        stackwise_exp_kernel_sizes=[[3], [0, 0]],
        stackwise_pw_kernel_sizes=[[1], [0, 0]],
        stackwise_num_heads=[[0], [0, 2]],
        stackwise_key_dims=[[0], [0, 8]],
        stackwise_value_dims=[[0], [0, 8]],
        stackwise_kv_strides=[[0], [0, 1]],
        stackwise_use_cpe=[[False], [False, False]],
        stem_size=8,
        use_msfa=False,
        image_shape=(16, 16, 3),
    ),
    "ResNetBackbone": RESNET | dict(image_shape=(16, 16, 3)),
    "SwinTransformerBackbone": dict(
        embed_dim=8,
        depths=(2, 1),
        num_heads=(2, 2),
        window_size=2,
        patch_size=2,
        image_shape=(16, 16, 3),
    ),
    "VGGBackbone": dict(
        stackwise_num_repeats=[1, 1],
        stackwise_num_filters=[8, 16],
        image_shape=(16, 16, 3),
    ),
    "ViTBackbone": VIT
    | dict(patch_size=(4, 4), mlp_dim=32, image_shape=(8, 8, 3)),
    "ViTDetBackbone": dict(
        patch_size=4,
        hidden_size=16,
        num_layers=2,
        global_attention_layer_indices=[1],
        intermediate_dim=32,
        num_heads=2,
        num_output_channels=8,
        window_size=2,
        image_shape=(16, 16, 3),
    ),
    "XceptionBackbone": dict(
        stackwise_conv_filters=[[8, 8], [16, 16], [16, 16]],
        stackwise_pooling=[False, True, False],
        image_shape=(32, 32, 3),
    ),
}


def image_backbone(name, **changes):
    return getattr(models, name)(**IMAGE[name] | changes)


# Backbones of several models, or of mixed inputs: functions.


def basnet():
    resnet = models.ResNetBackbone(
        **RESNET
        | dict(
            stackwise_num_filters=[64, 8, 8, 8],
            stackwise_num_blocks=[1, 1, 1, 1],
            stackwise_num_strides=[1, 2, 2, 2],
        )
    )
    backbone = models.BASNetBackbone(
        resnet, num_classes=1, projection_filters=8
    )
    return backbone, floats(64, 64, 3)


def blip2():
    backbone = models.BLIP2Backbone(
        models.BLIP2VisionEncoder(
            image_size=8,
            patch_size=4,
            num_layers=2,
            num_heads=2,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            initializer_range=0.02,
            **SIZES,
        ),
        models.BLIP2QFormer(
            num_query_tokens=2,
            num_layers=2,
            num_heads=2,
            vision_dim=16,
            cross_attention_frequency=2,
            dropout=0.0,
            layer_norm_epsilon=1e-6,
            **SIZES,
        ),
        models.BLIP2CustomOPT(
            num_query_tokens=2,
            qformer_hidden_dim=16,
            max_sequence_length=16,
            dropout=0.0,
            language_projection=None,
            **HEADS,
        ),
    )
    return backbone, text(*PLAIN) | dict(images=floats(8, 8, 3))


def contrastive(family, **arguments):
    """CLIP and its kin: an encoder of images and an encoder of text."""
    stack = dict(num_layers=2, num_heads=2, **SIZES)
    vision_encoder = getattr(models, f"{family}VisionEncoder")(
        patch_size=4, image_shape=(8, 8, 3), name="vision_encoder", **stack
    )
    text_encoder = getattr(models, f"{family}TextEncoder")(
        vocabulary_size=VOCABULARY,
        embedding_dim=16,
        max_sequence_length=LENGTH,
        name="text_encoder",
        **stack,
    )
    backbone = getattr(models, f"{family}Backbone")(
        vision_encoder, text_encoder, **arguments
    )
    return backbone, text("token_ids") | dict(images=floats(8, 8, 3))


def d_fine():
    backbone = models.DFineBackbone(
        image_backbone("HGNetV2Backbone", image_shape=(None, None, 3)),
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_denoising=4,
        num_labels=4,
        hidden_dim=16,
        learn_initial_query=False,
        num_queries=4,
        anchor_image_size=(32, 32),
        feat_strides=[4, 8],
        num_feature_levels=2,
        encoder_in_channels=[16, 32],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=32,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=16,
        num_lqe_layers=2,
        out_features=["stage1", "stage2"],
        seed=0,
    )
    return backbone, floats(32, 32, 3)


def deeplab_v3():
    backbone = models.DeepLabV3Backbone(
        models.ResNetBackbone(**RESNET),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",
        dilation_rates=[1, 2],
        upsampling_size=4,
        projection_filters=8,
        image_shape=(32, 32, 3),
    )
    return backbone, floats(32, 32, 3)


def depth_anything():
    backbone = models.DepthAnythingBackbone(
        image_backbone("DINOV2Backbone", apply_layernorm=True),
        reassemble_factors=[2, 1],
        neck_hidden_dims=[8, 16],
        fusion_hidden_dim=16,
        head_hidden_dim=8,
        head_in_index=-1,
        feature_keys=["stage1", "stage2"],
    )
    return backbone, floats(16, 16, 3)


def dino(name, key):
    """A row of `IMAGE`, only that its image has a name."""
    return image_backbone(name), {key: floats(*IMAGE[name]["image_shape"])}


def feature_pyramid():
    """The base class has no layers of its own, so it is given two."""
    image = keras.Input((16, 16, 3))
    first = keras.layers.Conv2D(8, 3, strides=2, padding="same")(image)
    second = keras.layers.Conv2D(16, 3, strides=2, padding="same")(first)
    backbone = models.FeaturePyramidBackbone(inputs=image, outputs=second)
    backbone.pyramid_outputs = {"P1": first, "P2": second}
    return backbone, floats(16, 16, 3)


def flux():
    shapes = dict(
        image_shape=(4, 8),
        text_shape=(4, 8),
        image_ids_shape=(4, 3),
        text_ids_shape=(4, 3),
        y_shape=(8,),
    )
    backbone = models.FluxBackbone(
        input_channels=8,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[4, 6, 6],
        theta=10000,
        use_bias=True,
        guidance_embed=True,
        **shapes,
    )
    inputs = {
        key.removesuffix("_shape"): floats(*shape)
        for key, shape in shapes.items()
    }
    return backbone, inputs | dict(timesteps=floats(), guidance=floats())


def gemma3():
    backbone = models.Gemma3Backbone(
        image_size=8,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=4,
        vision_encoder=models.Gemma3VisionEncoder(
            image_size=8,
            patch_size=2,
            pool_size=2,
            num_layers=2,
            num_heads=2,
            output_dim=16,
            **SIZES,
        ),
        **GROUPED_8,
    )
    return backbone, text(*PLAIN) | dict(
        images=floats(1, 8, 8, 3),
        vision_mask=mask([1, 2, 3, 4]),
        vision_indices=each([1, 2, 3, 4]),
    )


def gemma3n():
    image_token, audio_token = VOCABULARY - 2, VOCABULARY - 1
    vision_encoder = image_backbone("MobileNetV5Backbone")
    audio_encoder = Gemma3nAudioEncoder(
        hidden_size=16,
        input_feat_size=16,
        sscp_conv_channel_size=[8, 8],
        sscp_conv_kernel_size=[(3, 3), (3, 3)],
        sscp_conv_stride_size=[(2, 2), (2, 2)],
        sscp_conv_group_norm_eps=1e-5,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
        gradient_clipping=1.0,
        residual_weight=0.5,
        num_attention_heads=2,
        attention_chunk_size=2,
        num_attention_context_right=1,
        num_attention_context_left=1,
        attention_logit_cap=50.0,
        conv_kernel_size=3,
        reduction_factor=1,
    )
    backbone = models.Gemma3nBackbone(
        text_vocab_size=VOCABULARY,
        text_hidden_size=16,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=[32, 32],
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        rope_theta=10000.0,
        max_position_embeddings=LENGTH,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=8,
        vision_encoder_config=vision_encoder.get_config(),
        vision_hidden_size=16,
        vision_vocab_size=8,
        vision_vocab_offset=VOCABULARY,
        vision_soft_tokens_per_image=4,
        image_token_id=image_token,
        audio_encoder_config=audio_encoder.get_config(),
        audio_hidden_size=16,
        audio_vocab_size=8,
        audio_vocab_offset=VOCABULARY + 8,
        audio_soft_tokens_per_image=2,
        audio_token_id=audio_token,
    )
    inputs = text(*PLAIN)
    inputs["token_ids"][:, :4] = image_token
    inputs["token_ids"][:, 4:6] = audio_token
    return backbone, inputs | dict(
        images=floats(1, 16, 16, 3),
        input_features=floats(1, 8, 16),
        input_features_mask=np.zeros((BATCH, 1, 8), dtype=bool),
    )


def gemma4():
    backbone = models.Gemma4Backbone(
        image_size=8,
        sliding_window_size=4,
        sliding_window_pattern=2,
        vision_encoder=models.Gemma4VisionEncoder(
            image_size=8,
            patch_size=2,
            pool_size=2,
            num_layers=2,
            num_heads=2,
            head_dim=8,
            num_key_value_heads=1,
            output_dim=16,
            **SIZES,
        ),
        audio_encoder=models.Gemma4AudioEncoder(
            input_feat_size=8,
            hidden_size=16,
            num_heads=2,
            num_layers=1,
            chunk_size=4,
            context_left=5,
            context_right=0,
            sscp_conv_channels=(8, 8),
            output_proj_dims=None,
            output_dim=16,
        ),
        num_audio_tokens_per_clip=2,
        **GROUPED_8,
    )
    patches = np.stack(np.divmod(np.arange(16), 4)[::-1], axis=-1)
    return backbone, text(*PLAIN) | dict(
        position_ids=each(np.arange(LENGTH)),
        pixel_values=floats(1, 16, 12),
        pixel_position_ids=np.tile(patches.astype("int32"), (BATCH, 1, 1, 1)),
        vision_mask=mask([1, 2, 3, 4]),
        vision_indices=each([1, 2, 3, 4]),
        audio_mel=floats(1, 8, 8),
        audio_mel_mask=np.ones((BATCH, 1, 8), dtype="int32"),
        audio_mask=mask([5, 6]),
        audio_indices=each([5, 6]),
    )


def moonshine():
    backbone = models.MoonshineBackbone(
        vocabulary_size=VOCABULARY,
        filter_dim=16,
        encoder_num_layers=2,
        decoder_num_layers=2,
        encoder_num_heads=2,
        decoder_num_heads=2,
        max_position_embeddings=64,
        **SIZES,
    )
    return backbone, text("decoder_token_ids", "decoder_padding_mask") | dict(
        encoder_input_values=floats(2000, 1),
        encoder_padding_mask=np.ones((BATCH, 2000), dtype="int32"),
    )


def pali_gemma():
    backbone = models.PaliGemmaBackbone(
        image_size=8,
        vit_patch_size=4,
        vit_num_layers=2,
        vit_num_heads=2,
        vit_hidden_dim=16,
        vit_intermediate_dim=32,
        **GROUPED_8,
    )
    return backbone, text(*PLAIN, "response_mask") | dict(
        images=floats(8, 8, 3)
    )


def parseq():
    backbone = models.PARSeqBackbone(
        image_backbone("ViTBackbone", use_class_token=False),
        vocabulary_size=VOCABULARY,
        max_label_length=LENGTH,
        decoder_hidden_dim=16,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=32,
    )
    return backbone, text(*PLAIN) | dict(images=floats(8, 8, 3))


def retinanet():
    backbone = models.RetinaNetBackbone(
        models.ResNetBackbone(**RESNET), min_level=3, max_level=4, use_p5=False
    )
    return backbone, floats(32, 32, 3)


def sam():
    backbone = models.SAMBackbone(
        image_backbone("ViTDetBackbone"),
        layers.SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(16, 16),
            mask_in_channels=16,
        ),
        layers.SAMMaskDecoder(
            num_layers=2,
            hidden_size=16,
            intermediate_dim=32,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=8,
        ),
    )
    return backbone, dict(
        images=floats(16, 16, 3),
        points=floats(1, 2),
        labels=np.ones((BATCH, 1), dtype="float32"),
        boxes=floats(1, 2, 2),
        masks=floats(1, 16, 16, 1),
    )


def sam3():
    stack = dict(num_layers=2, num_heads=2, **SIZES)
    image = dict(image_shape=(28, 28, 3), patch_size=14)
    backbone = models.SAM3PromptableConceptBackbone(
        vision_encoder=layers.SAM3VisionEncoder(
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(42, 42, 3),
            window_size=2,
            global_attn_indexes=[1],
            **image,
            **stack,
        ),
        text_encoder=layers.SAM3TextEncoder(
            vocabulary_size=VOCABULARY, embedding_dim=16, **stack
        ),
        geometry_encoder=layers.SAM3GeometryEncoder(roi_size=7, **stack),
        detr_encoder=layers.SAM3DetrEncoder(**stack),
        detr_decoder=layers.SAM3DetrDecoder(num_queries=4, **image, **stack),
        mask_decoder=layers.SAM3MaskDecoder(
            num_upsampling_stages=3, hidden_dim=16, num_heads=2
        ),
    )
    # One box, no other number, or KerasHub's mask fails to broadcast. To align
    # it, the PyTorch backend needs torchvision.
    return backbone, text(*PLAIN, length=32) | dict(
        pixel_values=floats(28, 28, 3),
        boxes=floats(1, 5),
        box_labels=np.ones((BATCH, 1), dtype="int32"),
    )


def segformer():
    backbone = models.SegFormerBackbone(
        image_backbone("MiTBackbone"), projection_filters=8
    )
    return backbone, floats(16, 16, 3)


def stable_diffusion_3():
    clip = dict(
        vocabulary_size=VOCABULARY,
        embedding_dim=16,
        num_layers=2,
        num_heads=2,
        intermediate_output_index=-2,
        **SIZES,
    )
    backbone = models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=8,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=None,
        vae=VAEBackbone(
            [32, 32, 32, 32],
            [1, 1, 1, 1],
            [32, 32, 32, 32],
            [1, 1, 1, 1],
            sampler_method="mode",
            name="vae",
        ),
        clip_l=models.CLIPTextEncoder(name="clip_l", **clip),
        clip_g=models.CLIPTextEncoder(name="clip_g", **clip),
        image_shape=(32, 32, 3),
    )
    return backbone, text(
        "clip_l_token_ids",
        "clip_l_negative_token_ids",
        "clip_g_token_ids",
        "clip_g_negative_token_ids",
    ) | dict(
        images=floats(32, 32, 3),
        latents=floats(4, 4, 16),
        num_steps=np.full(BATCH, 2, dtype="int32"),
        guidance_scale=np.ones(BATCH, dtype="float32"),
    )


def video_prism():
    backbone = models.VideoPrismBackbone(
        vocabulary_size=VOCABULARY,
        num_frames=2,
        patch_size=4,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
        num_text_layers=1,
        image_shape=(8, 8, 3),
        **SIZES,
    )
    return backbone, text(*PLAIN) | dict(pixel_values=floats(2, 8, 8, 3))


def whisper(**changes):
    backbone = models.WhisperBackbone(
        num_mels=8,
        max_encoder_sequence_length=LENGTH,
        max_decoder_sequence_length=LENGTH,
        **HEADS | changes,
    )
    return backbone, text("decoder_token_ids", "decoder_padding_mask") | dict(
        encoder_features=floats(LENGTH, 8)
    )


COMPOSED = {
    "BASNetBackbone": basnet,
    "BLIP2Backbone": blip2,
    "CLIPBackbone": lambda: contrastive("CLIP", projection_dim=16),
    "DFineBackbone": d_fine,
    "DINOV2Backbone": lambda: dino("DINOV2Backbone", "images"),
    "DINOV3Backbone": lambda: dino("DINOV3Backbone", "pixel_values"),
    "DeepLabV3Backbone": deeplab_v3,
    "DepthAnythingBackbone": depth_anything,
    "FeaturePyramidBackbone": feature_pyramid,
    "FluxBackbone": flux,
    "Gemma3Backbone": gemma3,
    "Gemma3nBackbone": gemma3n,
    "Gemma4Backbone": gemma4,
    "MetaCLIP2Backbone": lambda: contrastive("MetaCLIP2", projection_dim=16),
    "MoonshineBackbone": moonshine,
    "PARSeqBackbone": parseq,
    "PaliGemmaBackbone": pali_gemma,
    "RetinaNetBackbone": retinanet,
    "SAM3PromptableConceptBackbone": sam3,
    "SAMBackbone": sam,
    "SegFormerBackbone": segformer,
    "SigLIPBackbone": lambda: contrastive("SigLIP"),
    "StableDiffusion3Backbone": stable_diffusion_3,
    "VideoPrismBackbone": video_prism,
    "WhisperBackbone": whisper,
}
