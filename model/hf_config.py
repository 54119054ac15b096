"""A Hugging Face folder's config.json in, the shape of a network that is computed here out, or why not.

Others have written it: it names no code that would run, and no value is trusted to be of its kind.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import Architecture, ModelConfig
from model.hf_kinds import ARCHITECTURE_OF, CLASSES
from model.tasks import OF_REPLACED_TOKENS, TASKS

OURS = "cloze"  # key of config.json: which tasks there are, where they are not the default
MAX_JSON_BYTES = 1 << 25
SHAPE_FIELDS: dict[Architecture, dict[str, str]] = {  # ours, and of config.json
    "bert": {
        name: name
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size", "hidden_dropout_prob",
            "attention_probs_dropout_prob", "layer_norm_eps", "initializer_range",
        )
    },
    "modernbert": {
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "layer_norm_eps": "norm_eps",
        "initializer_range": "initializer_range",
        "local_attention": "local_attention",
    },
}  # fmt: skip
MODERN_DEFAULTS = {  # of transformers' class, where config.json is silent
    "num_hidden_layers": 22, "intermediate_size": 1152, "max_position_embeddings": 8192,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-5,
}  # fmt: skip
ELECTRA_DEFAULTS = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
COMPUTED: dict[
    Architecture, dict[str, Any]
] = {  # what is computed here; transformers has more variants
    "bert": {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "is_decoder": False,
        "add_cross_attention": False,
    },
    "modernbert": {
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "tie_word_embeddings": True,
    },
}


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """Shape and vocabulary size, by a folder's config.json. ValueError naming all that cannot be."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json")
    raw = read_object(path)
    model_type = raw.get("model_type")
    if "auto_map" in raw:
        raise ValueError(
            f"cannot import {path}: it has auto_map, so the model is a program that comes with it, which is "
            f"never run. Its weights alone can be, where they are of {', '.join(CLASSES)}: take it out"
        )
    if not isinstance(model_type, str) or model_type not in CLASSES:
        known = ", ".join(CLASSES)
        raise ValueError(f"cannot import {path}: model_type is {model_type!r}, not one of {known}")
    architecture = ARCHITECTURE_OF[model_type]
    problems = _variant_problems(raw, model_type)
    # What is absent has BERT-base's value: transformers' defaults are ours.
    shape = {
        ours: raw[theirs] for ours, theirs in SHAPE_FIELDS[architecture].items() if theirs in raw
    }
    if model_type == "electra":
        shape = ELECTRA_DEFAULTS | shape
        problems += _electra_problems(raw, shape)
    if architecture == "modernbert":
        try:
            shape = {**MODERN_DEFAULTS, **shape, **_modern_attention(raw, problems)}
        except (AttributeError, TypeError, ValueError) as error:
            problems.append(f"layer_types or rope_parameters are of another kind: {error}")
    fields = ModelConfig.__dataclass_fields__
    wrong = {name: value for name, value in shape.items() if not _fits(fields[name].default, value)}
    problems += [f"{name} cannot be {str(value)[:100]!r}" for name, value in wrong.items()]
    heads = _heads(raw, problems)
    if problems:
        raise ValueError(f"cannot import {path}: " + "; ".join(problems))
    try:
        return ModelConfig(architecture=architecture, **shape, **heads), raw["vocab_size"]
    except ValueError as error:
        raise ValueError(f"cannot import {path}: {error}") from None


def _electra_problems(raw: Mapping[str, Any], shape: Mapping[str, Any]) -> list[str]:
    size = raw.get("embedding_size", 128)
    if size == shape["hidden_size"]:
        return []
    return [
        f"embedding_size is {size!r}, only hidden_size, {shape['hidden_size']!r}, is computed here"
    ]


def _heads(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The tasks of a model of ours; of another's, those of its kind. What cannot be goes to `problems`."""
    given = raw.get(OURS)
    if given is None:
        # a generator of another's discriminator is not there: it may be narrower than any divisor says
        is_electra = raw["model_type"] == "electra"
        return {"tasks": OF_REPLACED_TOKENS, "generator_divisor": 1} if is_electra else {}
    tasks = given.get("tasks") if isinstance(given, dict) else None
    divisor = given.get("generator_divisor") if isinstance(given, dict) else None
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        problems.append(f"{OURS} names no tasks: {str(given)[:100]!r}")
    elif len(tasks) > len(TASKS):
        problems.append(f"{OURS} names {len(tasks)} tasks, there are {len(TASKS)}")
    elif not _fits(1, divisor):
        problems.append(f"generator_divisor cannot be {str(divisor)[:100]!r}")
    else:
        return {"tasks": tuple(tasks), "generator_divisor": divisor}
    return {}


def _variant_problems(raw: Mapping[str, Any], model_type: str) -> list[str]:
    """What of it is computed otherwise here, or not at all."""
    problems = [
        f"{key} is {raw[key]!r}, only {computed!r} is computed here"
        for key, computed in COMPUTED[ARCHITECTURE_OF[model_type]].items()
        if raw.get(key, computed) != computed
    ]
    size = raw.get("vocab_size")
    if size is None:
        problems.append("vocab_size is missing")
    elif not _fits(1, size) or not 1 <= size <= 1 << 24:
        problems.append(f"vocab_size cannot be {str(size)[:100]!r}")
    classes, known = raw.get("architectures") or [], CLASSES[model_type]
    if not isinstance(classes, list) or (classes and not set(map(str, classes)) & set(known)):
        problems.append(f"architectures is {classes}, not one of {', '.join(known)}")
    return problems


def _fits(default: object, value: object) -> bool:
    """Whether a value is of a field's kind: a number, whole where the default is."""
    kinds = int if isinstance(default, int) else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a folder that others have written. ValueError naming the file where there is none."""
    if (nbytes := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {nbytes:,} bytes, over {MAX_JSON_BYTES:,}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _modern_attention(raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Which layers attend globally, and the rotations; what cannot be computed goes to `problems`."""
    types = raw.get("layer_types")
    every = raw.get("global_attn_every_n_layers", 3)
    if types:
        every = next((n for n in range(1, len(types)) if types[n] == "full_attention"), len(types))
        expected = [
            "sliding_attention" if n % every else "full_attention" for n in range(len(types))
        ]
        if types != expected:
            problems.append(f"layer_types is {types}: global attention must come every n-th layer")
    rope = raw.get("rope_parameters") or {}
    thetas = {}
    for ours, theirs, default in (
        ("global_rope_theta", "full_attention", 160_000.0),
        ("local_rope_theta", "sliding_attention", 10_000.0),
    ):
        parameters = rope.get(theirs) or {}
        if parameters.get("rope_type", "default") != "default":
            problems.append(
                f"rope_type of {theirs} is {parameters['rope_type']!r}, only 'default' is computed"
            )
        thetas[ours] = float(parameters.get("rope_theta", raw.get(ours, default)))
    return {"global_attention_every": every, **thetas}
