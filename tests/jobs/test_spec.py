"""What a job may ask for, what it resolves to, and how each refusal names its field."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from app.datasets.layout import MIN_UNLABELLED_PICTURES
from app.errors import FieldError, InvalidHyperparameter, InvalidRequest, WeightsUnavailable
from app.jobs.recipes import CLASSIC_PREPROCESSING
from app.jobs.request import FEWEST_TOGETHER, Hyperparameters, parse_request
from app.jobs.spec import ClassFacts, DatasetFacts, StartingModel, TrainingSpec, resolve
from app.vision.backbones import BACKBONES
from app.vision.preprocessing import Preprocessing

WEIGHTS = {"mobilenet_v3_small": "IMAGENET1K_V1", "resnet50": "IMAGENET1K_V2", "vit_b_16": "IMAGENET1K_V1"}


def facts(*, train: int = 120, val: int = 30, names: tuple[str, ...] = ("daisy", "rose")) -> DatasetFacts:
    return DatasetFacts(tuple(ClassFacts(name, train, val) for name in names))


def resolved(
    *,
    dataset: DatasetFacts | None = None,
    weights: dict[str, str] | None = None,
    device_type: str = "cpu",
    starting_model: StartingModel | None = None,
    **body: Any,
) -> TrainingSpec:
    return resolve(
        parse_request({"dataset": "ds_1", **body}),
        dataset=dataset or facts(),
        weights=WEIGHTS if weights is None else weights,
        device_type=device_type,
        starting_model=starting_model,
    )


def refusal(**body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        resolved(**body)
    return caught.value


def test_classic_is_the_textbook() -> None:
    spec = resolved(recipe="classic", method="full_fine_tuning", backbone="resnet50")
    values = spec.hyperparameters.model_dump()
    assert values == {
        "epochs": 25,
        "batch_size": 32,
        "optimizer": "sgd",
        "head_start": "random",
        "learning_rate": 0.001,
        "backbone_learning_rate": 0.001,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "scheduler": "step",
        "step_size": 7,
        "gamma": 0.1,
        "warmup_epochs": 0.0,
        "label_smoothing": 0.0,
        "unfreeze": None,
        "feature_layer": None,
        "image_size": 224,
        "augmentation": "classic",
        "crop_scale": (0.08, 1.0),
        "horizontal_flip": True,
        "augmented_views": None,
        "mixup": 0.0,
        "cutmix": 0.0,
        "ema": 0.0,
        "fixed_batch_norm": False,
        "class_weights": "none",
        "early_stopping_patience": None,
    }
    # Not the 232 pixels that resnet50's second weights were published with.
    assert spec.preprocessing == Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


def test_head_on_the_bundled_backbone_reads_all_layers_and_says_so_but_not_under_classic() -> None:
    bundled = {"graft_small": "FORMULA_V2"}
    spec = resolved(method="feature_extraction", weights=bundled)
    assert (spec.backbone.name, spec.hyperparameters.feature_layer) == ("graft_small", "all")
    assert any("reads all layers" in reason for reason in spec.reasons)
    asked = resolved(method="feature_extraction", weights=bundled, hyperparameters={"feature_layer": "stage3"})
    assert asked.hyperparameters.feature_layer == "stage3"
    assert (
        resolved(method="feature_extraction", weights=bundled, recipe="classic").hyperparameters.feature_layer is None
    )
    assert resolved(method="full_fine_tuning", weights=bundled).hyperparameters.feature_layer is None
    refused = refusal(method="few_shot", weights=bundled, hyperparameters={"feature_layer": "all"})
    assert refused.errors[0].pointer == "#/hyperparameters/feature_layer"


def test_what_is_for_one_optimizer_or_scheduler_implies_it_and_says_so() -> None:
    spec = resolved(method="full_fine_tuning", hyperparameters={"momentum": 0.8, "gamma": 0.5})
    found = spec.hyperparameters
    assert (found.optimizer, found.momentum, found.scheduler, found.gamma) == ("sgd", 0.8, "step", 0.5)
    named = resolved(
        method="full_fine_tuning",
        hyperparameters={"optimizer": "sgd", "momentum": 0.8, "scheduler": "step", "gamma": 0.5},
    )
    assert found == named.hyperparameters
    assert [reason for reason in spec.reasons if "was given" in reason] == [
        "optimizer sgd: momentum was given, which is for this optimizer alone.",
        "scheduler step: gamma was given, which is for this scheduler alone.",
    ]
    assert spec.requested["hyperparameters"] == {"momentum": 0.8, "gamma": 0.5}


@pytest.mark.parametrize("method", ["feature_extraction", "fine_tuning", "full_fine_tuning", "from_scratch", "auto"])
@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_a_spec_survives_the_database(method: str, recipe: str) -> None:
    spec = resolved(method=method, recipe=recipe, backbone="auto")
    assert TrainingSpec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json")))) == spec


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "must be an integer from 1 to 1000"),
        ("epochs", 10**9, "must be an integer from 1 to 1000"),
        ("epochs", 2.5, "must be an integer from 1 to 1000"),
        ("epochs", True, "must be an integer from 1 to 1000"),
        ("epochs", "3", "must be an integer from 1 to 1000"),
        ("epochs", None, "must be an integer from 1 to 1000"),
        ("batch_size", 2**63, "must be an integer from 1 to 4096"),
        ("learning_rate", 0, "must be a number above 0 and at most 10"),
        ("learning_rate", math.nan, "must be a number above 0 and at most 10"),
        ("learning_rate", math.inf, "must be a number above 0 and at most 10"),
        ("learning_rate", [], "must be a number above 0 and at most 10"),
        ("momentum", 1.0, "must be a number from 0 to below 1"),
        ("image_size", 100_000, "must be an integer from 32 to 640"),
        ("optimizer", "rmsprop", "must be one of sgd, adamw"),
        ("augmentation", {}, "must be one of none, classic, strong"),
        ("ema", "yes", "must be true or false or a number from 0 to below 1"),
        ("early_stopping_patience", 0, "must be an integer from 1 to 1000"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name: str, value: object, allowed: str) -> None:
    refused = refusal(hyperparameters={name: value})
    assert isinstance(refused, InvalidHyperparameter)
    assert [error.pointer for error in refused.errors] == [f"#/hyperparameters/{name}"]
    assert refused.errors[0].detail == allowed


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    (error,) = refusal(hyperparameters={"lr": 0.1}).errors
    assert error.pointer == "#/hyperparameters/lr"
    assert error.detail == f"no such hyperparameter; there are: {', '.join(Hyperparameters.model_fields)}"


def test_a_pointer_escapes_what_the_caller_wrote() -> None:
    (error,) = refusal(hyperparameters={"a/b~c": 1}).errors
    assert error.pointer == "#/hyperparameters/a~1b~0c"


def test_every_bad_field_is_named_at_once() -> None:
    refused = refusal(seed=-1, method="magic", hyperparameters={"epochs": 0})
    assert refused.code == "invalid-hyperparameter"
    assert [error.pointer for error in refused.errors] == ["#/method", "#/seed", "#/hyperparameters/epochs"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "#/dataset"),
        ({"dataset": "../../x"}, "#/dataset"),
        ({"dataset": "ds_1", "owner": "me"}, "#/owner"),
        ({"dataset": "ds_1", "name": "a\x00b"}, "#/name"),
        ({"dataset": "ds_1", "seed": True}, "#/seed"),
        ({"dataset": "ds_1", "seed": 2**53}, "#/seed"),
        ({"dataset": "ds_1", "hyperparameters": []}, "#/hyperparameters"),
        ({"dataset": "ds_1", "budget_seconds": 0}, "#/budget_seconds"),
        ({"dataset": "ds_1", "exclude": "a.png"}, "#/exclude"),
        ({"dataset": "ds_1", "exclude": None}, "#/exclude"),
        ({"dataset": "ds_1", "exclude": [f"{i}.png" for i in range(10_001)]}, "#/exclude"),
        ({"dataset": "ds_1", "exclude": ["a.png", "b.png", "a.png"]}, "#/exclude"),
        ({"dataset": "ds_1", "exclude": ["a.png", 1]}, "#/exclude/1"),
        ({"dataset": "ds_1", "exclude": ["a.png", "b.png", ""]}, "#/exclude/2"),
        ({"dataset": "ds_1", "exclude": ["a" * 1001]}, "#/exclude/0"),
        ([], "#"),
    ],
)
def test_a_bad_request_names_the_field(body: object, pointer: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(body)
    assert [error.pointer for error in caught.value.errors] == [pointer]


@pytest.mark.parametrize(
    ("body", "name", "detail"),
    [
        (
            {"hyperparameters": {"momentum": 0.9, "optimizer": "adamw"}},
            "momentum",
            'is for the optimizer sgd only; add "optimizer": "sgd", or leave it out',
        ),
        (
            {"hyperparameters": {"gamma": 0.5, "scheduler": "cosine"}},
            "gamma",
            'is for the scheduler step only; add "scheduler": "step", or leave it out',
        ),
        (
            {"method": "full_fine_tuning", "hyperparameters": {"unfreeze": 1}},
            "unfreeze",
            "is for the method fine_tuning only, and this is full_fine_tuning",
        ),
        (
            {"method": "fine_tuning", "hyperparameters": {"unfreeze": 6}},
            "unfreeze",
            "must be from 1 to 5, the stages of mobilenet_v3_small: stem, stage1, stage2, stage3, stage4",
        ),
        (
            {"method": "fine_tuning", "hyperparameters": {"feature_layer": "stage2"}},
            "feature_layer",
            "is for methods that freeze the whole backbone, and this is fine_tuning",
        ),
        (
            {"method": "feature_extraction", "hyperparameters": {"feature_layer": "layer9"}},
            "feature_layer",
            "must be one of mobilenet_v3_small's layers: stem, stage1, stage2, stage3, stage4, all",
        ),
        (
            {"method": "feature_extraction", "hyperparameters": {"backbone_learning_rate": 0.1}},
            "backbone_learning_rate",
            "has no meaning for feature_extraction, whose backbone is frozen",
        ),
        (
            {"method": "self_supervised", "hyperparameters": {"batch_size": 15}},
            "batch_size",
            "must be at least 16 for self_supervised, which compares the pictures of a batch",
        ),
        (
            {"method": "self_supervised", "hyperparameters": {"augmentation": "none"}},
            "augmentation",
            "must be classic or strong for self_supervised, which learns from what two views share",
        ),
        (
            {"method": "full_fine_tuning", "hyperparameters": {"epochs": 3, "warmup_epochs": 4}},
            "warmup_epochs",
            "must be at most epochs, which is 3",
        ),
    ],
)
def test_a_value_without_effect_is_refused_with_the_reason(body: dict[str, Any], name: str, detail: str) -> None:
    refused = refusal(backbone="mobilenet_v3_small", **body)
    assert refused.errors == (FieldError(f"#/hyperparameters/{name}", detail),)


def test_too_few_pictures_to_compare_are_refused_for_self_supervised() -> None:
    assert MIN_UNLABELLED_PICTURES == FEWEST_TOGETHER == 16  # what an upload may hold, a job can learn from
    resolved(method="self_supervised", dataset=DatasetFacts((), unlabelled=16))
    for method in ("self_supervised", "auto"):
        refused = refusal(method=method, dataset=DatasetFacts((), unlabelled=1))
        detail = "has 1 training picture, and self_supervised compares 16 or more with each other"
        assert refused.errors == (FieldError("#/dataset", detail),)


def test_an_image_size_that_the_network_cannot_take_is_refused() -> None:
    (error,) = refusal(backbone="vit_b_16", hyperparameters={"image_size": 256}).errors
    assert error == FieldError("#/hyperparameters/image_size", "must be 224 for vit_b_16")


def test_an_image_size_keeps_the_ratio_of_resize_to_crop() -> None:
    spec = resolved(backbone="mobilenet_v3_small", recipe="classic", hyperparameters={"image_size": 112})
    assert (spec.preprocessing.resize, spec.preprocessing.crop, spec.hyperparameters.image_size) == (128, 112, 112)


def test_an_unknown_backbone_is_refused() -> None:
    assert refusal(backbone="alexnet").errors[0].pointer == "#/backbone"


def test_a_backbone_without_weights_is_refused_with_the_remedy() -> None:
    with pytest.raises(WeightsUnavailable, match="GRAFT_WEIGHTS_DIR") as caught:
        resolved(backbone="resnet18", method="fine_tuning")
    assert caught.value.errors == (FieldError("#/backbone", "no weights of resnet18 can be had"),)


def test_from_scratch_needs_no_weights() -> None:
    spec = resolved(backbone="resnet18", method="from_scratch", weights={})
    assert spec.backbone.model_dump() == {"name": "resnet18", "weights": None, "model": None}


def test_auto_trains_from_scratch_where_nothing_pretrained_can_be_had_and_says_so() -> None:
    spec = resolved(weights={})
    assert (spec.method, spec.backbone.weights) == ("from_scratch", None)
    assert "no pretrained weights of mobilenet_v3_small can be had here." in " ".join(spec.reasons)


def test_auto_takes_the_best_backbone_that_can_be_had_and_says_so() -> None:
    assert resolved(device_type="cpu").backbone.name == "mobilenet_v3_small"
    spec = resolved(device_type="cuda")
    assert spec.backbone.name == "resnet50"
    assert spec.reasons[0].startswith("backbone resnet50: ")


@pytest.mark.parametrize(
    ("train", "device_type", "backbone", "method"),
    [
        (10, "cpu", "mobilenet_v3_small", "feature_extraction"),
        (120, "cpu", "mobilenet_v3_small", "fine_tuning"),
        (120, "cuda", "resnet50", "fine_tuning"),
        (500, "cpu", "resnet50", "fine_tuning"),
        (500, "cpu", "mobilenet_v3_small", "full_fine_tuning"),
        (500, "cuda", "resnet50", "full_fine_tuning"),
    ],
)
def test_auto_under_classic_chooses_the_method_by_images_and_cost(
    train: int, device_type: str, backbone: str, method: str
) -> None:
    spec = resolved(dataset=facts(train=train), device_type=device_type, backbone=backbone, recipe="classic")
    assert spec.method == method
    assert any(reason.startswith(f"method {method}: ") for reason in spec.reasons)


def test_auto_lets_the_methods_compete_the_simplest_first() -> None:
    spec = resolved(seed=3, hyperparameters={"batch_size": 16, "epochs": 5})
    assert spec.method == "auto"
    assert [one.method for one in spec.candidates] == ["feature_extraction", "fine_tuning", "full_fine_tuning"]
    assert {(one.backbone, one.preprocessing, one.seed) for one in spec.candidates} == {
        (spec.backbone, spec.preprocessing, 3)
    }
    # The probe is solved for, whatever was asked for those that take steps.
    assert [one.hyperparameters.optimizer for one in spec.candidates] == ["lbfgs", "adamw", "adamw"]
    assert [one.hyperparameters.epochs for one in spec.candidates] == [1, 5, 5]
    assert spec.hyperparameters == spec.candidates[-1].hyperparameters
    assert any("compete" in reason for reason in spec.reasons)


def test_what_would_take_too_long_on_a_cpu_does_not_compete() -> None:
    spec = resolved(dataset=facts(train=500), device_type="cpu", backbone="resnet50")
    assert [one.method for one in spec.candidates] == ["feature_extraction", "fine_tuning"]
    assert any(reason.endswith("would take long on a CPU: left out.") for reason in spec.reasons)
    assert len(resolved(dataset=facts(train=500), device_type="cuda", backbone="resnet50").candidates) == 3


def test_modern_solves_for_a_head_unless_steps_are_asked_for() -> None:
    solved = resolved(method="feature_extraction").hyperparameters
    assert (solved.optimizer, solved.epochs, solved.augmentation) == ("lbfgs", 1, "none")
    stepped = resolved(method="feature_extraction", hyperparameters={"epochs": 7}).hyperparameters
    assert (stepped.optimizer, stepped.epochs, stepped.head_start) == ("adamw", 7, "probe")
    # One view of each image: one pass of the backbone, whatever the epochs.
    assert (stepped.augmentation, stepped.augmented_views) == ("none", None)


def test_modern_starts_every_pretrained_network_with_a_probe_and_keeps_views_for_its_last_stages() -> None:
    tuned = resolved(method="fine_tuning", hyperparameters={"epochs": 40}).hyperparameters
    assert (tuned.head_start, tuned.augmented_views) == ("probe", 4)
    assert (tuned.ema, tuned.fixed_batch_norm) == (0.98, True)
    assert resolved(method="fine_tuning", hyperparameters={"epochs": 3}).hyperparameters.augmented_views == 3
    full = resolved(method="full_fine_tuning").hyperparameters
    assert (full.head_start, full.augmented_views) == ("probe", None)
    assert (full.ema, full.fixed_batch_norm) == (0.98, True)
    assert resolved(method="from_scratch").hyperparameters.head_start == "random"


def test_views_are_for_methods_that_freeze_stages() -> None:
    for method in ("full_fine_tuning", "from_scratch"):
        found = refusal(method=method, hyperparameters={"augmented_views": 4})
        assert found.errors[0].pointer == "#/hyperparameters/augmented_views"
    assert resolved(method="fine_tuning", recipe="classic").hyperparameters.augmented_views is None


@pytest.mark.parametrize("method", ["feature_extraction", "fine_tuning"])
@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_views_that_are_asked_for_are_changed_ones(method: str, recipe: str) -> None:
    spec = resolved(method=method, recipe=recipe, hyperparameters={"augmented_views": 4})
    assert (spec.hyperparameters.augmentation, spec.hyperparameters.augmented_views) == ("classic", 4)
    found = refusal(method=method, recipe=recipe, hyperparameters={"augmented_views": 4, "augmentation": "none"})
    assert found.errors[0].pointer == "#/hyperparameters/augmented_views"


def test_auto_follows_a_hyperparameter_that_only_one_method_has() -> None:
    assert resolved(hyperparameters={"unfreeze": 2}).method == "fine_tuning"
    assert resolved(hyperparameters={"feature_layer": "stage3"}).method == "feature_extraction"


def test_an_earlier_model_is_started_from_with_its_own_preprocessing() -> None:
    own = CLASSIC_PREPROCESSING.with_image_size(64)
    earlier = StartingModel("mdl_1", "resnet18", own)
    spec = resolved(backbone="mdl_1", method="fine_tuning", starting_model=earlier, weights={})
    assert spec.backbone.model_dump() == {"name": "resnet18", "weights": None, "model": "mdl_1"}
    assert spec.preprocessing == own


def test_from_scratch_does_not_start_from_an_earlier_model() -> None:
    earlier = StartingModel("mdl_1", "resnet18", CLASSIC_PREPROCESSING)
    assert refusal(backbone="mdl_1", method="from_scratch", starting_model=earlier).errors[0].pointer == "#/method"


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_data_set_without_training_or_validation_images_is_refused(split: str) -> None:
    empty = facts(train=0) if split == "train" else facts(val=0)
    assert refusal(dataset=empty).errors[0].pointer == "#/dataset"


def test_modern_takes_more_epochs_for_fewer_images() -> None:
    small = resolved(backbone="mobilenet_v3_small", method="fine_tuning", dataset=facts(train=100))
    large = resolved(backbone="mobilenet_v3_small", method="fine_tuning", dataset=facts(train=10_000))
    assert small.hyperparameters.epochs == 40
    assert large.hyperparameters.epochs == 8


def test_a_learning_rate_of_ones_own_moves_the_backbones_with_it() -> None:
    body: dict[str, Any] = {"backbone": "mobilenet_v3_small", "method": "full_fine_tuning"}
    usual = resolved(**body).hyperparameters
    lower = resolved(**body, hyperparameters={"learning_rate": usual.learning_rate / 10}).hyperparameters
    assert usual.backbone_learning_rate is not None
    assert lower.backbone_learning_rate == pytest.approx(usual.backbone_learning_rate / 10)


def test_uneven_training_with_even_validation_gets_balanced_weights() -> None:
    uneven = DatasetFacts((ClassFacts("a", 300, 60), ClassFacts("b", 15, 60)))
    both_uneven = DatasetFacts((ClassFacts("a", 300, 60), ClassFacts("b", 15, 3)))
    assert resolved(dataset=uneven).hyperparameters.class_weights == "balanced"
    assert resolved(dataset=both_uneven).hyperparameters.class_weights == "none"


@pytest.mark.parametrize(
    ("names", "flips"),
    [(("0", "1"), False), (("turn_left", "turn_right"), False), (("ants", "bees"), True), (("righteous", "x"), True)],
)
def test_pictures_are_not_mirrored_where_class_names_speak_of_sides_or_signs(
    names: tuple[str, ...], flips: bool
) -> None:
    assert resolved(dataset=facts(names=names)).hyperparameters.horizontal_flip is flips


@pytest.mark.parametrize("recipe", ["classic", "modern"])
@pytest.mark.parametrize("method", ["few_shot", "self_supervised"])
def test_reasons_are_of_what_is_done(method: str, recipe: str) -> None:
    uneven = DatasetFacts((ClassFacts("a", 19, 20), ClassFacts("b", 5, 20)))
    spec = resolved(method=method, recipe=recipe, backbone="resnet50", dataset=uneven)
    assert spec.hyperparameters.class_weights == "none"
    said = {
        ("few_shot", "classic"): ["the head is a prototype for each class: computed at once, without training."],
        ("few_shot", "modern"): ["the head is a prototype for each class: computed at once, without training."],
        ("self_supervised", "classic"): [],
        ("self_supervised", "modern"): [
            "epochs 200: about 1500 steps suit 24 images.",
            "no horizontal flips: the class names are single characters or name a side.",
        ],
    }
    assert spec.reasons == said[method, recipe]


def test_weights_that_were_asked_for_need_no_reason() -> None:
    uneven = DatasetFacts((ClassFacts("daisy", 100, 20), ClassFacts("rose", 5, 20)))
    for given in ("none", "balanced"):
        spec = resolved(method="fine_tuning", dataset=uneven, hyperparameters={"class_weights": given})
        assert spec.hyperparameters.class_weights == given
        assert not any(reason.startswith("class_weights") for reason in spec.reasons)


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_a_head_that_is_computed_has_no_momentum_and_no_steps(recipe: str) -> None:
    values = resolved(method="few_shot", recipe=recipe).hyperparameters
    assert (values.momentum, values.step_size, values.gamma) == (None, None, None)


def test_a_backbone_cannot_be_promoted_always() -> None:
    refused = refusal(method="self_supervised", promote="always")
    assert [error.pointer for error in refused.errors] == ["#/promote"]
    resolved(method="self_supervised", promote="never")


@pytest.mark.parametrize(("given", "decay"), [(True, 0.999), (False, 0.0), (0.9, 0.9), (0, 0.0)])
def test_ema_is_a_switch_or_a_decay(given: object, decay: float) -> None:
    assert resolved(hyperparameters={"ema": given}).hyperparameters.ema == decay


def test_patience_may_be_switched_off() -> None:
    assert resolved().hyperparameters.early_stopping_patience is not None
    assert resolved(hyperparameters={"early_stopping_patience": None}).hyperparameters.early_stopping_patience is None


def test_a_bad_path_is_named_by_its_place_in_the_sentence_too() -> None:
    assert refusal(exclude=["a.png", ""]).detail == "exclude/1: String should have at least 1 character"
    assert refusal(exclude=["a.png", "a.png"]).errors == (FieldError("#/exclude", "item 1 repeats an earlier one"),)


def test_what_is_excluded_is_in_the_spec_and_in_that_of_every_contender() -> None:
    paths = ["val/rose/9.png", "train/daisy/1.png"]
    spec = resolved(exclude=paths)
    assert len(spec.candidates) == 3
    assert [one.exclude for one in (spec, *spec.candidates)] == [paths] * 4
    assert resolved(exclude=paths, method="fine_tuning").exclude == paths


def test_a_spec_from_before_exclude_still_loads() -> None:
    spec = resolved()
    stored = spec.model_dump(mode="json")
    for one in (stored, *stored["candidates"]):
        assert one.pop("exclude") == []
    assert TrainingSpec.model_validate(stored) == spec


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_backbone_resolves_under_both_recipes_with_every_method(name: str) -> None:
    for recipe in ("classic", "modern"):
        for method in ("feature_extraction", "fine_tuning", "full_fine_tuning", "from_scratch"):
            spec = resolved(backbone=name, method=method, recipe=recipe, weights={name: "IMAGENET1K_V1"})
            fixed = BACKBONES[name].fixed_image_size
            assert fixed is None or spec.hyperparameters.image_size == fixed


def test_column_without_a_training_label_cannot_be_learnt() -> None:
    given, held_out = (
        (ClassFacts("red", 8, 2), ClassFacts("blue", 8, 2)),
        (ClassFacts("big", 0, 2), ClassFacts("small", 0, 2)),
    )
    for method in ("auto", "feature_extraction", "fine_tuning"):
        error = refusal(dataset=replace(facts(), further=(given, held_out)), method=method)
        assert "label columns has no training image" in str(error.detail)
    assert resolved(dataset=replace(facts(), further=(given,)), method="feature_extraction")
