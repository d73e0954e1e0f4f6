"""Makes `import torchvision` work beside a CPU-only torch; import this module before timm.

The torchvision wheels of PyPI link CUDA. Beside a CPU torch their operator library does not load, and the import then
dies on the first operator whose fake implementation it registers ("operator torchvision::nms does not exist").
Declaring the schemas of these operators is enough for everything but themselves, and nothing here calls them.
"""

import sys

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# The declarations live exactly as long as these objects.
_declared: list[torch.library.Library] = []


def _import_torchvision() -> None:
    """Import torchvision; where that fails for want of its operators, declare them and import it again."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        # The failed import leaves half of its modules behind; they must run anew.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                library.define(schema)
        _declared.append(library)
        import torchvision  # noqa: F401


_import_torchvision()
