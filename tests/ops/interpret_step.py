"""Runs the fused step on the CPU by Triton's interpreter and compares it with the step of transformers.

python tests/ops/interpret_step.py float|int8|deterministic|batch|layers|launches ...

A program of its own, for the same reason as interpret_triton.py.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import interpreted  # before the kernels
import torch
from layer_classes import RECIPES as LAYERS
from layer_classes import in_a_subclass, with_class
from tiny import VOCABULARY, text, tiny

import sandcat
from sandcat.decoding.decoder import Decoder
from sandcat.layers.head_plan import HeadPlan, follow_head_plans
from sandcat.ops import FORMATS, pays
from sandcat.ops.triton.primitives import launch

everywhere = itertools.product(pays._ALL, ["cpu"], pays._FLOATS, FORMATS)
pays._MOST_TOKENS = dict.fromkeys(everywhere, (16, 16))  # several sequences skip, too
launch.multiprocessors = lambda device: 2
launch.shared_memory = lambda device: 200000
launch.dependent_launch = lambda device: {"PDL": False}

from sandcat.decoding import step as decode_step  # whose kernels ask for these as they are imported

decode_step.kernel_name = lambda *_: "triton"


def logits(model, ids):
    """Of the steps after 20 tokens, of several sequences after so many with their padding; and the decoder."""
    decoder = Decoder(model, ids.shape[1], compile=None, batch=len(ids))
    pad_B = torch.tensor([0, 13, 3])[: len(ids), None]
    decoder.prefill(ids[:, :20], torch.arange(20) >= pad_B)
    return [decoder.step(ids[:, i : i + 1]) for i in range(20, ids.shape[1])], decoder


RECIPES = {
    "float": [
        *(("llama", r) for r in (None, "cats:layers=1:", "teal", "teal:sites=[k,up,down],layers=:1")),
        ("llama", "teal:sites=[q,k,v,o,gate] cats"), ("mistral", None), ("mistral", "teal:sites=[o,gate]"),
        ("qwen2", "cats"), ("qwen2", "teal"), ("qwen3", None), ("qwen3", "teal:sites=[q,k,v,o,gate] cats"),
        ("llama", "teal:sites=all+head"), ("llama", "rsparse:alpha=[0.5]"),
        ("biased llama", "rsparse:alpha=[0.6],sites=[k,o,up]"), ("biased llama", "teal:sites=[down]"),
        ("biased llama", "cats"),
    ],
    "int8": [
        *(("llama", f"int8{rest}") for rest in ("", " teal", " cats", " teal:sites=[q,k,v,o,gate] cats:layers=:")),
        ("llama", "int8:sites=[k,gate,o] teal:sites=[q,down,head]"), ("llama", "int8:sites=[down,head],layers=1: cats"),
        ("qwen2", "int8:sites=[q,k,v,up] cats"), ("qwen2", "int8 teal:sites=all+head"),
        ("llama", "fp8"), ("llama", "fp8:sites=[q,gate,down] int8:sites=[k,up,o] teal"), ("llama", "fp8 cats"),
        ("llama", "int8 rsparse:alpha=[0.5],sparsity=0.1"), ("llama", "fp8 rsparse:alpha=[0.5],sparsity=0.1"),
    ],
    "deterministic": [
        ("llama", "cats"), ("llama", "rsparse:alpha=[0.5]"), ("llama", "int8 teal:sites=[q,k,v,o,gate] cats"),
    ],
    "batch": [
        ("llama", None), ("llama", "teal:layers=:"), ("llama", "teal:batch=shared"), ("llama", "int8"),
        ("qwen2", "int8 teal"),
        ("llama", "teal:sites=[q,k,v,o,gate],batch=shared cats:batch=shared"), ("mistral", "cats"), ("qwen3", "teal"),
        ("llama", "int8:sites=[k,gate,o] teal:sites=[q,down,head]"), ("qwen2", "int8 teal:sites=all+head,batch=shared"),
        ("llama", "int8 cats"), ("llama", "int8:sites=[q,up] teal:batch=shared"), ("llama", "fp8"),
        ("qwen2", "fp8 teal"), ("llama", "rsparse:alpha=[0.5]"), ("qwen2", "int8 rsparse:alpha=[0.5],sparsity=0.1"),
        ("biased llama", "rsparse:alpha=[0.6],sites=[v,o,up]"),
    ],
}  # fmt: skip
REFUSED = ("CoreMLP",)
"""Classes of layers that no fused step computes, as they need the model's forward."""


def check(family, recipe, sequences, **sizes):
    options = {"mlp_bias": False} if family == "llama" else {}
    family = family.removeprefix("biased ")
    window = {"sliding_window": 4} if family == "mistral" else {}
    if recipe and "layers" not in recipe:  # what one layer leaves for the next, dense ones and some of these show
        sizes["num_hidden_layers"] = 1
    model = tiny(family, tie_word_embeddings="int8" in (recipe or ""), **options, **window, **sizes)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    assert compare(model, sequences)


def compare(model, sequences, steps=2):
    """Whether the step applies; then it equals that of transformers, and so does what it caches."""
    ids = torch.randint(4, VOCABULARY, (sequences, 20 + steps))
    want, decoder = logits(model, ids)
    cache = paged(model, decoder, 20)
    step = cache and decode_step.fused_step(model, cache)
    if step is None:
        return False
    for i, expected in enumerate(want):
        torch.testing.assert_close(step(ids[:, 20 + i : 21 + i]), expected, rtol=1e-4, atol=1e-5)
    assert cache.length_B.tolist() == [20 + steps - pad for pad in cache.pads]
    for layer, other in zip(cache.layers, decoder.cache.layers, strict=True):
        for found, want in zip(layer.gathered(cache.length_B.tolist()), (other.keys, other.values), strict=True):
            for b, pad in enumerate(cache.pads):
                fewest = min(layer.most_pages(head) for head in range(layer.shape[1]))
                first = max(pad, 20 + steps - fewest * cache.page)
                torch.testing.assert_close(found[b, :, first:], want[b, :, first:], rtol=1e-4, atol=1e-5)
    return True


def paged(model, decoder, tokens):
    """The cache of the fused step after so many tokens of those that a decoder has cached; None where none applies."""
    shape = decoder.cache.layers[0].keys.shape
    cache = decode_step.cache_of_step(model, shape[2], shape[0])
    if cache is not None:
        cache.begin(decoder.cache.pads)
        cache.lay_out(decoder.cache.layers[0].keys)
        cache.pool.keys.fill_(float("nan"))
        cache.pool.values.fill_(float("nan"))
        for layer, other in zip(cache.layers, decoder.cache.layers, strict=True):
            layer.update(other.keys[:, :, :tokens], other.values[:, :, :tokens])
    return cache


def check_layers(name, recipe, applies, sequences):
    """A class of layer in a step: it is computed, or refused; and so is a subclass, which is something else."""
    model = with_class(name, recipe, mlp_bias=False, num_hidden_layers=1)
    assert compare(model, sequences, steps=1) == applies, (name, recipe, sequences)
    in_a_subclass(next(module for module in model.modules() if type(module).__name__ == name))
    assert compare(model, sequences, steps=1) == applies, (name, recipe, sequences)


def check_heads(sequences):
    """Heads that keep a window beside some that keep all, which is run as several sequences are, one too."""
    model = tiny("llama", mlp_bias=False)
    for layer in model.model.layers:
        layer.self_attn.cache = HeadPlan([4, 0])
    follow_head_plans(model)
    assert compare(model, sequences)


def check_rounding(recipe):
    """In float16, over all steps: of a single one the roundings differ by more."""
    model = tiny("llama", torch.float16, mlp_bias=False)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    torch.manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (1, 24))
    want, decoder = logits(model, ids)
    step = decode_step.fused_step(model, paged(model, decoder, 20))
    found = [step(ids[:, i : i + 1]).clone() for i in range(20, 24)]
    exact, _ = logits(model.float(), ids)
    ours, theirs = ((torch.stack(logits) - torch.stack(exact)).norm() for logits in (found, want))
    assert ours <= 1.5 * theirs, (ours, theirs)


def check_all(kind):
    torch.use_deterministic_algorithms(kind == "deterministic")
    decode_step.PAGE = 8  # so that sequences have several
    sequences = 3 if kind == "batch" else 1
    for family, recipe in RECIPES[kind]:
        print(family, recipe, flush=True)
        check(family, recipe, sequences)
    recipe = {"int8": "int8", "batch": "int8 teal:batch=shared"}.get(kind)
    check("llama", recipe, sequences, hidden_size=320)  # more than one slice of the columns
    check_rounding("int8" if kind == "int8" else None)
    if kind == "batch":
        check_heads(3)
        check_heads(1)
    torch.use_deterministic_algorithms(False)
    return len(RECIPES[kind]) + (4 if kind == "batch" else 2)


def check_classes():
    cases = [(name, recipe, batch) for name, recipes in LAYERS.items() for recipe in recipes for batch in (1, 3)]
    for name, recipe, batch in cases:
        print(name, recipe, batch, flush=True)
        check_layers(name, recipe, name not in REFUSED, batch)
    return len(cases)


LAUNCHES = [
    ("llama", None, 1, 5), ("llama", "teal", 1, 5), ("llama", "cats", 1, 5), ("llama", "int8", 1, 5),
    ("llama", "int8 teal", 1, 5), ("llama", "teal:sites=[q,k,v,o,gate] cats", 1, 5), ("qwen3", None, 1, 5),
    ("llama", "teal:sites=[q]", 1, 6), ("llama", "rsparse:alpha=[0.5]", 1, 19),
    ("llama", None, 3, 4), ("llama", "teal", 3, 11), ("llama", "int8", 3, 11), ("llama", "cats", 3, 3),
]  # fmt: skip
"""Kernels of ours that a layer has, by family, recipe and sequences."""


def check_launches():
    """How many a layer has: what two layers have more than one."""
    for family, recipe, sequences, want in LAUNCHES:
        print(family, recipe, sequences, flush=True)
        more, fewer = (launches(family, recipe, sequences, layers) for layers in (2, 1))
        assert more - fewer == want, (family, recipe, sequences, more, fewer)
    return len(LAUNCHES)


def launches(family, recipe, sequences, layers):
    """Of a step of a model with so many layers."""
    model = tiny(family, num_hidden_layers=layers, **({"mlp_bias": False} if family == "llama" else {}))
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    ids, decoder = torch.randint(4, VOCABULARY, (sequences, 9)), Decoder(model, 9, batch=sequences)
    decoder.prefill(ids[:, :8])
    step, kernels = decode_step.fused_step(model, decoder.cache), []
    run, interpreted.Launch.__call__ = interpreted.Launch.__call__, lambda *_, **__: kernels.append(None)
    try:
        step(ids[:, 8:])
    finally:
        interpreted.Launch.__call__ = run
    return len(kernels)


CHECKS = {"layers": check_classes, "launches": check_launches}

with torch.inference_mode():
    for kind in sys.argv[1:]:
        count = CHECKS[kind]() if kind in CHECKS else check_all(kind)
        print(f"{kind}: {count} are right")
