"""Code shared by Marian, BART and mBART in Hugging Face.

They come from fairseq's code (Ott et al. 2019): their settings and the weights of their layers have
the same names.
"""

from __future__ import annotations

from typing import Any

from fmjax.contracts import Config
from fmjax.errors import UserError
from fmjax.hub.reference import Table
from fmjax.hub.rules import ROW, Rule, Rules, attention, linear, norm, under

SETTINGS: Table = {
    "vocab_size": ("vocab_size", 50265),
    "d_model": ("width", 1024),
    "encoder_layers": ("layers", 12),
    "encoder_attention_heads": ("attention_heads", 16),
    "encoder_ffn_dim": ("mlp_width", 4096),
    "decoder_layers": ("decoder_layers", 12),
    "decoder_attention_heads": ("decoder_attention_heads", 16),
    "decoder_ffn_dim": ("decoder_mlp_width", 4096),
    "max_position_embeddings": ("positions", 1024),
    "scale_embedding": ("scale_embedding", False),
    "activation_function": ("activation", "gelu"),
    "init_std": ("initializer_range", 0.02),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.0),
    "activation_dropout": ("activation_dropout", 0.0),
}
FIXED: Config = {
    "is_encoder_decoder": True,
    "is_decoder": False,
    "add_bias_logits": False,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
UNREAD = (
    # Read by the families themselves.
    *("decoder_start_token_id", "tie_word_embeddings"),
    # Read by generation.
    *("force_bos_token_to_be_generated", "num_beam_groups", "diversity_penalty"),
    # Never read by the reference: duplicates of the encoder's layers, a classifier that is not
    # built, leftovers.
    *("num_hidden_layers", "extra_pos_embeddings", "classif_dropout", "classifier_dropout"),
    *("prefix", "replacing_rate"),
)
SHARED = "model.shared.weight"
ENCODER_TABLE, DECODER_TABLE = (
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
)
OUTPUT = "lm_head.weight"
TIED = dict.fromkeys((ENCODER_TABLE, DECODER_TABLE, OUTPUT), "embed/word/embedding")
# A buffer [1,V] in the reference.
LOGITS_BIAS = Rule("head/lm/bias", "final_logits_bias", ROW, zeros=True)


def attend(ours: str, theirs: str) -> Rules:
    """Returns the rules of an attention layer and its norm."""
    names = (f"{theirs}.q_proj", f"{theirs}.k_proj", f"{theirs}.v_proj", f"{theirs}.out_proj")
    return (
        *attention(ours, names),
        *norm(f"{ours}_norm", f"{theirs}_layer_norm"),
    )


def layers(part: str) -> Rules:
    """Returns the rules of the layers of the "encoder" or the "decoder"."""
    layer = (
        *attend("attention", "self_attn"),
        *(attend("cross", "encoder_attn") if part == "decoder" else ()),
        *linear("mlp/up", "fc1"),
        *linear("mlp/down", "fc2"),
        *norm("mlp_norm", "final_layer_norm"),
    )
    return under(f"{part}/layers", f"model.{part}.layers.{{layer}}", layer)


def tokens(config: Config, start: int | None, end: int) -> Config:
    """Returns the settings of the start and end tokens.

    `start` and `end` are the reference's defaults; a start of None means the end token. Raises
    UserError if one is not a token id.
    """
    last = config.get("eos_token_id", end)
    first = config.get("decoder_start_token_id", start)
    first = last if first is None else first
    for name, token in (("eos_token_id", last), ("decoder_start_token_id", first)):
        if type(token) is not int or token < 0:
            raise UserError(f"config.json: {name}={token!r} is not the id of a token; correct it")
    return {"start_id": first, "end_id": last}


def express(settings: Any) -> Config:
    """Returns the remaining settings of every config; decoder sizes that are 0 here equal the
    encoder's."""
    s = settings
    return {
        "decoder_layers": s.decoder_layers or s.layers,
        "decoder_attention_heads": s.decoder_attention_heads or s.attention_heads,
        "decoder_ffn_dim": s.decoder_mlp_width or s.mlp_width,
        "decoder_start_token_id": s.start_id,
        "eos_token_id": s.end_id,
        "forced_eos_token_id": s.end_id,
        "is_encoder_decoder": True,
    }
