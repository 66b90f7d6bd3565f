"""Every method on every family: what it computes, what it saves, and that the weights stay the dense model's."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import assert_close
from tiny import FAMILIES, VOCABULARY, text, tiny, tokenizer

import sandcat
from sandcat.errors import BadRecipe, NothingMatched, PlanError, SandcatError, UnsupportedModel
from sandcat.layers import op_module
from sandcat.layers.sparse_module import sparse_modules
from sandcat.method import Seen
from sandcat.methods import METHODS, Cats, Coreinfer, Fp8, Int8, Relufy, Rsparse, Teal
from sandcat.models.view import ModelView
from sandcat.ops import MAX_TOKENS, most_tokens

DTYPES = [torch.float32, torch.bfloat16]


RECIPES = {
    "cats": ([Cats(sparsity=0.5)], None, True),
    "cats-output": ([Cats(sparsity=0.5, score="output")], None, True),
    "relufy": ([Relufy()], torch.relu, False),
    "teal": ([Teal(sparsity=0.3)], None, None),
    "teal-output": ([Teal(sparsity=0.3, score="output")], None, None),
    "rsparse": ([Rsparse(sparsity=0.3, alpha=[0.7])], None, None),
    "rsparse-weight": ([Rsparse(sparsity=0.3, alpha=[0.7], factors="weight")], None, None),
    "rsparse-search": ([Rsparse(sparsity=0.3)], None, None),
    "coreinfer": ([Coreinfer(sparsity=0.5)], None, None),
    "coreinfer-similarity": ([Coreinfer(sparsity=0.5, rule="similarity", clusters=3)], None, None),
    "coreinfer-teal": ([Coreinfer(sparsity=0.5), Teal(sparsity=0.3, sites=("o",))], None, None),
    "cats-rsparse": ([Cats(sparsity=0.3), Rsparse(sparsity=0.3, alpha=[0.7], sites=("o",))], None, True),
    "teal-head": ([Teal(sparsity=0.3, sites="all+head")], None, None),
    "cats-teal": ([Cats(sparsity=0.3), Teal(sparsity=0.3, sites=("o",))], None, True),
    "teal-cats": ([Teal(sparsity=0.3, sites=("q", "k", "v", "o", "gate")), Cats(sparsity=0.3)], None, True),
    "cats-shared": ([Cats(sparsity=0.5, batch="shared")], None, True),
    "teal-shared": ([Teal(sparsity=0.3, batch="shared")], None, None),
    "teal-cats-shared": (
        [Teal(sparsity=0.3, sites=("o", "gate"), batch="shared"), Cats(sparsity=0.3, batch="shared")],
        None,
        True,
    ),
    "int8-cats-shared": ([Int8(), Cats(sparsity=0.5, batch="shared")], None, True),
    "int8": ([Int8()], None, None),
    "int8-clip": ([Int8(clip="search", sites=("down", "o", "head"))], None, None),
    "int8-teal": ([Teal(sparsity=0.3), Int8()], None, None),
    "int8-cats": ([Int8(), Cats(sparsity=0.3, score="output")], None, True),
    "int8-teal-cats": ([Teal(sparsity=0.3, sites=("o",)), Cats(sparsity=0.3), Int8()], None, True),
    "fp8": ([Fp8()], None, None),
    "fp8-teal-cats": ([Teal(sparsity=0.3, sites=("o",)), Cats(sparsity=0.3), Fp8()], None, True),
}
"""Per recipe: the methods, the activation that they put in place of the model's, whether they mask it."""


BY_MODULE = ("int8-cats-shared", torch.bfloat16)
"""Not compared as a whole model: it puts other units on its list when the layers before it round otherwise, as its
reference does, so it is compared module by module, on the same inputs."""
WHOLE = [(recipe, dtype) for recipe in RECIPES for dtype in DTYPES if (recipe, dtype) != BY_MODULE]
THOROUGH = ("llama", "phi3")
"""Families with all recipes, in both dtypes: the common names of modules, and fused projections."""


def cases() -> Iterator[tuple[str, str, torch.dtype]]:
    """Family, recipe and dtype. Families that are not thorough take every combination of methods once: with the options
    of one recipe that has it, and in one dtype, another for the next family."""
    combinations: dict[frozenset, list[str]] = {}
    for recipe, (methods, *_) in RECIPES.items():
        combinations.setdefault(frozenset(map(type, methods)), []).append(recipe)
    for place, family in enumerate(FAMILIES):
        if family in THOROUGH:
            yield from ((family, *case) for case in WHOLE)
            continue
        for number, recipes in enumerate(combinations.values()):
            case = recipes[place % len(recipes)], DTYPES[(place // len(recipes) + number) % 2]
            yield (family, *case) if case != BY_MODULE else (family, case[0], torch.float32)


CASES = list(cases())


def test_every_method_is_here():
    assert {type(method) for methods, *_ in RECIPES.values() for method in methods} == set(METHODS)


def sparsified(family, recipe, dtype=torch.float32):
    """The dense model, the sparse one, and one that computes what the sparse one should, written independently."""
    methods, activation, masks = RECIPES[recipe]
    if recipe.startswith("teal-cats") and family == "phi3":  # whose projections are fused
        methods = [replace(methods[0], sites=("qkv", "o")), methods[1]]
    dense = tiny(family, dtype)
    sparse = copy.deepcopy(dense)
    plan = sandcat.sparsify(sparse, None, methods, calibration=text())
    expected = copy.deepcopy(dense)
    for name, module in sparse.named_modules():
        if getattr(module, "weight_scale", None) is not None:
            place = expected.get_submodule(name)
            searched = (module.weight, module.weight_scale) if "clip" in recipe else (None, None)
            place.forward = _codes(place, *searched, module.format)
    for name, module in sparse_modules(sparse).items():
        place = expected.get_submodule(name)
        if isinstance(place, torch.nn.Linear):
            place.forward = _linear(place, module)
        elif isinstance(methods[0], Coreinfer):
            place.forward = _core(place.forward, module, place)
        else:
            place.forward = _reference(place, activation, module if masks else None)
    return dense, sparse, expected, plan


def _used(scores, module):
    """What each token uses: what is above the threshold, or in a decode step the sequences' common list."""
    own = scores > module.threshold
    if scores.shape[-2] > 1 or len(scores) == 1 or module.batch == "own":
        return own
    total = (scores.double() / module.threshold.double().clamp(min=1e-15)).square().sum(0)[0]
    used = torch.zeros_like(total, dtype=torch.bool)
    for start in range(0, len(total), 16):  # the first of every sixteen, as many as a sequence keeps of them on average
        count = round(int(own[..., start : start + 16].sum()) / len(scores))
        used[start + total[start : start + 16].argsort(descending=True, stable=True)[:count]] = True
    return used.expand_as(own)


def _linear(linear, sparse):
    factors = [f for name, f in sparse.named_buffers() if "factor" in name]
    whole = linear.forward  # by codes, where the weights are stored so

    def forward(x):
        used = _used(x.abs(), sparse)
        y = whole(x * used)
        return y if not factors or used.all() else y + (x * ~used) @ factors[0].t() @ factors[1].t()

    return forward


def _core(dense, sparse, mlp):
    """Prompts whole, then the neurons that the sparse model chose (test_coreinfer.py says which it has to)."""

    seen = []
    sparse.register_forward_hook(lambda m, args, y: seen.append((m.reading().first, m.kept(args[0])[:, 0])))

    def forward(x):
        first, core = seen[-1]
        if first or x.shape[1] > 1:
            return dense(x)
        handle = mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0] * core[:, None],))
        y = dense(x)
        handle.remove()
        return y

    return forward


def _codes(linear, codes, scale, format):
    """Rounded to nearest here; only a scale that was searched for is taken from the model. More than a few tokens
    run as products in the model's dtype, which are rounded before the scale is applied too."""
    if scale is None:
        largest = {"int8": 127, "fp8": 448}[format]
        scale = (linear.weight.abs().amax(1, keepdim=True).float() / largest).to(linear.weight.dtype)
        codes = linear.weight.float() / scale.float()
        codes = codes.round() if format == "int8" else codes.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    scale, bias = scale.double().t(), 0 if linear.bias is None else linear.bias.double()
    assert (codes * scale.t() - linear.weight).abs().max() <= 0.12 * linear.weight.abs().max()

    def forward(x):
        few = x[..., 0].numel() <= most_tokens("stored_linear", "cpu", x.dtype, 0, format)
        at_once = torch.float64 if few else x.dtype
        return ((x.to(at_once) @ codes.to(at_once).t()).double() * scale + bias).to(x.dtype)

    return forward


def _reference(mlp, activation, sparse):
    fused = hasattr(mlp, "gate_up_proj")
    act = activation or (mlp.activation_fn if fused else mlp.act_fn)

    def forward(x):
        gate, up = mlp.gate_up_proj(x).chunk(2, -1) if fused else (mlp.gate_proj(x), mlp.up_proj(x))
        a = act(gate)
        return mlp.down_proj((a if sparse is None else a * _used(a.abs(), sparse)) * up)

    return forward


def test_every_family_has_every_method_and_every_recipe_some_family():
    """And two dtypes, whatever the number of families is; what is left out is a recipe's options on a family that has
    the same methods with others."""
    assert {(recipe, dtype) for _, recipe, dtype in CASES} == set(WHOLE)
    for family in FAMILIES:
        mine = [(recipe, dtype) for name, recipe, dtype in CASES if name == family]
        assert {type(method) for recipe, _ in mine for method in RECIPES[recipe][0]} == set(METHODS)
        assert {dtype for _, dtype in mine} == set(DTYPES)


@pytest.mark.parametrize("family, recipe, dtype", CASES, ids=str)
@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_equals_reference(family, recipe, dtype, monkeypatch):
    _, sparse, expected, _ = sparsified(family, recipe, dtype)
    ids = torch.randint(4, VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(1))

    def check(**inputs):
        mask = inputs.get("attention_mask")
        found, want = (model(**inputs).logits for model in (sparse, expected))
        if mask is not None:
            found, want = (logits[mask[:, -found.shape[1] :].bool()] for logits in (found, want))
        assert_close(found, want, dtype)

    check(input_ids=ids[:1, :1])
    check(input_ids=ids[:1, :5])
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, :1] = 0, 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    check(input_ids=ids, attention_mask=mask, position_ids=position_ids)
    monkeypatch.setattr(op_module, "PROMPT_CHUNK", 7)
    check(input_ids=ids)
    found, want = (  # three sequences of different lengths, one more token each
        model(
            ids[:, :1],
            attention_mask=torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1),
            position_ids=position_ids[:, -1:] + 1,
            past_key_values=model(ids, attention_mask=mask, position_ids=position_ids).past_key_values,
        ).logits
        for model in (sparse, expected)
    )
    assert_close(found, want, dtype)


@pytest.mark.parametrize("recipe, dtype", WHOLE, ids=str)
@pytest.mark.parametrize("family", THOROUGH)
@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_batches(family, recipe, dtype):
    """One more token after a prompt, for 1 to more sequences than any kernel takes."""
    _, sparse, expected, _ = sparsified(family, recipe, dtype)
    for sequences in (1, 2, 4, 5, 8, 9, MAX_TOKENS, MAX_TOKENS + 1):
        ids = torch.randint(4, VOCABULARY, (sequences, 6), generator=torch.Generator().manual_seed(sequences))
        found, want = (
            model(ids[:, 5:], past_key_values=model(ids[:, :5]).past_key_values).logits for model in (sparse, expected)
        )
        assert_close(found, want, dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_modules_that_share(family):
    _, sparse, expected, _ = sparsified(family, "int8-cats-shared", torch.bfloat16)
    modules, seen = sparse_modules(sparse), {}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args[0], y)}))
    for sequences in (2, 3, 4):
        ids = torch.randint(4, VOCABULARY, (sequences, 6), generator=torch.Generator().manual_seed(sequences))
        sparse(ids[:, 5:], past_key_values=sparse(ids[:, :5]).past_key_values)
        for name in modules:
            x, found = seen[name]
            assert x.shape[:2] == (sequences, 1)
            assert_close(found, expected.get_submodule(name)(x), torch.bfloat16)


@pytest.mark.parametrize(
    "recipe", ["cats", "teal-head", "rsparse", "coreinfer", "teal-cats-shared", "int8-teal", "fp8-teal-cats"]
)
def test_large_batches_say_that_they_are_masked(recipe):
    """Above what pays what is dropped is read, and counts as 0: what comes out is compared by `test_batches`."""
    _, sparse, *_ = sparsified("llama", recipe)
    x = torch.empty(MAX_TOKENS + 1, 1, 0)
    assert {module.step_kernel(x) for module in sparse_modules(sparse).values()} == {"masked"}
    assert {module.step_kernel(x[:1]) for module in sparse_modules(sparse).values()} == {"numba"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_all_neurons_kept_is_dense(family):
    dense = tiny(family)
    sparse = copy.deepcopy(dense)
    sandcat.sparsify(sparse, None, "cats:sparsity=0", calibration=text())
    for tokens in (1, 5, 30):
        ids = torch.randint(4, VOCABULARY, (1, tokens))
        assert_close(sparse(ids).logits, dense(ids).logits, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_dense_prompt(family):
    """The prompt is exact, what follows is sparse."""
    dense = tiny(family)
    sparse = copy.deepcopy(dense)
    sandcat.sparsify(sparse, None, "cats:sparsity=0.6,dense_prompt=true", calibration=text())
    ids = torch.randint(4, VOCABULARY, (2, 12))
    first, want = sparse(ids), dense(ids)
    assert_close(first.logits, want.logits, torch.float32)
    second, want = (
        model(ids[:, :1], past_key_values=out.past_key_values).logits for model, out in ((sparse, first), (dense, want))
    )
    assert (second - want).norm() > 0.05 * want.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_realised_sparsity_on_the_calibration_text(family):
    """Within 0.5 points of the target at every layer, for the sparse model as it runs."""
    from sandcat.calibration.seeing import FIRST_POSITIONS

    methods = [*(Cats(sparsity=0.4, score=score) for score in ("activation", "value", "output"))]
    methods += [Teal(), Teal(score="output")]
    for method in methods:
        sparse = tiny(family)
        plan = sandcat.sparsify(sparse, None, method, calibration=text())
        dropped = {}
        for name, module in sparse_modules(sparse).items():

            def count(module, args, name=name, dropped=dropped):
                dropped[name] = 1 - float(module.kept(args[0][:, FIRST_POSITIONS:].flatten(0, 1)).float().mean())

            module.register_forward_pre_hook(count)
        with torch.inference_mode():
            sparse(text().ids_NL)
        for name, spec in plan.steps[0].sites.items():
            assert abs(dropped[name] - 0.4) < 0.005
            assert abs(spec["sparsity"] - 0.4) < 0.005


@pytest.mark.parametrize("score", ["activation", "value", "output"])
@torch.no_grad()
def test_what_a_score_weights_a_neuron_by(score):
    """One threshold for all neurons, over the neuron's weight."""
    view = ModelView(tiny("llama"))
    site = next(site for site in view.sites() if site.kind == "mlp")
    x_TH = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    spec, found = Cats(sparsity=0.4, score=score).decide(site, Seen(inputs=[x_TH[:90], x_TH[90:]]))
    weight_I = torch.ones(72)
    if score != "activation":
        weight_I = site.module.up_proj(x_TH).square().mean(0).sqrt()
    if score == "output":
        weight_I = weight_I * site.module.down_proj.weight.norm(dim=0)
    torch.testing.assert_close(found["threshold"] * weight_I, torch.full((72,), spec["threshold"]))


def test_layers_option():
    for layers, chosen in (("1:", {1}), ([0], {0}), ([-1], {1}), ("all", {0, 1})):
        model = tiny("llama")
        sandcat.sparsify(model, None, Cats(layers=layers), calibration=text())
        assert {int(name.split(".")[2]) for name in sparse_modules(model)} == chosen


SCRIPT = """
import json, sys, torch
{imports}
from transformers import AutoModelForCausalLM
def load(folder):
    if folder.endswith("-codes"):
        return sandcat.load(folder, device="cpu")[0]
    return AutoModelForCausalLM.from_pretrained(folder)
out = {{}}
for folder in json.load(open(sys.argv[1])):
    model = load(folder).eval()
    with torch.inference_mode():
        out[folder] = [model(ids).logits for ids in torch.load(sys.argv[2])], model.state_dict()
torch.save(out, sys.argv[3])
"""


@pytest.mark.parametrize("part", range(2))
def test_saved_models_in_fresh_processes(tmp_path, part):
    """With sandcat imported: bit for bit the sparse model. Without: the dense one, every weight of it bit for bit (but
    where weights are codes).

    (Its logits may differ in the last bit: a mapped file puts the weights where sums come out in another order.)
    """
    import json

    prompts = [torch.randint(4, VOCABULARY, shape) for shape in ((1, 1), (1, 5), (3, 20))]
    want_sparse, want_dense = {}, {}
    for family, recipe, dtype in CASES[part::2]:
        if family in THOROUGH and dtype != DTYPES[0] and recipe != "cats-output":
            continue
        dense, sparse, _, plan = sparsified(family, recipe, dtype)
        alone = all(step.method.slot == "weight" for step in plan.steps)
        folder = tmp_path / f"{family}-{recipe}-{dtype}{'-codes' * alone}"
        if recipe == "relufy":
            sparse.save_pretrained(folder)
        else:
            sandcat.save(sparse, tokenizer(), folder)
        with torch.inference_mode():
            want_sparse[str(folder)] = [sparse(ids).logits for ids in prompts], sparse.state_dict()
            if not plan.stored.steps:
                want_dense[str(folder)] = [dense(ids).logits for ids in prompts], dense.state_dict()
    torch.save(prompts, tmp_path / "prompts.pt")
    for imports, want in (("import sandcat", want_sparse), ("assert 'sandcat' not in sys.modules", want_dense)):
        (tmp_path / "folders.json").write_text(json.dumps(list(want)))
        script = textwrap.dedent(SCRIPT.format(imports=imports))
        files = [str(tmp_path / name) for name in ("folders.json", "prompts.pt", "out.pt")]
        subprocess.run([sys.executable, "-c", script, *files], check=True, capture_output=True, timeout=880)
        found = torch.load(tmp_path / "out.pt")
        for folder, (logits, weights) in want.items():
            found_logits, found_weights = found[folder]
            assert found_weights.keys() == weights.keys(), folder
            assert all(same_bits(found_weights[name], weight) for name, weight in weights.items()), folder
            for a, b in zip(found_logits, logits, strict=True):
                if want is want_sparse:
                    assert torch.equal(a, b), folder
                else:
                    assert_close(a, b, b.dtype)


def same_bits(one, other):
    """PyTorch compares no floats of one byte."""
    return one.dtype == other.dtype and (
        torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if one.itemsize == 1 else torch.equal(one, other)
    )


@torch.inference_mode()
def test_saved_again_after_loading(tmp_path):
    _, sparse, *_ = sparsified("phi3", "cats-output")
    sandcat.save(sparse, tokenizer(), tmp_path / "one")
    again, tok = sandcat.load(tmp_path / "one", device="cpu")
    again.save_pretrained(tmp_path / "two")
    tok.save_pretrained(tmp_path / "two")
    third, _ = sandcat.load(tmp_path / "two", device="cpu")
    ids = torch.randint(4, VOCABULARY, (2, 9))
    assert torch.equal(third(ids).logits, sparse(ids).logits)


def test_a_plan_without_its_thresholds_is_refused(tmp_path):
    """As a folder is that was loaded and saved again without sandcat."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    _, sparse, *_ = sparsified("llama", "cats-output")
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "threshold" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"threshold is missing from the checkpoint"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(PlanError, match=r"threshold is missing from the checkpoint"):
        sandcat.load(folder, device="cpu")


def test_offloaded_weights_are_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    _, sparse, *_ = sparsified("llama", "cats")
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "out")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(SandcatError, match="offload"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=tmp_path / "offload")


def test_wrapped_projections_are_refused():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.up_proj is a Sequential"):
        sandcat.sparsify(model, None, "cats", calibration=text())


@torch.inference_mode()
def test_the_output_score():
    """Its threshold is t over sqrt(E[u^2]) times the norm of the neuron's column of down, computed here by hook."""
    from sandcat.calibration.seeing import FIRST_POSITIONS

    dense, words = tiny("qwen2"), text()
    seen = {}
    mlp = dense.model.layers[0].mlp
    handle = mlp.register_forward_pre_hook(lambda m, args: seen.update(x=args[0][:, FIRST_POSITIONS:].flatten(0, 1)))
    dense(words.ids_NL)
    handle.remove()
    u = mlp.up_proj(seen["x"])
    a = torch.nn.functional.silu(mlp.gate_proj(seen["x"])).abs()
    weight = u.square().mean(0).sqrt() * mlp.down_proj.weight.norm(dim=0)
    want = (a * weight).flatten().quantile(0.4) / weight
    sandcat.sparsify(dense, None, Cats(sparsity=0.4, score="output"), calibration=words)
    torch.testing.assert_close(dense.model.layers[0].mlp.threshold, want, rtol=1e-3, atol=0)


def test_sequential_or_not():
    """The first layer sees the same either way; the second sees what the first gives, sparse or dense."""
    found = []
    for sequential in (True, False):
        model = tiny("llama")
        plan = sandcat.sparsify(model, None, Cats(sparsity=0.6), calibration=text(), sequential=sequential)
        assert plan.calibration.sequential is sequential
        found.append([spec["threshold"] for spec in plan.steps[0].sites.values()])
    (first, second), (same, other) = found
    assert first == same and second != other


def test_the_order_of_a_recipe_does_not_matter():
    """Sites are decided in the order in which a layer computes them, and the model is left as it was found."""
    found = []
    for recipe in ("cats:sparsity=0.4 teal:sites=[q,o,gate]", "teal:sites=[gate,o,q] cats:sparsity=0.4"):
        model = tiny("llama")
        before = dict(model.named_modules())
        sandcat.sparsify(model, None, recipe, calibration=text(), dry_run=True)
        assert all(module is before[name] for name, module in model.named_modules())
        sandcat.sparsify(model, None, recipe, calibration=text())
        found.append({name: module.threshold for name, module in sparse_modules(model).items()})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 8
    assert all(torch.equal(threshold, found[1][name]) for name, threshold in found[0].items())


def test_sites_that_the_family_does_not_have():
    with pytest.raises(NothingMatched, match=r"no site 'q'.*qkv, o, gate_up, down"):
        sandcat.sparsify(tiny("phi3"), None, "teal:sites=[q]", calibration=text())
    for recipe in ("teal:sites=up", "teal:sparsity=1"):
        with pytest.raises(BadRecipe, match=r"neither|outside"):
            sandcat.sparsify(tiny("llama"), None, recipe, calibration=text())


@torch.inference_mode()
def test_dtype_can_change_afterwards(tmp_path):
    _, sparse, *_ = sparsified("llama", "cats")
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "out")
    ids = torch.randint(4, VOCABULARY, (1, 1))
    for model in (sparse, sandcat.load(folder, device="cpu")[0]):
        model.bfloat16().float()
        assert model(ids).logits.isfinite().all()


def test_no_matrix_is_held_twice():
    """The sparse model's memory is the dense model's, plus thresholds and factors."""

    def held(model):
        tensors = [*model.parameters(), *model.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    for family in FAMILIES:
        for recipe in ("cats", "teal", "rsparse", "coreinfer"):
            dense, sparse, *_ = sparsified(family, recipe)
            sparse(torch.randint(4, VOCABULARY, (1, 5)))
            more = sum(b.nbytes for module in sparse_modules(sparse).values() for b in module.buffers())
            assert held(sparse) == held(dense) + more
            for module in sparse_modules(sparse).values():
                assert getattr(module, "down", module).weight.t().is_contiguous()


@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_transformers_generate_in_a_padded_batch():
    """`model.generate` on three prompts of different lengths gives what each prompt alone gives."""
    tok = tokenizer()
    for family in FAMILIES:
        _, sparse, *_ = sparsified(family, "cats")
        prompts = ["Hello", "A longer prompt", "xyz"]
        batch = tok(prompts, return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        together = sparse.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for row, prompt in zip(together, prompts, strict=True):
            ids = tok(prompt, return_tensors="pt")["input_ids"]
            alone = sparse.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            assert row.tolist()[: len(alone)] == alone.tolist()


def test_compiles_in_one_graph():
    _, sparse, *_ = sparsified("llama", "cats")
    ids = torch.randint(4, VOCABULARY, (1, 1))
    with torch.inference_mode():
        step = torch.compile(lambda ids: sparse(ids, use_cache=False).logits, fullgraph=True)
        assert_close(step(ids), sparse(ids).logits, torch.float32)
