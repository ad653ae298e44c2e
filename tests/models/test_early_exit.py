"""The output of one layer: what the model itself says it is, and nothing computed above it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.decoders import CONFIGS, LAYERS
from support.models import VOCAB, collate, examples, tiny_llama
from transformers import AutoModelForCausalLM

from blur_trainer.models.early_exit import activations, ending_at
from blur_trainer.models.layers import check_layer, find_layers

BATCH = collate(examples(4))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def hidden(model, layer):
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]


def calls(model, action):
    """How often each layer, the final norm's parent aside, is called during `action`."""
    counts = [0] * LAYERS
    handles = []
    for index, layer in enumerate(find_layers(model)[2]):

        def count(*_, index=index):
            counts[index] += 1

        handles.append(layer.register_forward_hook(count))
    action()
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("layer", [0, 1])
def test_exactly_what_the_model_says(model, layer):
    assert torch.equal(activations(model, BATCH, layer), hidden(model, layer))


def test_the_last_layer_is_before_the_norm(model):
    seen = []
    handle = find_layers(model)[2][LAYERS - 1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    answer = hidden(model, LAYERS - 1)
    handle.remove()
    assert torch.equal(activations(model, BATCH, LAYERS - 1), seen[0])
    assert not torch.equal(answer, seen[0])


def test_nothing_above_is_called_or_gets_a_gradient(model):
    model.zero_grad()
    assert calls(model, lambda: activations(model, BATCH, 1).square().sum().backward()) == [1, 1, 0]
    names = [name for name, _ in find_layers(model)[2][:2].named_parameters()]
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    below = {id(p) for p in find_layers(model)[2][:2].parameters()}
    embedded = {id(p) for p in model.get_input_embeddings().parameters()}
    assert names and below <= with_gradient
    others = with_gradient - below - embedded
    assert len(others) <= 1, "GPT-2's positions at most"
    model.zero_grad()


def test_the_gradient_is_that_of_the_whole_model(model):
    parameters = list(find_layers(model)[2][:2].parameters())
    got = torch.autograd.grad(activations(model, BATCH, 1).square().sum(), parameters)
    want = torch.autograd.grad(hidden(model, 1).square().sum(), parameters)
    assert all(torch.allclose(g, w, rtol=1e-5, atol=1e-6) for g, w in zip(got, want, strict=True))


def test_the_head_sees_one_position(model):
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(out.shape[1]))
    activations(model, BATCH, 0)
    handle.remove()
    assert shapes == [1]


def test_the_model_is_as_before(model):
    layers, before = find_layers(model)[2], set(vars(model))
    full = hidden(model, 1)
    activations(model, BATCH, 0)
    with pytest.raises(IndexError):
        activations(model, {**BATCH, "input_ids": BATCH["input_ids"] + VOCAB}, 0)
    assert find_layers(model)[2] is layers and set(vars(model)) == before
    assert torch.equal(hidden(model, 1), full)


def test_an_own_forward_is_given_back():
    """accelerate's autocast, and the fused head, are attributes of the model itself."""
    model = tiny_llama()
    plain, seen = model.forward, []

    def own(*args, **kwargs):
        seen.append(1)
        return plain(*args, **kwargs)

    model.forward = own
    activations(model, BATCH, 0)
    assert seen == [1] and model.forward is own


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    model = tiny_llama(layers=LAYERS)
    want = torch.autograd.grad(activations(model, BATCH, 1).square().sum(), model.model.layers[0].mlp.up_proj.weight)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert calls(model, lambda: activations(model, BATCH, 1).square().sum().backward())[2] == 0
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, want[0])


def test_through_an_adapter():
    model = get_peft_model(
        tiny_llama(layers=LAYERS), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    assert torch.equal(activations(model, BATCH, 1), hidden(model, 1))
    with model.disable_adapter():
        assert torch.equal(activations(model, BATCH, 1), hidden(tiny_llama(layers=LAYERS), 1))


@pytest.mark.full
def test_through_a_compiled_model():
    plain = tiny_llama(layers=LAYERS)
    model = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    for _ in range(2):  # whole, cut, whole, cut: nothing of one is taken for the other
        torch.testing.assert_close(hidden(model, 1), hidden(plain, 1))
        torch.testing.assert_close(activations(model, BATCH, 0), hidden(plain, 0))
        torch.testing.assert_close(activations(model, BATCH, 1), hidden(plain, 1))


def compilations(model, batches, layers):
    """How often `torch.compile` compiles while the batches go through the model, each up to every layer."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled, counts = torch.compile(model, backend=backend), []
    for inputs in batches:
        for layer in layers:
            activations(compiled, inputs, layer).sum().backward()
        counts.append(len(graphs))
    torch.compiler.reset()
    return counts


def test_compiled_once_and_not_per_call():
    assert compilations(tiny_llama(layers=2), [BATCH] * 3, [0]) == [1, 1, 1]


def autocast():
    """As accelerate: an own `forward`."""
    model = tiny_llama(layers=LAYERS)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def adapted():
    return get_peft_model(tiny_llama(layers=LAYERS), LoraConfig(r=2, target_modules="all-linear"))


@pytest.mark.full
@pytest.mark.parametrize("make", [lambda: tiny_llama(layers=LAYERS), autocast, adapted])
def test_compiled_once_per_layer_and_once_more_for_other_shapes(make):
    """The second shape makes it compile for any."""
    others = [{name: value[:, :-cut] for name, value in BATCH.items()} for cut in (1, 2)]
    assert compilations(make(), [BATCH, BATCH, *others, BATCH], [0, 1]) == [2, 2, 4, 4, 4]


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_no_such_layer(layer):
    model = tiny_llama(layers=LAYERS)
    with pytest.raises(ValueError, match=f"layers 0 to {LAYERS - 1}, and no layer {layer}"):
        activations(model, BATCH, layer)
    with pytest.raises(ValueError, match=r"`who`: .*layers 0 to 2"):
        check_layer(model, layer, "`who`")


def test_no_model_inside():
    with pytest.raises(TypeError, match="no `PreTrainedModel` inside"):
        find_layers(torch.nn.Linear(2, 2))


def test_several_lists_of_layers():
    model = tiny_llama(layers=LAYERS)
    model.model.others = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
    with pytest.raises(TypeError, match="2 lists of 3 layers"):
        find_layers(model)


def test_every_layer_is_registered_inside():
    """FSDP2 looks around at its first call, which may be a cut one."""
    model = tiny_llama(layers=LAYERS)
    names = [name for name, _ in model.named_parameters()]
    with ending_at(model, 0):
        assert [name for name, _ in model.named_parameters()] == names and len(model.model.layers) == 1
