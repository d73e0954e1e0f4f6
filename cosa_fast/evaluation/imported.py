"""Networks out of files that cosa_fast did not write: the official release's, ToCo's, SeCo's and DuPL's, plain state
dicts. A file holds one network, which stands for ON and AN alike."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cosa_fast.config.parsing import config_from_dict, config_to_dict, load_config
from cosa_fast.config.schema import Config, ModelConfig
from cosa_fast.data_pipeline.datasets.voc import CLASSES as VOC_CLASSES
from cosa_fast.errors import UserError
from cosa_fast.network.architecture import backbone_as_written, network_as_written
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet
from cosa_fast.network.reading import Weights, is_whole_network, network_in
from cosa_fast.network.weights import import_official

# Whose settings a file is read with, by its number of classes; --config names another one.
_RECIPES = {20: "voc_published.yaml", 80: "coco_published.yaml"}
_CROPS = range(16, 16385)


def import_network(
    content: Any, path: str, config: str | None, overrides: Sequence[str]
) -> tuple[Config, tuple[str, ...], CoSANet, str, int]:
    """(configuration, class names, network on the CPU, report, iteration) of what a weight file held.

    The tensors and the file's own settings tell architecture, classes and crop; `config`, a YAML file, tells the rest:
    data, evaluation, and the backbone where the tensors do not. `overrides` have the last word.
    UserError: no whole network, an architecture that nothing tells, tensors that do not fit.
    """
    weights = network_in(content, path)
    if not is_whole_network(weights.state):
        raise UserError(
            f"{path}: holds no segmentation network (encoder.*, decoder.*, classifier.weight); "
            "a backbone is trained from: model.weights=FILE"
        )
    count = weights.state["classifier.weight"].shape[0]
    base = _with_crop(_settings(config, count), weights)
    told = config is not None or any(override.startswith("model.") for override in overrides)
    candidates = _candidates(weights, base.model, told)
    if not candidates:
        raise UserError(
            f"{path}: its tensors are those of no plain ViT; name it: --config FILE with model.backbone and arguments"
        )
    refusal: UserError | None = None
    for model in candidates:
        chosen = config_from_dict(config_to_dict(replace(base, model=model)), overrides, where=config or path)
        try:
            network = build_model(chosen.model, count)
            report = import_official(weights, network, name=path)
            break
        except UserError as error:
            refusal = refusal or error
    else:
        assert refusal is not None
        raise refusal
    names = _names(chosen, count)
    return chosen, names, network, f"{report}; {_described(chosen.model, weights)}", _iteration(weights)


def _candidates(weights: Weights, given: ModelConfig, told: bool) -> list[ModelConfig]:
    """Architectures to try in turn: the one that a configuration names, and the one that the tensors show."""
    given = network_as_written(weights, given)
    shown = backbone_as_written(weights, given)
    return ([given] if told else []) + ([shown] if shown is not None else [])


def _settings(config: str | None, count: int) -> Config:
    """Those of the named file, else of the recipe for so many classes, else of VOC's without its classes' names."""
    if config is not None or count in _RECIPES:
        return load_config(config or _RECIPES[count])
    return load_config("voc_published.yaml", ["eval.coexistence=[]"])


def _with_crop(config: Config, weights: Weights) -> Config:
    crop = weights.settings.get("crop_size")
    if not isinstance(crop, int) or crop not in _CROPS:
        return config
    return replace(config, data=replace(config.data, crop_size=crop))


def _names(config: Config, count: int) -> tuple[str, ...]:
    """The classes' names: those of the configuration, else those of the set that has so many, else numbers."""
    if config.data.classes is not None and len(config.data.classes) == count:
        return config.data.classes
    if count == len(VOC_CLASSES):
        return VOC_CLASSES
    return _coco_names() if count == 80 else tuple(f"class {number}" for number in range(1, count + 1))


def _coco_names() -> tuple[str, ...]:
    from torchvision.models import get_weight

    categories = get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]
    return tuple(name for name in categories if name not in ("__background__", "N/A"))


def _described(model: ModelConfig, weights: Weights) -> str:
    network = {"s": "ON", "t": "AN"}.get(str(weights.settings.get("s_or_t")), "")
    parts = [f"{network} of the run" if network else "", model.backbone, f"auxiliary layer {model.aux_layer}"]
    return ", ".join([part for part in parts if part] + [f"positions {model.position_resampling}"])


def _iteration(weights: Weights) -> int:
    found = [weights.settings.get(name) for name in ("epoch", "iteration", "iter")]
    return next((number for number in found if isinstance(number, int) and number >= 0), 0)
