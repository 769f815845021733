"""Conversion, saving, loading: an inhibitor model stays one, or fails loudly."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertModel,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    MPNetConfig,
    RobertaConfig,
    pipeline,
)

import inhibitor
from inhibitor.errors import InhibitorError, ModelError
from inhibitor.models import classes
from inhibitor.models.attention import NAME, InhibitorAttention, inhibitor_layers
from inhibitor.models.config import InhibitorConfig
from inhibitor.models.families import FAMILIES, longest_input

SIZES = {"vocab_size": 64, "max_position_embeddings": 64, "num_labels": 3, "initializer_range": 0.3}
ACTIVE = InhibitorConfig(delta=0.0)  # with small random weights, a larger shift would inhibit every value
CONFIGS = {
    "bert": lambda: AutoConfig.for_model(
        "bert", **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
    "distilbert": lambda: DistilBertConfig(**SIZES, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "electra": lambda: ElectraConfig(
        **SIZES,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    ),
    "roberta": lambda: RobertaConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=1
    ),
}


def softmax_model(family="bert", auto_class=AutoModelForSequenceClassification):
    torch.manual_seed(0)
    return auto_class.from_config(CONFIGS[family]()).eval()


def batch(lengths=(9, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 64, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.long()}


def test_every_family_has_a_test_model():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification, AutoModelForMaskedLM])
def test_save_and_load_give_the_same_bits(family, auto_class, tmp_path):
    model = inhibitor.convert(softmax_model(family, auto_class), ACTIVE)
    with torch.no_grad():
        for attention in inhibitor_layers(model).values():
            for parameter in attention.parameters():
                parameter.add_(torch.rand_like(parameter))
        before = model(**batch())[0]
        model.save_pretrained(tmp_path)
        loaded = auto_class.from_pretrained(tmp_path).eval()
        after = loaded(**batch())[0]
    assert type(loaded) is type(model)
    assert type(loaded).__name__.startswith("Inhibitor")
    assert torch.equal(before, after)


def test_a_student_saved_before_there_was_a_reach_stays_what_it_was(tmp_path):
    """Its configuration does not speak of a reach or gains, and new ones would change what it says."""
    model = inhibitor.convert(softmax_model(), InhibitorConfig(delta=0.0, reach=None, query_gain=False)).eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved[NAME]["reach"], saved[NAME]["query_gain"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch())[0], model(**batch())[0])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").inhibitor == model.config.inhibitor
    assert loaded.config.inhibitor == model.config.inhibitor  # whole, for all that read it


def test_a_model_that_gave_its_attentions_unasked_can_be_saved(tmp_path):
    config = CONFIGS["bert"]()
    config._attn_implementation, config.output_attentions = "eager", True
    model = inhibitor.convert(BertModel(config).eval())
    assert model(**batch()).attentions is None
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model)


def test_a_class_takes_the_arguments_of_transformers(tmp_path):
    model = inhibitor.convert(softmax_model())
    model.save_pretrained(tmp_path)
    assert type(type(model).from_pretrained(pretrained_model_name_or_path=tmp_path)) is type(model)


def test_gains_of_a_model_in_float64_are_in_float64():
    attention = InhibitorAttention(InhibitorConfig(delta=0.0), 2, 4).double()
    assert attention.query_gain is not None
    torch.nn.init.normal_(attention.query_gain, generator=torch.Generator().manual_seed(0))
    query, key, value = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def call(query: torch.Tensor) -> torch.Tensor:
        return attention.forward(query, key, value, None, False, 0.5)

    assert torch.autograd.gradcheck(call, query.requires_grad_())


def test_without_the_package_loading_fails_loudly(tmp_path):
    inhibitor.convert(softmax_model()).save_pretrained(tmp_path)
    program = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "inhibitor-bert" in result.stderr


def test_it_is_not_softmax_any_more():
    model = softmax_model()
    with torch.no_grad():
        before = model(**batch()).logits
        after = inhibitor.convert(model)(**batch()).logits
    assert not torch.allclose(before, after, atol=1e-4)


def test_weights_stay_and_only_inhibitor_parameters_are_added():
    model = softmax_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = inhibitor.convert(model).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    added = {name.rpartition(".inhibitor.")[2] for name in after.keys() - before.keys()}
    assert added == {"gamma", "eta", "delta", "length_exponent", "reach", "query_gain"}


def test_the_papers_attention_has_the_papers_parameters():
    model = inhibitor.convert(softmax_model(), InhibitorConfig(reach=None, query_gain=False))
    names = {name for attention in inhibitor_layers(model).values() for name in attention.state_dict()}
    assert names == {"gamma", "eta", "delta", "length_exponent"}


@pytest.mark.parametrize(("per", "size"), [("head", 4), ("layer", 1)])
def test_parameters_per_head_or_per_layer(per, size):
    model = inhibitor.convert(softmax_model(), InhibitorConfig(per=per, gamma=0.7))
    for attention in inhibitor_layers(model).values():
        assert attention.gamma.tolist() == pytest.approx([0.7] * size)


def test_chosen_layers_only(tmp_path):
    model = inhibitor.convert(softmax_model(), InhibitorConfig(layers=(1,)))
    assert list(inhibitor_layers(model)) == [1]
    plain = softmax_model()
    with torch.no_grad():
        ours = model(**batch(), output_hidden_states=True).hidden_states
        theirs = plain(**batch(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours[1], theirs[1])
    assert not torch.allclose(ours[2], theirs[2], atol=1e-4)
    model.save_pretrained(tmp_path)
    assert list(inhibitor_layers(AutoModel.from_pretrained(tmp_path))) == [1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_input_is_read_and_no_longer_one(family):
    model = softmax_model(family, AutoModel)
    longest = longest_input(model)
    assert longest is not None
    assert model(torch.full((1, longest), 7)).last_hidden_state.shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    model = inhibitor.convert(softmax_model(family), ACTIVE)
    together = batch((9, 4, 1))
    with torch.no_grad():
        logits = model(**together).logits
        for row, length in enumerate((9, 4, 1)):
            alone = {name: tensor[row : row + 1, :length] for name, tensor in together.items()}
            torch.testing.assert_close(model(**alone).logits[0], logits[row], atol=1e-5, rtol=1e-5)


def test_output_attentions_is_the_inhibition():
    model = inhibitor.convert(softmax_model())
    inputs = batch((6, 3))
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    assert [tuple(z.shape) for z in attentions] == [(2, 4, 6, 6)] * 2
    assert bool((attentions[0] >= 0).all())
    assert bool(torch.isinf(attentions[0][1, :, :, 3:]).all())
    assert bool(torch.isfinite(attentions[0][0]).all())


def test_output_attentions_are_asked_of_a_call(tmp_path):
    model = inhibitor.convert(softmax_model())
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"output_attentions: .* Call model\("):
        model.config.output_attentions = True
    with pytest.raises(ModelError, match=r"output_attentions: .* Call model\("):
        AutoModel.from_pretrained(tmp_path, output_attentions=True)
    assert AutoModel.from_pretrained(tmp_path, output_attentions=False).config.output_attentions is False


def test_output_attentions_of_some_layers_alone_is_refused():
    model = inhibitor.convert(softmax_model(), InhibitorConfig(layers=(1,)))
    with pytest.raises(ModelError, match="output_attentions"):
        model(**batch(), output_attentions=True)


def test_a_model_goes_through_pickle_into_another_process(tmp_path):
    model = inhibitor.convert(softmax_model(), ACTIVE)
    with torch.no_grad():
        logits = model(**batch()).logits
    (tmp_path / "model").write_bytes(pickle.dumps((model, batch(), logits)))
    program = """import pickle, sys, torch
model, batch, logits = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    assert torch.equal(model(**batch).logits, logits)
print(type(model).__name__, type(model.base_model).__name__, type(model.config).__name__)"""
    command = [sys.executable, "-c", program, str(tmp_path / "model")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["InhibitorBertForSequenceClassification", "InhibitorBertModel", "InhibitorBertConfig"]


def test_the_module_of_the_classes_knows_no_other_name():
    assert classes.InhibitorBertModel is type(inhibitor.convert(softmax_model(auto_class=AutoModel)))
    for name in ("InhibitorGPT2Model", "InhibitorAutoModel", "BertModel", "Inhibitor"):
        with pytest.raises(AttributeError, match=name):
            getattr(classes, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loaded", [False, True])
def test_the_model_within_cannot_be_set_to_softmax_either(family, loaded, tmp_path):
    model = inhibitor.convert(softmax_model(family))
    if loaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for part in (model, model.base_model):
        with pytest.raises(ModelError, match="attn_implementation"):
            part.set_attn_implementation("sdpa")


@pytest.mark.parametrize("loaded", [False, True])
def test_hidden_states_are_reported(loaded, tmp_path):
    model = inhibitor.convert(softmax_model(auto_class=AutoModel))
    if loaded:
        model.save_pretrained(tmp_path)
        model = AutoModel.from_pretrained(tmp_path)
    assert len(model(**batch(), output_hidden_states=True).hidden_states) == 3


def test_pipelines_work(tiny_bert, tmp_path):
    from transformers import AutoTokenizer

    inhibitor.convert(AutoModelForSequenceClassification.from_pretrained(tiny_bert)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    answers = pipeline("text-classification", model=str(tmp_path))(["the film is good", "bad"])
    assert [set(answer) for answer in answers] == [{"label", "score"}] * 2


def test_gradients_reach_every_parameter():
    model = inhibitor.convert(softmax_model(auto_class=AutoModel), ACTIVE).train()
    model(**batch((9, 9))).last_hidden_state.square().sum().backward()
    unmoved = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unmoved <= {"pooler.dense.weight", "pooler.dense.bias"}
    gradients = [layer.gamma.grad for layer in inhibitor_layers(model).values()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_the_configuration_of_other_models_is_left_alone():
    config = CONFIGS["bert"]()
    first, second = BertModel(config), BertModel(config)
    inhibitor.convert(first)
    assert second.config.model_type == "bert"
    assert second.config._attn_implementation != NAME


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: inhibitor.convert(AutoModel.from_config(MPNetConfig(**SIZES, hidden_size=32, num_hidden_layers=1,
                                                                     num_attention_heads=2, intermediate_size=8))),
         "MPNetModel"),
        (lambda: inhibitor.convert(AutoModel.from_config(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))),
         "GPT2Model"),
        (lambda: inhibitor.convert(inhibitor.convert(softmax_model())), "converted"),
        (lambda: inhibitor.convert(softmax_model(), InhibitorConfig(layers=(2,))), "layers"),
        (lambda: inhibitor.convert(softmax_model(), InhibitorConfig(layers=())), "layers"),
        (lambda: inhibitor.convert(softmax_model()).set_attn_implementation("sdpa"), "attn_implementation"),
        (lambda: softmax_model().set_attn_implementation(NAME) or softmax_with(NAME), "convert"),
    ],
    ids=["no interface", "no entry", "twice", "layer out of range", "no layer", "back to softmax", "name alone"],
)  # fmt: skip
def test_refusals_name_the_fault(make, word):
    with pytest.raises(ModelError, match=word):
        make()


def softmax_with(implementation):
    model = softmax_model()
    model.set_attn_implementation(implementation)
    return model(**batch())


def test_loading_with_another_attention_is_refused(tmp_path):
    inhibitor.convert(softmax_model()).save_pretrained(tmp_path)
    with pytest.raises(InhibitorError, match="attn_implementation"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")


def test_a_checkpoint_that_lost_its_inhibitor_section_is_refused(tmp_path):
    import json

    inhibitor.convert(softmax_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["inhibitor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="inhibitor"):
        AutoModel.from_pretrained(tmp_path)


def test_a_model_from_a_folder_changes_its_type_too(tiny_bert):
    model = inhibitor.convert(AutoModel.from_pretrained(tiny_bert))
    assert model.config.model_type == "inhibitor-bert"
    with pytest.raises(InhibitorError, match="a converted one"):
        inhibitor.convert(model)


@pytest.mark.parametrize("given", ["minilm", nn.Linear(2, 2), nn.DataParallel(BertModel(CONFIGS["bert"]()))])
def test_what_is_no_model_of_transformers_is_refused(given):
    with pytest.raises(ModelError, match="expected PreTrainedModel"):
        inhibitor.convert(given)


def test_plain_data_is_no_configuration():
    with pytest.raises(ModelError, match=r"expected InhibitorConfig, got dict\. InhibitorConfig\.parse"):
        inhibitor.convert(softmax_model(), {"per": "layer"})  # type: ignore[arg-type]
