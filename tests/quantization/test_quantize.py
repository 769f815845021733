"""``quantize``: near the float model, saved and loaded to the same bits, and refused where it makes no sense."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

from inhibitor import InhibitorConfig, InhibitorError, Int8Config, convert, quantize
from inhibitor.errors import ModelError
from inhibitor.models.attention import inhibitor_layers
from inhibitor.models.int8 import integer_layers
from inhibitor.models.int8_attention import IntegerInhibitorAttention
from inhibitor.models.int8_layers import FakeInt8Embedding, FakeInt8Linear, Int8Embedding, Int8Linear
from inhibitor.quantization.samples import collect
from tests.quantization.conftest import make_student

CONFIGS = [
    Int8Config(),
    Int8Config(linear="float", embeddings="float"),
    Int8Config(attention=6, linear="fake", embeddings="fake"),
    Int8Config(weights=7),
]


PLAIN = {"reach": None, "query_gain": False}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


# What is heard is counted in steps of the value, and τ has but 22 of them here.
@pytest.mark.parametrize(
    ("config", "attention", "least"),
    [(CONFIGS[0], {}, 15), (CONFIGS[3], {}, 12), (CONFIGS[1], PLAIN, 30), (CONFIGS[1], {}, 25)],
)
def test_a_quantized_model_is_near_the_float_one(tiny_bert, batches, config, attention, least):
    student = make_student(tiny_bert, **attention)
    before = torch.cat([logits(student, batch) for batch in batches])
    assert quantize(student, config, batches) is student
    after = torch.cat([logits(student, batch) for batch in batches])
    spread = before - before.mean(0)
    assert 10 * torch.log10(spread.square().sum() / (after - before).square().sum()) > least


@pytest.mark.parametrize("attention", [{}, PLAIN], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_saved_and_loaded_it_says_the_same(tiny_bert, batches, config, attention, tmp_path):
    student = make_student(tiny_bert, **attention)
    quantize(student, config, batches).save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded.eval(), batches[0]), logits(student, batches[0]))
    names = dict(student.state_dict())
    assert names.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, names[name]), name
        assert tensor.dtype == names[name].dtype


def test_int8_means_int8_on_the_disk(student, batches, tmp_path):
    student.save_pretrained(tmp_path / "float")
    quantize(student, None, batches).save_pretrained(tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    matrices = {name for name, tensor in tensors.items() if tensor.dim() > 1 and tensor.dtype != torch.int8}
    matrices -= {name for name in matrices if name.endswith("inhibitor.query_gain")}
    scales = {name for name in tensors if name.endswith("_embeddings.scale")}
    assert len(scales) == 3
    assert matrices == scales | {"bert.pooler.dense.weight", "classifier.weight"}
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["int8"] == Int8Config().model_dump()


def test_without_the_package_it_does_not_load(student, batches, tmp_path):
    quantize(student, None, batches).save_pretrained(tmp_path)
    program = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "inhibitor-bert" in result.stderr


def test_other_dtypes_are_refused_at_loading(student, batches, tmp_path):
    quantize(student, None, batches).save_pretrained(tmp_path)
    with pytest.raises(InhibitorError, match="float32 for what is not int8"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)


def test_padding_and_neighbours_change_nothing(student, batches):
    quantize(student, None, batches)
    batch = batches[0]
    alone = {name: tensor[:1, : int(batch["attention_mask"][0].sum())] for name, tensor in batch.items()}
    torch.testing.assert_close(logits(student, alone)[0], logits(student, batch)[0], rtol=0, atol=1e-5)


def test_it_compiles_into_one_graph(student, batches):
    quantize(student, None, batches)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")(**batches[0]).logits
    torch.testing.assert_close(compiled, logits(student, batches[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_head_can_be_trained_on_top(student, batches, loaded, tmp_path):
    quantize(student, None, batches)
    if loaded:
        student.save_pretrained(tmp_path)
        student = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    student(**batches[0]).logits.sum().backward()
    assert {name for name, weight in student.named_parameters() if weight.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_softmax_class_finds_no_weights_in_its_codes(student, batches, tmp_path):
    quantize(student, None, batches).save_pretrained(tmp_path)
    _, info = BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {"encoder.layer.0.output.dense.weight", "embeddings.word_embeddings.weight"} <= set(info["missing_keys"])


@pytest.mark.parametrize("given", [[], ["ids"], [torch.zeros(1, 4)], [{"ids": torch.zeros(1, 4)}]])
def test_batches_that_are_none(student, given):
    with pytest.raises(InhibitorError, match=r"batches|sentences"):
        quantize(student, None, given)


def test_a_configuration_that_is_none(student, batches):
    with pytest.raises(InhibitorError, match="config: expected Int8Config, got dict"):
        quantize(student, {"attention": 8}, batches)  # type: ignore[arg-type]


def test_one_batch_alone(student, batches):
    both = copy.deepcopy(student)
    left, right = quantize(student, None, batches[0]), quantize(both, None, batches[:1])
    assert torch.equal(logits(left, batches[0]), logits(right, batches[0]))


def test_chosen_layers_only(tiny_bert, batches):
    model = convert(AutoModelForSequenceClassification.from_pretrained(tiny_bert), InhibitorConfig(layers=(1,))).eval()
    quantize(model, None, batches)
    assert list(integer_layers(model)) == [1]
    assert torch.isfinite(logits(model, batches[0])).all()


def test_shared_parameters_of_a_layer(tiny_bert, batches, tmp_path):
    model = convert(AutoModelForSequenceClassification.from_pretrained(tiny_bert), InhibitorConfig(per="layer")).eval()
    quantize(model, None, batches).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))


def test_what_was_learned_is_kept(student, batches):
    quantize(student, Int8Config(linear="fake", embeddings="fake"), batches)
    with torch.no_grad():
        for attention in integer_layers(student).values():
            attention.log2_value_step.add_(0.3)
        for module in student.modules():
            if isinstance(module, FakeInt8Linear):
                module.multiplier.mul_(1.01)
            elif isinstance(module, FakeInt8Embedding):
                module.weight.add_(0.01)
    trained = copy.deepcopy(student)
    quantize(student, Int8Config(), batches[:1])
    for layer, attention in integer_layers(student).items():
        assert torch.equal(attention.log2_value_step, integer_layers(trained)[layer].log2_value_step)
    # only float32's summation separates the two
    torch.testing.assert_close(logits(student, batches[0]), logits(trained, batches[0]), rtol=1e-3, atol=1e-4)


def test_it_runs_with_gradients_switched_on_but_passes_none(student, batches, tmp_path):
    quantize(student, None, batches).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for model in (student, loaded):
        assert torch.equal(model(**batches[0]).logits, logits(student, batches[0]))
        model.bert.encoder.layer[1].output.dense.bias.requires_grad_(True)
        with pytest.raises(InhibitorError, match="a gradient to pass on"):
            model(**batches[0]).logits.sum().backward()
        model.bert.embeddings.LayerNorm.requires_grad_(True)
        with pytest.raises(InhibitorError, match="an input that takes a gradient"):
            model(**batches[0])


def test_an_empty_model_has_the_parts_that_its_configuration_names(student, batches):
    quantize(student, None, batches)
    empty = type(student)(student.config)
    kinds = {name: type(module) for name, module in student.named_modules()}
    assert kinds == {name: type(module) for name, module in empty.named_modules()}
    assert {Int8Linear, Int8Embedding, IntegerInhibitorAttention} <= set(kinds.values())


def softmax(student):
    return BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()


def training(student):
    return student.train()


def halved(student):
    return student.half()


def falling(student):
    with torch.no_grad():
        inhibitor_layers(student)[1].gamma[0] = -1.0
    return student


def deaf(student):
    with torch.no_grad():
        inhibitor_layers(student)[1].get_parameter("reach")[0] = 0.0
    return student


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (softmax, "inhibitor attention"),
        (training, "evaluation mode"),
        (halved, "float32"),
        (falling, "gamma of layer 1"),
        (deaf, "reach of layer 1"),
    ],
)
def test_models_that_cannot_be_quantized(student, batches, spoil, message):
    with pytest.raises(InhibitorError, match=message):
        quantize(spoil(student), None, batches)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Int8Config(), Int8Config(), "int8 layers already|with int8 layers"),
        (CONFIGS[1], Int8Config(attention=4), "trained with 8"),
        (Int8Config(linear="fake", weights=7, embeddings="float"), Int8Config(), "8 bits, got some trained with 7"),
        (CONFIGS[2], Int8Config(attention=6, linear="float"), "linear='int8', got linear='float', for weights that"),
        (
            CONFIGS[2],
            Int8Config(attention=6, embeddings="float"),
            "embeddings='int8', got embeddings='float', for weights",
        ),
    ],
)
def test_twice(student, batches, first, second, message):
    quantize(student, first, batches)
    with pytest.raises(InhibitorError, match=message):
        quantize(student, second, batches)


def test_a_tied_output_layer_keeps_its_table(tiny_bert, batches):
    model = convert(AutoModelForMaskedLM.from_pretrained(tiny_bert)).eval()
    with pytest.raises(InhibitorError, match="Leave the embeddings in float"):
        quantize(model, None, batches)
    assert torch.isfinite(logits(quantize(model, Int8Config(embeddings="float"), batches), batches[0])).all()


@pytest.mark.parametrize(
    "spoil",
    [lambda batches: [], lambda batches: [{**batches[0], "attention_mask": batches[0]["attention_mask"] * 0}]],
)
def test_no_token_is_no_calibration(student, batches, spoil):
    with pytest.raises(InhibitorError, match="no token"):
        quantize(student, None, spoil(batches))


def test_broken_weights_are_named(student, batches):
    with torch.no_grad():
        student.bert.encoder.layer[0].attention.self.value.weight[0, 0] = torch.nan
    with pytest.raises(InhibitorError, match="NaN"):
        quantize(student, None, batches)


def test_padding_is_no_sample(tiny_bert, batches):
    padded = []
    for batch in batches:
        wide = {name: torch.nn.functional.pad(tensor, (0, 20)) for name, tensor in batch.items()}
        padded.append({**wide, "input_ids": wide["input_ids"] + 3 * (wide["attention_mask"] == 0)})
    models = [quantize(make_student(tiny_bert), None, given) for given in (batches, padded)]
    for ours, theirs in zip(*(integer_layers(model).values() for model in models), strict=True):
        torch.testing.assert_close(ours.log2_value_step, theirs.log2_value_step, rtol=0, atol=1e-5)


def test_an_int8_base_model_loads_without_its_head(student, batches, tmp_path):
    quantize(student, None, batches).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours = base(**batches[0]).last_hidden_state
        assert torch.equal(ours, student.base_model(**batches[0]).last_hidden_state)


def wide(activation):
    """A converted model of one layer, with a feed-forward part that its attention does not drown."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_act=activation,
        vocab_size=200,
    )
    model = convert(BertModel(config)).eval()
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight.mul_(40)
        model.encoder.layer[0].output.dense.weight.mul_(20)
    return model


@pytest.mark.parametrize(
    ("activation", "name"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu", "relu"), ("silu", None)]
)
def test_an_activation_becomes_one_with_the_layer_before_it(activation, name, tmp_path):
    model, batch = wide(activation), {"input_ids": torch.randint(200, (8, 16))}
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        quantize(model, None, [batch])
        layer = model.encoder.layer[0]
        assert layer.intermediate.dense.activation == name
        assert isinstance(layer.intermediate.intermediate_act_fn, torch.nn.Identity) == (name is not None)
        assert (layer.intermediate(before).dtype == torch.uint8) == (name is not None)
        after = model(**batch).last_hidden_state
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(**batch).last_hidden_state, after)
    assert 10 * torch.log10(before.square().sum() / (after - before).square().sum()) > 25


class Adapter(torch.nn.Module):
    """A linear layer with another beside it that adds nothing yet, as LoRA begins."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, torch.nn.Linear(base.in_features, base.out_features)
        torch.nn.init.zeros_(self.more.weight)
        torch.nn.init.zeros_(self.more.bias)

    def forward(self, x):
        return self.base(x) + self.more(x)


@pytest.mark.parametrize("path", ["intermediate.dense", "output.dense", "attention.self.query"])
def test_a_wrapped_layer_loses_neither_its_activation_nor_its_grid(path):
    model, batch = wide("gelu"), {"input_ids": torch.randint(200, (8, 16))}
    layer = model.encoder.layer[0]
    layer.set_submodule(path, Adapter(layer.get_submodule(path)))
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        after = quantize(model, None, [batch])(**batch).last_hidden_state
    assert 10 * torch.log10(before.square().sum() / (after - before).square().sum()) > 20


def test_tokens_are_taken_from_all_over_the_rows(tiny_bert, tokenizer):
    """However many batches there are: of each one token, not its first."""
    student, ids = make_student(tiny_bert), torch.randint(5, 30, (1, 16))
    ids[:, 0] = tokenizer.cls_token_id
    batches = [{"input_ids": ids.roll(shift, 1)[:, :16]} for shift in range(16)] * 70
    for batch in batches:
        batch["input_ids"][:, 0] = tokenizer.cls_token_id
    first = student.base_model.encoder.layer[0].attention.self.query
    kept = collect(student, batches, {"first": first}).inputs["first"]
    assert len(kept) == len(batches)
    assert len(kept.unique(dim=0)) > 50


def test_ids_that_no_table_has_are_refused_as_by_the_float_model(student, batches):
    for ids in (torch.tensor([[5, -1]]), torch.tensor([[5, 10_000]])):
        with pytest.raises(IndexError):
            student(input_ids=ids)
    quantize(student, None, batches)
    for ids in (torch.tensor([[5, -1]]), torch.tensor([[5, 10_000]])):
        with pytest.raises(IndexError):
            student(input_ids=ids)
    with pytest.raises(ModelError, match=r"embeddings in int8.*Resize the float model"):
        student.resize_token_embeddings(200)


def test_distilbert_with_sinusoidal_positions_comes_back(batches, tmp_path):
    config = DistilBertConfig(
        vocab_size=200,
        dim=32,
        n_layers=1,
        n_heads=2,
        hidden_dim=48,
        sinusoidal_pos_embds=True,
        max_position_embeddings=64,
    )
    batch = {name: tensor for name, tensor in batches[0].items() if name != "token_type_ids"}
    model = quantize(convert(DistilBertModel(config)).eval(), None, [batch])
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_codes_are_given_to_one_grid_only():
    model, batch = wide("gelu"), {"input_ids": torch.randint(200, (8, 16))}
    quantize(model, Int8Config(linear="fake", embeddings="float"), [batch])
    model.encoder.layer[0].output.dense.multiplier[3] *= 2
    with pytest.raises(InhibitorError, match="one multiplier in the layer that reads them, got activation gelu"):
        quantize(model, Int8Config(embeddings="float"), [batch])
