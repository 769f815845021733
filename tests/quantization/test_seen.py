"""What the integers of a quantised model say about its grids."""

import pytest
import torch

from inhibitor import Int8Config, quantize
from inhibitor.models.attention import contexts
from inhibitor.models.int8 import integer_layers
from inhibitor.ops.integer_grid import ZERO, quantize_query_key, quantize_value
from inhibitor.quantization.seen import clipped_shares

ATTENTION = Int8Config(linear="float", embeddings="float")


@pytest.mark.parametrize("bits", [8, 4])
def test_clipped_is_what_its_code_misses_by_more_than_half_a_step(student, batches, bits):
    quantize(student, ATTENTION.model_copy(update={"attention": bits}), batches)
    with torch.no_grad():
        for attention in integer_layers(student).values():
            attention.log2_query_key_step.sub_(1.5)  # so that something is clipped
            attention.log2_value_step.sub_(1.0)
        tapped = [(contexts(student, batch), batch["attention_mask"].bool()) for batch in batches]
        for layer, shares in clipped_shares(student, batches).items():
            attention = integer_layers(student)[layer]
            steps = dict(zip(("query_key", "value"), attention.steps(), strict=True))
            missed: dict[str, list[torch.Tensor]] = {"query_key": [], "value": []}
            for taps, real in tapped:
                for name in ("query", "key", "value"):
                    side = "value" if name == "value" else "query_key"
                    x, step = getattr(taps[layer], name), steps[side]
                    codes = quantize_value(x, step, bits) if name == "value" else quantize_query_key(x, step, bits)
                    nearest = (codes.double() - (0 if name == "value" else ZERO)) * step.view(-1, 1, 1)
                    error = (x - nearest).abs() / step.view(-1, 1, 1)
                    missed[side].append((error.transpose(1, 2)[real] > 0.5 + 1e-4).flatten())
            for side, found in missed.items():
                assert 0 < shares[side] < 0.9
                assert shares[side] == pytest.approx(torch.cat(found).double().mean().item(), abs=1e-9)


def test_calibrated_values_are_not_clipped(student, batches):
    quantize(student, ATTENTION, batches)
    shares = clipped_shares(student, batches)
    assert list(shares) == [0, 1]
    assert all(0 <= share["query_key"] < 0.05 for share in shares.values())
    assert shares[0]["value"] == 0  # nothing in front of the first layer was rounded


def test_outliers_and_empty_channels_leave_a_finite_model_and_are_counted(student, batches):
    projection = student.bert.encoder.layer[0].attention.self.key
    with torch.no_grad():
        projection.bias[0] = 1e4
        projection.bias[1] = projection.weight[1] = 0.0
    quantize(student, ATTENTION, batches)
    steps = integer_layers(student)[0].steps()
    assert all(bool((step > 0).all() and step.isfinite().all()) for step in steps)
    assert torch.isfinite(student(**batches[0]).logits).all()
    (shares, _) = clipped_shares(student, batches).values()
    assert 0 <= shares["query_key"] <= 1 / 16  # the key's outlier of one head in two, of 16 features, at most


def test_padding_is_not_counted(student, batches):
    quantize(student, ATTENTION, batches)
    with torch.no_grad():
        integer_layers(student)[0].log2_query_key_step.sub_(1.5)
    padded = []
    for batch in batches:
        wide = {name: torch.nn.functional.pad(tensor, (0, 20)) for name, tensor in batch.items()}
        padded.append({**wide, "input_ids": wide["input_ids"] + 3 * (wide["attention_mask"] == 0)})
    assert clipped_shares(student, padded)[0] == pytest.approx(clipped_shares(student, batches)[0], abs=1e-3)
