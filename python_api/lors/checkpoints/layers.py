"""Which tensors of a checkpoint are decomposed, what kind each tensor is, and how deep it sits.

One table (`ARCHITECTURES`) maps an architecture to two regular expressions, one for its attention projections and one
for its MLP projections; together they are the matrices that a decomposing method (`lors`, `svp`, ...) works on.
Only names, shapes and dtypes are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..errors import SettingError

HF_WHISPER = "hf-whisper"
OPENAI_WHISPER = "openai-whisper"
NEMO = "nemo"
OTHER = "other"


class Target(Protocol):
    """A user's choice of matrices (the recipe's `target`); see `select`."""

    @property
    def select(self) -> str: ...
    @property
    def include(self) -> Sequence[str]: ...
    @property
    def exclude(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Architecture:
    """Names of the projection matrices of one family of models; patterns are applied with `re.search`."""

    name: str
    model_types: tuple[str, ...]
    attention: str
    mlp: str


_SEQ2SEQ_ATTENTION = r"\.(self_attn|encoder_attn)\.(q|k|v|out)_proj\.weight$"
_SEQ2SEQ_MLP = r"\.fc[12]\.weight$"
_SELF_OR_CROSS = r"\.layers\.\d+\.(self_attn|encoder_attn)\.(q|k|v|o)_proj\.weight$"
# transformers' two namings of a conformer, and NeMo's, which transformers keeps for Cohere's
_CONFORMER_ATTENTION = (
    r"\.layers\.\d+\.((self_attn|encoder_attn|cross_attention)\.(linear_(q|k|v|out|pos)|(q|k|v|o|out|relative_k)_proj)"
    r"|(first|second)_sub_layer\.(query_net|key_net|value_net|out_projection))\.weight$"
)
_CONFORMER_MLP = (
    r"\.layers\.\d+\.((ffn[12]?|feed_forward[12])\.((intermediate|output)_dense|linear[12]|fc[12])|mlp\.fc[12]"
    r"|third_sub_layer\.dense_(in|out))\.weight$"
)
_LAYER_OF_ANY = r"\.(layers|layer|encoders)\.\d+\."

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(HF_WHISPER, ("whisper",), _SEQ2SEQ_ATTENTION, _SEQ2SEQ_MLP),
    Architecture(OPENAI_WHISPER, (), r"attn\..*weight", r"mlp\..*weight"),
    Architecture(
        "bart and similar",
        ("bart", "mbart", "marian", "m2m_100", "pegasus", "blenderbot", "speech_to_text", "opt", "clip", "siglip"),
        _SEQ2SEQ_ATTENTION,
        _SEQ2SEQ_MLP,
    ),
    Architecture(
        "t5",
        ("t5", "mt5", "umt5", "longt5"),
        r"\.\w*(SelfAttention|EncDecAttention)\.[qkvo]\.weight$",
        r"\.DenseReluDense\.(wi|wi_0|wi_1|wo)\.weight$",
    ),
    Architecture(
        "llama and similar",
        (
            *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3"),
            *("gemma3_text", "phi", "phi3", "olmo", "olmo2", "cohere", "cohere2", "granite", "stablelm", "smollm3"),
            *("starcoder2", "deepseek_v2", "deepseek_v3"),
        ),
        r"\.self_attn\.(q|k|v|o|qkv)_proj\.weight$|\.self_attn\.dense\.weight$",
        r"\.(mlp|block_sparse_moe)\.((shared_expert|experts\.\d+)\.)?"
        r"((gate|up|down|gate_up|c)_proj|c_fc|fc[12]|w[123])\.weight$",
    ),
    Architecture(
        "wav2vec2 and similar",
        ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "sew"),
        r"\.attention\.(q|k|v|out)_proj\.weight$",
        r"\.feed_forward\.(intermediate|output)_dense\.weight$",
    ),
    Architecture(
        "moonshine", ("moonshine", "moonshine_streaming"), _SELF_OR_CROSS, r"\.layers\.\d+\.mlp\.fc[12]\.weight$"
    ),
    Architecture(NEMO, (), _CONFORMER_ATTENTION, _CONFORMER_MLP),
    Architecture(
        "conformer and similar",
        (
            *("wav2vec2-bert", "wav2vec2-conformer", "seamless_m4t", "seamless_m4t_v2", "cohere_asr"),
            *("parakeet_encoder", "parakeet_ctc", "parakeet_rnnt", "parakeet_tdt"),
        ),
        _CONFORMER_ATTENTION,
        _CONFORMER_MLP,
    ),
    Architecture(
        # a speech encoder (Whisper's, a conformer), a projector or Q-Former, and a language model
        "speech language models",
        (
            *("voxtral", "voxtral_realtime", "qwen2_audio", "qwen3_asr", "audioflamingo3", "glmasr", "granite_speech"),
            *("granite_speech_plus", "phi4_multimodal", "kyutai_speech_to_text"),
        ),
        _LAYER_OF_ANY + r"(self_attn|attn|attention|crossattention)\.(attention\.(query|key|value)|output\.dense"
        r"|(q|k|v|o|out|qkv)_proj(\.linear)?|to_(q|kv|out))\.weight$",
        _LAYER_OF_ANY + r"((mlp|ff[12]|feed_forward_(in|out))\.)?((gate|up|down|gate_up)_proj|fc[12])\.weight$"
        r"|\.layer\.\d+\.(intermediate|output)(_query)?\.dense\.weight$",
    ),
    Architecture(
        "bert and similar",
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text"),
        r"\.(attention|crossattention)\.(self\.(query|key|value)|output\.dense)\.weight$",
        r"\.layer\.\d+\.(intermediate|output)\.dense\.weight$",
    ),
    Architecture("distilbert", ("distilbert",), r"\.attention\.(q|k|v|out)_lin\.weight$", r"\.ffn\.lin[12]\.weight$"),
    Architecture(
        "gpt2 and similar",
        ("gpt2", "gpt_bigcode"),
        r"\.(attn|crossattention)\.(c_attn|q_attn|c_proj)\.weight$",
        r"\.mlp\.(c_fc|c_proj)\.weight$",
    ),
    Architecture(
        "gpt-neox and similar",
        ("gpt_neox", "bloom", "falcon"),
        r"\.(attention|self_attention)\.(query_key_value|dense)\.weight$",
        r"\.mlp\.dense_(h_to_4h|4h_to_h)\.weight$",
    ),
    Architecture(
        # transformers 5 renamed the modules of ViT; files on the hub carry the old names, so both are listed
        "vit and similar",
        ("vit", "deit", "dinov2", "beit", "audio-spectrogram-transformer"),
        r"\.attention\.(attention\.(query|key|value)|output\.dense|[qkvo]_proj)\.weight$",
        r"\.layer\.\d+\.(intermediate|output)\.dense\.weight$|\.mlp\.fc[12]\.weight$",
    ),
)
_BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
_BY_MODEL_TYPE = {kind: architecture for architecture in ARCHITECTURES for kind in architecture.model_types}

# An unknown architecture: matrices that are large enough to have a low-rank part and are not tables or norms.
SMALLEST_SIDE = 16
_NOT_A_PROJECTION = re.compile(
    r"embed|norm|position|(^|[._])(wte|wpe|ln|ln_\w+|shared|lm_head|proj_out|relative_attention_bias|pos)([._]|$)", re.I
)
_ATTENTION_NAME = re.compile(r"attn|attention|(first|second)_sub_layer", re.I)


@dataclass(frozen=True)
class Selection:
    """The decomposed matrices, the rule that chose them, and a line for the user when the rule was a guess."""

    names: frozenset[str]
    rule: str
    notice: str | None = None


def naming(names: Iterable[str]) -> str:
    """Naming scheme of a checkpoint, by the names of its tensors: ``hf-whisper``, ``openai-whisper``,
    ``nemo`` (a conformer as NeMo names it) or ``other``.

    Both namings of Whisper have an ``encoder.conv1`` and a projection that no other speech model has: with the
    convolutions alone, Moonshine (whose output projection is ``o_proj``) would be a Whisper. The prefix ``model.`` and
    the decoder do not count: a `WhisperModel` is stored without the one, an encoder without the other.
    """
    text = "\n".join(names)
    if re.search(r"(^|\.)encoder\.conv1\.weight$", text, re.M):
        if re.search(r"(^|\.)(encoder|decoder)\.layers\.\d+\.self_attn\.out_proj\.weight$", text, re.M):
            return HF_WHISPER
        if re.search(r"(^|\.)(encoder|decoder)\.blocks\.\d+\.attn\.query\.weight$", text, re.M):
            return OPENAI_WHISPER
    if (
        re.search(r"(^|\.)encoder\.layers\.\d+\.self_attn\.linear_pos\.weight$", text, re.M)
        and "encoder.pre_encode." in text
    ):
        return NEMO
    return OTHER


_naming_of = naming  # below, `naming` is an argument


def compile_patterns(patterns: Iterable[str], where: str) -> list[re.Pattern[str]]:
    """Compile the regexes of a target; `LorsError` names the one that is not a regular expression."""
    compiled = []
    for index, pattern in enumerate(patterns):
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            hint = (
                f"; as a regular expression, * is .*: {pattern.replace('*', '.*')!r}" if pattern.startswith("*") else ""
            )
            problem = f"{pattern!r} is not a regular expression: {error}{hint}"
            raise SettingError(f"{where}[{index}]", problem) from None
    return compiled


def decomposed(
    tensors: Mapping[str, Any],
    naming: str | None = None,
    config: Mapping[str, Any] | None = None,
    target: Target | None = None,
) -> set[str]:
    """Names of the matrices that a decomposing method works on; `select` also says by which rule."""
    return set(select(tensors, naming, config, target).names)


def select(
    tensors: Mapping[str, Any],
    naming: str | None = None,
    config: Mapping[str, Any] | None = None,
    target: Target | None = None,
) -> Selection:
    """Choose the decomposed matrices of one checkpoint.

    tensors: name -> shape (a tuple, taken to be floating point) or anything with `.shape` and `.dtype`.
    naming: result of `naming`, found from the names when None. config: the model's config.json, if there is one.
    target: `include` replaces the architecture's rule by the user's patterns, `select` ("projections", "attention",
    "mlp") narrows the architecture's rule, `exclude` takes matrices out of either.

    Only 2-D floating tensors can be chosen, whatever a pattern matches. `LorsError`: a pattern that is no regular
    expression, a target that leaves nothing. Without a target, a model in which nothing is found gives an empty
    selection with a notice.
    """
    matrices = {
        name: shape for name, tensor in tensors.items() if len(shape := _shape(tensor)) == 2 and _floating(tensor)
    }
    part = target.select if target is not None else "projections"
    include = compile_patterns(target.include, "target.include") if target is not None else []
    exclude = compile_patterns(target.exclude, "target.exclude") if target is not None else []

    if include:
        found = Selection(_matching(matrices, include), "target.include")
        key, what = "target.include", _listed(include)
    else:
        found = _by_architecture(matrices, naming or _naming_of(tensors), config, part)
        key, what = "target.select", repr(part)
    if target is not None and not found.names:
        example = f", whose names are like {next(iter(matrices))!r}" if include and matrices else ""
        raise SettingError(key, f"{what} matches none of the {len(matrices)} matrices{example}")
    kept = found.names - _matching(found.names, exclude)
    if exclude and not kept:
        raise SettingError("target.exclude", f"{_listed(exclude)} takes out all {len(found.names)} chosen matrices")
    return Selection(kept, found.rule, found.notice)


def is_projection(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is decomposed where only its name and shape are known, not its model: it is a projection of some
    architecture of the table (openai-whisper's short names aside), or `select` would take it by its shape."""
    if len(shape) != 2:
        return False
    known = (part for a in ARCHITECTURES if a.name != OPENAI_WHISPER for part in (a.attention, a.mlp))
    return any(re.search(part, name) for part in known) or bool(_by_shape({name: shape}, "projections", "").names)


def attention_only(names: Iterable[str]) -> set[str]:
    """Those of the (already selected) names that belong to an attention block: `select: attention` for any model."""
    return {name for name in names if _ATTENTION_NAME.search(name)}


def _by_architecture(
    matrices: Mapping[str, tuple[int, ...]], naming: str, config: Mapping[str, Any] | None, part: str
) -> Selection:
    model_type = str((config or {}).get("model_type", ""))
    architecture = _BY_NAME.get(naming) or _BY_MODEL_TYPE.get(model_type)
    if architecture is None:
        why = (
            f"no rule for model_type {model_type!r}" if model_type else "the checkpoint has no config with a model_type"
        )
        return _by_shape(matrices, part, why)
    patterns = {"projections": (architecture.attention, architecture.mlp), "attention": (architecture.attention,)}
    found = _matching(matrices, [re.compile(p) for p in patterns.get(part, (architecture.mlp,))])
    if not found:
        return _by_shape(matrices, part, f"the rule of {architecture.name} matches no matrix")
    return Selection(found, architecture.name)


def _by_shape(matrices: Mapping[str, tuple[int, ...]], part: str, why: str) -> Selection:
    names = {
        name
        for name, shape in matrices.items()
        if name.endswith("weight") and min(shape) >= SMALLEST_SIDE and not _NOT_A_PROJECTION.search(name)
    }
    if part == "attention":
        names = attention_only(names)
    elif part == "mlp":
        names -= attention_only(names)
    size = f"{SMALLEST_SIDE} x {SMALLEST_SIDE}"
    notice = f"{why}; decomposing {len(names)} matrices: those of {size} or more that are no embedding, head or norm"
    return Selection(frozenset(names), "shape", notice)


def _matching(names: Iterable[str], patterns: Sequence[re.Pattern[str]]) -> frozenset[str]:
    return frozenset(name for name in names if any(pattern.search(name) for pattern in patterns))


def _listed(patterns: Iterable[re.Pattern[str]]) -> str:
    return ", ".join(repr(pattern.pattern) for pattern in patterns)


def _shape(tensor: Any) -> tuple[int, ...]:
    # not by type: the engine's specs are named tuples that have a shape
    return tuple(tensor.shape if hasattr(tensor, "shape") else tensor)


def _floating(tensor: Any) -> bool:
    # By name, because the dtype may be numpy's, ml_dtypes' (whose bfloat16 has numpy kind "V") or torch's.
    return not hasattr(tensor, "dtype") or "float" in str(tensor.dtype)


# --- depth -----------------------------------------------------------------------------------------------------------

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|encoders|h)\.(\d+)\.")


class Layer(NamedTuple):
    """`stack`: what precedes its number, such as "model.encoder.layers."."""

    stack: str
    number: int

    @property
    def part(self) -> str:
        """What the stack is a part of: "encoder"; "" where the name does not tell."""
        return ".".join(self.stack.split(".")[-3:-2])


def layer_of(name: str) -> Layer | None:
    """The layer a tensor belongs to; None outside the numbered layers."""
    match = _LAYER.search(name)
    return Layer(name[: match.start(1)], int(match[1])) if match else None


def position(name: str, names: Iterable[str]) -> float:
    """Depth in [0, 1] of one tensor; use `positions` for all tensors of a model, it looks at the names once."""
    return positions({name, *names})[name]


def positions(names: Iterable[str]) -> dict[str, float]:
    """Depth of every tensor within its own stack: layer index / (number of layers - 1).

    A stack is what precedes the layer number, so encoder and decoder each run from 0 to 1. As in mergekit, the only
    layer of a one-layer stack is at 1, and every tensor outside the numbered layers is at 0: those before them
    (embeddings, convolutions) and also those after them (final norm, output head).
    """
    found = {name: layer_of(name) for name in names}
    last: dict[str, int] = {}
    for stack, number in filter(None, found.values()):
        last[stack] = max(last.get(stack, 0), number)
    depth = {}
    for name, layer in found.items():
        final = last[layer.stack] if layer else 0
        depth[name] = 0.0 if layer is None else layer.number / final if final else 1.0
    return depth


# --- kinds -----------------------------------------------------------------------------------------------------------

_NORM = re.compile(r"norm|(^|[._])ln(_\w+)?\.|_ln\.|layernorm", re.I)
_CONV = re.compile(r"(^|[._])conv|patch_embed", re.I)
_POSITION = re.compile(r"position|(^|\.)wpe\.|relative_attention_bias", re.I)
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|shared)\.", re.I)
_HEAD = re.compile(r"(^|\.)(lm_head|proj_out|classifier|score|projector)\.|^cls\.", re.I)
_CROSS = re.compile(r"encoder_attn|second_sub_layer|cross_?attn|cross_?attention|EncDecAttention")
_STACK = re.compile(r"(?:^|[._])(encoder|decoder)\.")
_PARTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (label, re.compile(pattern))
    for label, pattern in (
        ("positions", r"\.(linear_pos|relative_k_proj)\."),
        ("qkv", r"\.(qkv_proj|query_key_value|c_attn)\."),
        ("kv", r"\.to_kv\."),
        ("q", r"\.(q_proj|query|q|q_lin|q_attn|linear_q|to_q|query_net)\."),
        ("k", r"\.(k_proj|key|k|k_lin|linear_k|key_net)\."),
        ("v", r"\.(v_proj|value|v|v_lin|linear_v|value_net)\."),
        ("out", r"\.(out_proj|o_proj|out|o|out_lin|dense|c_proj|linear_out|to_out|out_projection)\."),
    )
)
_MLP: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (label, re.compile(pattern))
    for label, pattern in (
        ("gate", r"\.(gate_proj|wi_0|w1)\."),
        ("up", r"\.(up_proj|wi_1|w3)\."),
        ("gate and up", r"\.gate_up_proj\."),
        ("down", r"\.(down_proj|w2)\."),
        (
            "fc1",
            r"\.(fc1|mlp\.0|wi|lin1|c_fc|dense_h_to_4h|intermediate_dense|intermediate(_query)?\.dense|linear1|dense_in)\.",
        ),
        ("fc2", r"\.(fc2|mlp\.2|wo|lin2|c_proj|dense_4h_to_h|output_dense|output(_query)?\.dense|linear2|dense_out)\."),
    )
)


def kind(name: str) -> str:
    """Short label of a tensor for report tables, the same for one role in every naming.

    Projections: ``self-attention`` or ``cross-attention`` with ``q``, ``k``, ``v``, ``qkv`` or ``out``; ``mlp`` with
    ``fc1``, ``fc2``, ``gate``, ``up``, ``gate and up`` or ``down``; before these ``encoder`` or ``decoder`` if the name
    says so. The rest: ``layer norm`` (scale and shift), ``bias``, ``conv`` (kernel and bias), ``position embedding``,
    ``embedding``, ``head``, ``other``.
    """
    # the order matters: norms and convolutions have biases, and a position table is an embedding
    for label, pattern in (("layer norm", _NORM), ("conv", _CONV), ("position embedding", _POSITION)):
        if pattern.search(name):
            return label
    if name.endswith("bias"):
        return "bias"
    # of a layer inside of an embedding (Phi-4 has two encoders there) its own part of the name counts
    if _EMBEDDING.search(name[layer.end() :] if (layer := _LAYER.search(name)) else name):
        return "embedding"
    stack = match[1] + " " if (match := _STACK.search(name)) else ""
    if _ATTENTION_NAME.search(name):
        role = "cross-attention" if _CROSS.search(name) else "self-attention"
        return _labelled(f"{stack}{role}", name, _PARTS)
    if _HEAD.search(name):
        return "head"
    label = _labelled(f"{stack}mlp", name, _MLP)
    return label if label != f"{stack}mlp" or ".mlp." in name else "other"


def _labelled(prefix: str, name: str, parts: Iterable[tuple[str, re.Pattern[str]]]) -> str:
    return next((f"{prefix} {label}" for label, pattern in parts if pattern.search(name)), prefix)


# Whisper's output projection is its token embedding. transformers stores it once; other writers store both.
HEAD, EMBEDDING = "proj_out.weight", "model.decoder.embed_tokens.weight"
