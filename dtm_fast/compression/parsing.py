"""The treatment that a text spells."""

import re
from collections.abc import Callable

from dtm_fast.compression.gptq import GPTQ
from dtm_fast.compression.int4 import Int4
from dtm_fast.compression.int8 import W8A8, Int8, LLMInt8
from dtm_fast.compression.pruning import GROUPS, Drop, Prune
from dtm_fast.compression.sparsegpt import SparseGPT
from dtm_fast.compression.sparsity import Sparsity
from dtm_fast.compression.treatment import Treatment
from dtm_fast.errors import TreatmentError


def parse_treatment(text: str) -> Treatment:
    """The treatment that ``text`` spells, such as ``int8``, ``prune(0.5)``, ``prune(2:4,wanda)``, ``gptq(64)``.

    Raises:
        TreatmentError: if it spells none.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    name, arguments = (match[1].lower(), match[2]) if match else ("", None)
    if name not in _PARSERS:
        raise TreatmentError(f"no treatment {text!r}; known: {', '.join(_PARSERS)}, as in 'prune(0.5)'")
    words = [word.strip() for word in arguments.split(",")] if arguments else []
    named = dict(word.split("=", 1) for word in words if "=" in word)
    try:
        return _PARSERS[name](*(word for word in words if "=" not in word), **named)
    except TreatmentError:
        raise
    except (TypeError, ValueError):
        raise TreatmentError(f"treatment {text!r}: wrong arguments for {name}") from None


def _prune(sparsity: str, saliency: str = "magnitude", *group: str) -> Prune:
    if saliency in GROUPS and not group:
        return Prune(_sparsity(sparsity), group=saliency)
    return Prune(_sparsity(sparsity), saliency, *group)


def _sparsegpt(sparsity: str, damp: str = "0.01", block: str = "128") -> SparseGPT:
    return SparseGPT(_sparsity(sparsity), float(damp), int(block))


def _llm_int8(threshold: str = "6") -> LLMInt8:
    return LLMInt8(float(threshold))


def _int4(group: str = "128") -> Int4:
    return Int4(_group(group))


def _gptq(group: str = "128", damp: str = "0.01") -> GPTQ:
    return GPTQ(_group(group), float(damp))


def _sparsity(text: str) -> Sparsity:
    return text if ":" in text else float(text)


def _group(text: str) -> int | None:
    return None if text == "row" else int(text)


_PARSERS: dict[str, Callable[..., Treatment]] = {
    "int8": Int8,
    "w8a8": W8A8,
    "llm_int8": _llm_int8,
    "int4": _int4,
    "gptq": _gptq,
    "prune": _prune,
    "sparsegpt": _sparsegpt,
    "drop": Drop,
}
