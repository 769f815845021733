"""Defects that the distillation could have, each found by a test of tests/distill that the catalogue names.

A mutant is the source of a module with one text replaced. Its functions lend their code to those of the module itself,
so that every module that has imported them runs the mutant, and what the named test patches stays patched. A text that
is no longer in the source is an error: the catalogue follows the code.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from inhibitor.distill import calibrate, losses, observe, pairing, rows, stages, states
from inhibitor.distill import teacher as teacher_module
from tests.distill import (
    test_calibrate,
    test_losses,
    test_observe,
    test_pairing,
    test_rows,
    test_stages,
    test_states,
    test_teacher,
)
from tests.distill.conftest import classifier, masked_lm, recipe, reviews, task_recipe, teacher, text  # noqa: F401
from tests.distill.test_states import kept  # noqa: F401
from tests.distill.test_teacher import _small_batches  # noqa: F401
from tests.mutants import mutated

PADDING = partial(test_losses.test_padding_never_counts, losses.mse, math.nan)
EMPTY_ROW = test_losses.test_an_empty_row_costs_nothing
FULL = test_stages.STAGES["full"]
LAYERWISE = partial(test_stages.test_layerwise_trains_one_layers_attention_only, "student")
NAMES = partial(test_observe.test_names_are_what_they_say, "bert")
FORCED = partial(test_observe.test_forced_layers_see_what_they_are_given, "bert")
DAMAGED = partial(test_states.test_a_damaged_one_is_named_and_passed_over, file="model.safetensors", fault="flipped")
MASKING = partial(test_rows.test_masking_depends_on_block_and_seed_alone, blocks=None)
KEYED = test_teacher.test_another_teacher_text_or_mask_has_another_folder
INTERRUPTED = partial(test_teacher.test_an_interrupted_filling_goes_on, batches=2)
RECOVERS = partial(test_calibrate.test_recovers_what_made_the_data, "head")

# module, the test that finds the defects, and of each: what it is, text, what stands there instead
CATALOGUE: dict[ModuleType, dict[Callable[..., None], list[tuple[str, str, str]]]] = {
    losses: {
        test_losses.test_soft_probabilities_by_hand: [
            ("no T²", " * temperature**2", ""),
            ("KL the other way", "kl_div(ours, theirs", "kl_div(theirs, ours"),
            ("logits without temperature", "logits / temperature", "logits"),
        ],
        test_losses.test_masked_lm_is_soft_probabilities_at_real_tokens: [
            ("tokens without temperature", ", temperature), attention_mask)", ", 1.0), attention_mask)")
        ],
        test_losses.test_mse_by_hand: [("mean over padding", "real.sum(-1).clamp(min=1)", "real.shape[-1]")],
        PADDING: [
            (
                "NaN in padding counts",
                "masked_fill(~attention_mask.bool().view(*attention_mask.shape, *[1] * (values.dim() - 2)), 0)",
                "mul(attention_mask.view(*attention_mask.shape, *[1] * (values.dim() - 2)))",
            )
        ],
        partial(EMPTY_ROW, losses.mse): [("no mean of no tokens", ".clamp(min=1)", "")],
        partial(EMPTY_ROW, losses.relative): [
            ("0 / 0 where the teacher is silent", ".clamp(min=torch.finfo(size.dtype).tiny)", "")
        ],
        test_losses.test_relative_by_hand: [
            ("relative to the student", "teacher))\n    return (error", "student))\n    return (error")
        ],
        partial(test_losses.test_parts_of_a_batch_cost_what_it_costs, losses.relative): [
            ("relative to the whole batch", ".square().flatten(1).sum(-1)", ".square().sum()")
        ],
        test_losses.test_squared_errors_add_up_over_batches: [
            ("errors relative to the student", "teacher))\n    return torch", "student))\n    return torch")
        ],
        partial(test_losses.test_a_perfect_student_has_no_loss_and_no_gradient, losses.cosine): [
            ("the cosine itself", "1 - functional.cosine", "functional.cosine")
        ],
        partial(test_losses.test_shapes_that_differ_are_refused_instead_of_broadcast, losses.mse): [
            ("shapes broadcast", "if student.shape != teacher.shape", "if student.dim() != teacher.dim()")
        ],
        test_losses.test_predictions_mse_by_hand: [
            ("predictions summed", "teacher).square().mean()", "teacher).square().sum()")
        ],
        test_losses.test_rows_without_a_label_cost_nothing: [
            ("no loss of no labels", 'reduction="none").mean()', 'reduction="mean")'),
            (
                "mean over labelled rows alone",
                'reduction="none").mean()',
                'reduction="sum") / (labels != -100).sum().clamp(min=1)',
            ),
        ],
    },
    observe: {
        test_observe.test_names_on_the_teacher_follow_the_layer_map: [
            ("the teacher's hidden states one layer below", "layers[int(index) - 1] + 1", "layers[int(index) - 1]")
        ],
        NAMES: [
            ("hidden states numbered from 1", "enumerate(output.hidden_states)", "enumerate(output.hidden_states, 1)")
        ],
        FORCED: [
            ("forced layers fed by the student", "= attention(states,", "= attention(hidden_states,"),
            ("forced layers see padding", "states, attention_mask=attention_mask", "states, attention_mask=None"),
        ],
        test_observe.test_forcing_computes_attention_alone: [
            ("forced models run whole layers", "else _pass_on", "else layer.forward")
        ],
        test_observe.test_nothing_stays_behind_when_the_model_fails: [
            ("layers stay forced", "            del layer.forward", "            pass"),
            (
                "hooks stay behind",
                "        yield entered\n    finally:\n        for hook in hooks:",
                "        yield entered\n    finally:\n        for hook in ():",
            ),
            (
                "hooks of outputs stay behind",
                "        pass\n    finally:\n        for hook in hooks:",
                "        pass\n    finally:\n        for hook in ():",
            ),
        ],
        partial(test_observe.test_nothing_above_what_is_wanted_is_computed, ["output-0"]): [
            ("a run for outputs goes to its end", "        if layer == last:\n            raise _LastLayerLeft\n", "")
        ],
        test_observe.test_a_model_gets_only_what_it_reads: [("the model is given its labels", ' - {"labels"}', "")],
        test_stages.test_joint_runs_the_teacher_once: [
            ("the teacher runs to its end", "else max(attended, default=None)", "else None")
        ],
    },
    stages: {
        test_stages.test_soft_labels_are_the_teachers_at_the_stages_temperature: [
            ("student and teacher swapped", "state.float(), target.float()", "target.float(), state.float()"),
            ("soft labels without temperature", 'getattr(stage, "temperature", 1.0)', "1.0"),
        ],
        test_stages.test_soft_labels_of_a_regression_are_its_predictions: [
            ("regression by KL", "if student.shape[-1] == 1:", "if not student.shape[-1]:")
        ],
        test_stages.test_a_task_stage_adds_its_losses_up: [
            ("weights of losses ignored", "weight * self._loss", "self._loss")
        ],
        partial(test_stages.test_a_batch_in_parts_costs_what_it_costs, FULL): [
            ("a sum where a mean belongs", "self._loss(loss,", 'len(batch["attention_mask"]) * self._loss(loss,')
        ],
        test_stages.test_joint_trains_the_attention_of_all_converted_layers: [
            ("joint trains the feed-forward", "(self.stage, WholeModel):\n", "(self.stage, WholeModel | JointStage):\n")
        ],
        LAYERWISE: [
            ("layer-wise trains every layer", "in self.trained:\n", "in inhibitor_layers(self.student):\n"),
            ("γ, η, δ, ρ, τ and u not trained", '.projections, "inhibitor")', ".projections,)"),
        ],
        test_stages.test_joint_is_the_sum_of_layers_that_the_teacher_feeds: [
            ("joint fed by the student", "self.forced = isinstance(stage, JointStage) or", "self.forced =")
        ],
        test_stages.test_a_layer_map_pairs_other_layers: [
            ("hidden states below the layers", '[f"hidden-{index + 1}"', '[f"hidden-{index}"'),
            ("fed by the layer of the same number", '{self.layers[layer]}"] for', '{layer}"] for'),
            ("compared with the layer of the same number", "targets[on_teacher(name, self.layers)]", "targets[name]"),
        ],
        test_stages.test_the_teacher_is_no_part_of_the_objective: [
            (
                "text stages with dropout",
                "mode and isinstance(self.stage, TaskStage) and self.stage.dropout",
                'mode and getattr(self.stage, "dropout", True)',
            )
        ],
        test_stages.test_dropout_is_the_task_stages_choice: [
            ("task stages always with dropout", " and self.stage.dropout)", ")")
        ],
        test_stages.test_gradient_checkpointing_recomputes_layers: [
            ("gradient checkpointing switched for nothing", "layer.training = mode", "layer.training = False"),
            ("gradient checkpointing not asked for", "student.activation_checkpointing_enable(", "dict("),
            ("gradient checkpointing stays on", "student.activation_checkpointing_disable()", "pass"),
        ],
        test_stages.test_units_run_bottom_up_over_converted_layers: [
            ("layers from the top", "student)) if isinstance", "student))[::-1] if isinstance")
        ],
        test_stages.test_hidden_states_of_another_size_need_a_projection: [
            ("no projection", " if name in self.projections else", " if not name else")
        ],
        test_stages.test_the_optimizer_knows_three_groups: [
            ("one learning rate", '"lr": self.stage.inhibitor_learning_rate', '"lr": rate'),
            (
                "vectors decay",
                'groups["vectors"], "lr": rate, "weight_decay": 0.0',
                'groups["vectors"], "lr": rate, "weight_decay": decay',
            ),
        ],
        partial(test_stages.test_a_rehearsal_finds_a_loss_that_is_not_finite, math.nan): [
            ("a loss of NaN rehearsed", "if not torch.isfinite(loss):", "if torch.isinf(loss):")
        ],
    },
    teacher_module: {
        test_stages.test_the_teacher_is_no_part_of_the_objective: [
            ("the teacher draws dropout", "model.eval().requires_grad_(False)", "model.train().requires_grad_(False)"),
            ("the teacher left as it came", "model.eval().requires_grad_(False)", "model.requires_grad_(False)"),
            ("the teacher is trained", "model.eval().requires_grad_(False)", "model.eval()"),
        ],
        test_teacher.test_a_teacher_that_answers_in_two_ways_is_refused: [
            ("two answers accepted", "if not all(torch.equal", "if not any(torch.equal")
        ],
        test_teacher.test_it_gives_what_the_teacher_says: [
            ("cached rows one off", "self.starts[number] : ends[number]", "self.starts[number] - 1 : ends[number] - 1"),
            ("cached rows in another order", "for number in numbers]", "for number in numbers[::-1]]"),
            ("padding cached as 1", "np.zeros(", "np.ones("),
        ],
        test_teacher.test_logits_have_one_entry_a_row: [
            ("logits cached by token", "tensor.dim() == 2}", "tensor.dim() == 3}")
        ],
        KEYED: [
            ("any teacher's cache", "hashlib.sha256(self.teacher.digest().encode())", "hashlib.sha256()"),
            ("any text's cache", "found.update(np.asarray(row, np.int64).tobytes())", "pass"),
            ("the cache of a text cut elsewhere", 'found.update(b"/")', "pass"),
        ],
        INTERRUPTED: [
            (
                "an unfinished cache is taken",
                "told.is_file() and file",
                "file",
            ),
            ("filling begins anew", 'before.pop("done") if', "first if"),
        ],
        test_teacher.test_other_outputs_are_filled_from_the_first_row: [
            ("filling goes on for other outputs", "== value for key", "for key")
        ],
        test_teacher.test_a_full_disk_is_refused_before_any_work: [
            ("a full disk tried", "if sum(sizes.values()) + ROOM_LEFT > free:", "if sum(sizes.values()) > free:")
        ],
        test_teacher.test_a_second_student_asks_no_teacher: [
            ("computes what it has", "if not self._complete", "if self._complete")
        ],
    },
    pairing: {
        test_pairing.test_labels_in_another_order: [
            ("labels in any order", "ours.id2label != theirs.id2label", "len(ours.id2label) != len(theirs.id2label)")
        ],
        test_pairing.test_a_student_takes_the_teachers_head: [
            ("the teacher's head not taken", "    student.load_state_dict(fitting, strict=False)\n", "")
        ],
        test_pairing.test_a_teacher_without_a_language_model_head: [
            ("a teacher without its head", "elif auto_class is AutoModelForMaskedLM", "elif False")
        ],
        test_pairing.test_a_layer_map_makes_a_shallower_student: [
            (
                "layers from the bottom whatever the map",
                "zip(layer_modules(student), kept, strict=True)",
                "enumerate(())",
            )
        ],
        partial(test_pairing.test_layer_maps_that_do_not_fit, layers=[0, 2]): [
            ("a layer beyond the teacher's last", "0 <= layer < depth", "0 <= layer <= depth")
        ],
        partial(test_pairing.test_layer_maps_that_do_not_fit, layers=[-1, 0]): [
            ("layers counted from the end", "0 <= layer < depth", "layer < depth")
        ],
        test_pairing.test_another_vocabulary: [("vocabularies of one size", "tokenizer.get_vocab()", "len(tokenizer)")],
        test_pairing.test_other_special_tokens: [
            ("special tokens not compared", "if isinstance(token, str)\n", "if not token\n")
        ],
        test_pairing.test_another_way_to_cut_the_same_vocabulary: [
            ("a sample not cut", 'tokenizer(SAMPLE)["input_ids"]', "len(tokenizer)")
        ],
        test_pairing.test_more_tokens_than_a_model_knows: [
            ("inputs not checked", "check_pair(name, model, tokenizer, max(lengths))", "pass")
        ],
        test_pairing.test_rows_longer_than_a_model_reads: [("lengths not looked at", "max(lengths)", "8")],
        partial(
            test_pairing.test_what_a_recipe_asks_of_the_conversion_is_not_lost_on_a_converted_student,
            asked={"calibration": {"sequences": 2}},
        ): [("asked in vain", "if getattr(config, what) not in values:", "if not values:")],
        partial(test_pairing.test_another_size, stage={"kind": "layerwise"}, message="heads of 16"): [
            (
                "contexts of another size",
                "contexts and shapes[0] != shapes[1]",
                "contexts and shapes[0][0] != shapes[1][0]",
            )
        ],
    },
    rows: {
        MASKING: [
            ("masks change from call to call", "zlib.crc32(block.numpy().tobytes(), self.seed)", "torch.seed()"),
            ("one mask for every block", "zlib.crc32(block.numpy().tobytes(), self.seed)", "self.seed"),
            (
                "special tokens masked",
                "torch_mask_tokens(block)",
                "torch_mask_tokens(block, special_tokens_mask=torch.zeros_like(block))",
            ),
        ],
        test_rows.test_another_seed_masks_other_tokens: [
            ("one mask for every seed", ".tobytes(), self.seed)", ".tobytes())")
        ],
        test_rows.test_a_stage_of_its_own_has_text_of_its_own: [
            ("every stage reads the same stream", "(index if fixed is None else 0)", "0")
        ],
        test_rows.test_it_is_measured_on_text_held_out: [
            ("measured on what it trains on", "held_out=True", "held_out=False")
        ],
        test_rows.test_calibration_reads_several_lengths: [
            ("calibrated at one length", "[*(length for length in config.lengths if length < whole), whole]", "[whole]")
        ],
        test_rows.test_a_task_without_text: [
            ("rows numbered from 1", "list(range(len(dataset)))", "list(range(1, len(dataset) + 1))"),
            ("calibrated on padding", "return self._batches(rows, 1)", "return self._batches(rows, MEASURE_BATCH)"),
            ("rows counted as tokens", 'statistics.fmean(rows["length"])', "1.0"),
        ],
    },
    states: {
        DAMAGED: [
            ("a damaged state accepted", "                check(path)\n", "                pass\n"),
            ("damage said again and again", "(ASIDE, DAMAGED)", "ASIDE"),
        ],
        test_states.test_a_state_half_written_is_none: [
            ("a state half written accepted", "(ASIDE, DAMAGED)", "DAMAGED")
        ],
        test_states.test_the_newest_is_taken: [
            ("saved without progress", "json.dumps(progress, indent=1)", '"{}"'),
            ("the newest by name", 'key=lambda state: state[1]["saves"]', "key=lambda state: state[0]"),
        ],
        test_states.test_what_no_state_names_goes: [("states to keep deleted", "not in (name, *keep)", "!= name")],
        test_states.test_the_published_model_is_a_model: [
            ("progress published", "ignore_patterns(PROGRESS, ", "ignore_patterns(")
        ],
    },
    calibrate: {
        RECOVERS: [
            ("ρ has no effect", "length.pow(-exponent)", "length.pow(0)"),
            ("η has none", "sums[0] / sums[1].clamp(min=torch.finfo(square.dtype).tiny)", "torch.ones_like(sums[0])"),
        ],
        test_calibrate.test_recovers_a_reach: [
            ("τ of another try", "reaches[index] if len(reaches)", "reaches[0] if len(reaches)"),
            ("every key is heard", "heard.clamp(min=0) / reaches", "torch.ones_like(heard) / reaches"),
        ],
        test_calibrate.test_heads_get_values_of_their_own: [
            ("one value for all heads", "if shared else other", "if True else other")
        ],
    },
}
ROWS = [(module, *row, test) for module, tests in CATALOGUE.items() for test, found in tests.items() for row in found]


def seed(monkeypatch: pytest.MonkeyPatch, module: ModuleType, old: str, new: str) -> None:
    """Let the functions of a module run the code of its source with one text replaced."""
    codes = dict(_codes(compile(mutated(module, old, new), str(module.__file__), "exec")))
    for function in _functions(module, module.__name__):
        if function.__qualname__ in codes:
            monkeypatch.setattr(function, "__code__", codes[function.__qualname__])


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part.co_qualname, part
            yield from _codes(part)


def _functions(owner: Any, module: str) -> Iterator[FunctionType]:
    """Those that a module defines, methods and what decorators hide included."""
    for value in vars(owner).values():
        function = inspect.unwrap(getattr(value, "fget", value))
        if getattr(function, "__module__", None) == module:
            if isinstance(function, FunctionType):
                yield function
            elif isinstance(function, type):
                yield from _functions(function, module)


def run(test: Callable[..., None], request: pytest.FixtureRequest) -> None:
    """Run a test with the fixtures that it asks for."""
    wanted = [p.name for p in inspect.signature(test).parameters.values() if p.default is p.empty]
    test(**{name: request.getfixturevalue(name) for name in wanted})


NAMED = list({str(row[-1]): row[-1] for row in ROWS}.values())


@pytest.mark.parametrize("test", NAMED, ids=lambda test: getattr(test, "func", test).__name__)
def test_the_distillation_itself_survives(test, request):
    run(test, request)


@pytest.mark.parametrize(("module", "defect", "old", "new", "test"), ROWS, ids=[row[1] for row in ROWS])
def test_the_defect_is_found(module, defect, old, new, test, monkeypatch, request, record_property):
    seed(monkeypatch, module, old, new)
    try:
        run(test, request)
    except (Exception, pytest.fail.Exception) as error:
        record_property("found by", f"{type(error).__name__}: {error}")
    else:
        pytest.fail(f"{defect}: survives")


def test_a_text_that_left_the_source_is_an_error(monkeypatch):
    with pytest.raises(LookupError, match=r"stands 0 times in inhibitor\.distill\.losses"):
        seed(monkeypatch, losses, "no such text", "")
