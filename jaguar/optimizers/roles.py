"""Role of each parameter in its module: a factor of products, a table of rows, or something to add or scale with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList


class Role(Enum):
    """Role of a parameter in its module."""

    MATRIX = auto()  # a factor of products; with three dimensions a batch of them
    FLATTEN = auto()  # a factor of products once it is read as (first, rest)
    LOOKUP = auto()  # rows that are looked up: the weight of an embedding
    TABLE = auto()  # vectors, however many: biases, scales, tokens, positions


_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB]\b")
_LOOKED_UP_FACTOR = re.compile(r"\.lora_embedding_A\b")
# Modules whose own parameters are vectors, and words in names that say the same, or the contrary.
_TABLE_MODULE = re.compile("Embedding|Norm|Scale|Affine|Rotation|PositionEncoding|PositionalEncoding|PositionBias")
_TABLE_WORD = re.compile(
    "(?:bias(?:es)?|norm|scale|gamma|beta|alpha|lambda|theta|delta|log|logit|temperature|magnitude|offset|shift|translate"
    "|mix|const|vector|token|cls|emb|embed|embedding|pos|position|positional|level|prompt|prefix|query|queries|latent"
    "|probe|pointer|memory|register|mask|pad|table|bank|codevector|codebook|anchor|prototype|centroid|slot|freq"
    "|frequency|frequencies)s?"
)
_MATRIX_WORD = re.compile("(?:weight|proj|projection|kernel|router|gate|matrix)s?|matrices")
_WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def is_factor(name: str) -> bool:
    """Tells whether a qualified name is that of a LoRA factor which multiplies."""
    return bool(_FACTOR.search(name)) and not _LOOKED_UP_FACTOR.search(name)


def roles_of(model: nn.Module) -> Iterator[tuple[Tensor, Role]]:
    """Parameters and their roles, tied ones as often as they are held.

    LoRA factors, weights of linear, bilinear and convolution layers are matrices (those of depthwise convolutions are
    filters, one per channel), weights of embeddings are looked up. Of other modules, transformers' and users' own:

    - a tensor whose dimensions but one are 1 is a vector;
    - parameters of modules that are called norms, scales or embeddings are vectors;
    - a name decides with its last telling word: `gate_up_proj_bias`, `cls_token`, `rel_pos_h` or `A_log` are vectors,
      `dt_proj_weight`, `down_proj` or `r_kernel` are matrices;
    - else (experts, n) beside (experts, m, n) are biases, (1, n, d) and what has four dimensions are tables, and the
      rest are matrices, in attention's (hidden, heads, width) after flattening.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        owner, prefix = _owner(modules, path, module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                qualified = f"{path}.{name}" if path else name
                yield parameter, _role(owner, qualified, prefix + name, parameter)


def _owner(modules: dict[str, nn.Module], path: str, module: nn.Module) -> tuple[nn.Module, str]:
    """The module that uses the parameters of `module`, and what comes before their names there."""
    above, _, name = path.rpartition(".")
    if isinstance(module, ParametrizationList):
        return modules[above.rpartition(".")[0]], f"{name}_"  # as in `layer.parametrizations.weight`
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)) and path:
        return modules[above], f"{name}_"
    return module, ""


def _role(owner: nn.Module, qualified: str, name: str, parameter: Tensor) -> Role:
    kind, shape = type(owner).__name__, parameter.shape
    if len(shape) < 2:
        return Role.TABLE
    if _LOOKED_UP_FACTOR.search(qualified):
        return Role.LOOKUP
    if _FACTOR.search(qualified):
        return Role.FLATTEN if isinstance(owner, _ConvNd) or len(shape) > 3 else Role.MATRIX
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) or ("Embedding" in kind and name == "weight"):
        return Role.LOOKUP
    vectors = sum(n != 1 for n in shape) < 2
    if name == "weight" or (name.startswith("weight_") and not vectors):  # `weight_v`: split into norm and direction
        if isinstance(owner, _ConvNd):
            depthwise = 1 < owner.groups == owner.in_channels
            return Role.TABLE if depthwise else Role.FLATTEN
        if isinstance(owner, (nn.Linear, nn.Bilinear)) or "Linear" in kind or kind == "Conv1D":
            return Role.MATRIX
    if vectors or _TABLE_MODULE.search(kind) or name == "D":  # D: in state-space models
        return Role.TABLE
    word = _telling_word(name)
    if word is None:
        stacked = any(_is_bias_of(shape, other.shape) for other in owner._parameters.values() if other is not None)
        table = stacked or (len(shape) == 3 and shape[0] == 1) or len(shape) > 3
    else:
        table = not _MATRIX_WORD.fullmatch(word)
    if table:
        return Role.TABLE
    per_head = "Attention" in kind and len(shape) == 3 and shape[0] >= shape[1]
    return Role.FLATTEN if per_head or len(shape) > 3 else Role.MATRIX


def _telling_word(name: str) -> str | None:
    """The last word of a name that says what it is."""
    words = [word.lower() for word in _WORD.findall(name)]
    return next((w for w in reversed(words) if _TABLE_WORD.fullmatch(w) or _MATRIX_WORD.fullmatch(w)), None)


def _is_bias_of(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return len(shape) == 2 and len(weight) == 3 and shape[0] == weight[0] and shape[1] in weight[1:]
