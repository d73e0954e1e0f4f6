"""The network that ON and AN share (METHOD: Model): encoder, two classifiers, segmentation head."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosa_fast.config.schema import ModelConfig
from cosa_fast.network.encoder import Encoder

# Of the layers that make logits: small, so that S starts near uniform (c2s ≈ ln K) and the classifiers undecided.
_LOGIT_STD = 0.01


class Outputs(NamedTuple):
    """What one forward pass gives; h·w is the token grid, K = C + 1. Without auxiliary layer the † fields are None."""

    logits: Tensor
    """Z (B, C): image logits."""
    cam: Tensor
    """M (B, C, h, w): raw signed class activation."""
    seg: Tensor | None
    """S (B, K, h, w): segmentation logits; None where not asked for."""
    logits_aux: Tensor | None
    """Z† (B, C)."""
    cam_aux: Tensor | None
    """M† (B, C, h, w)."""

    def segmentation(self) -> Tensor:
        """S, where the forward pass was asked for it."""
        if self.seg is None:
            raise ValueError("seg: the forward pass left the segmentation head out, want seg=True")
        return self.seg


class LargeFOV(nn.Module):
    """Segmentation head: 3×3 D → width, ReLU, 3×3 width → width, ReLU, 1×1 → K; both 3×3 dilated; no bias, no norm."""

    def __init__(
        self, channels: int, num_outputs: int, width: int = 512, dilation: int = 5, small_logits: bool = True
    ) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv7 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv8 = nn.Conv2d(width, num_outputs, 1, bias=False)
        if small_logits:
            nn.init.kaiming_normal_(self.conv6.weight, nonlinearity="relu")
            nn.init.kaiming_normal_(self.conv7.weight, nonlinearity="relu")
            nn.init.normal_(self.conv8.weight, std=_LOGIT_STD)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, D, h, w) → S (B, K, h, w)."""
        return self.conv8(functional.relu(self.conv7(functional.relu(self.conv6(features)))))


class ASPP(nn.Module):
    """Segmentation head of SeCo: the sum of four 3×3 convs D → K, dilated by 6, 12, 18 and 24, each with a bias."""

    def __init__(self, channels: int, num_outputs: int) -> None:
        super().__init__()
        for index, dilation in enumerate((6, 12, 18, 24)):
            self.add_module(f"c{index}", nn.Conv2d(channels, num_outputs, 3, padding=dilation, dilation=dilation))
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=_LOGIT_STD if name.endswith("weight") else 0.0)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, D, h, w) → S (B, K, h, w)."""
        return torch.stack([branch(features) for branch in self.children()]).sum(0)


class CoSANet(nn.Module):
    """Encoder, classifiers W and W† (bias-free 1×1), segmentation head.

    Z = W·GMP(F), with the maximum taken per channel over all tokens; M = W·F; the same with W†, F†.

    `config.detach` is the gradient switch of the guided-CAM ablation. It acts on the CAM path alone, on M and M†, that
    is on what s2c and csc send back: "features" stops it before F and F† (only W, W† learn from it), "weights" before W
    and W† (only the encoder does), "both" stops it altogether. Z and S are never detached.

    Raises ValueError if a side of the images is no multiple of `stride`.
    """

    def __init__(self, encoder: Encoder, num_classes: int, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.stride = encoder.stride
        self.origin = "random"  # where the weights come from, in words
        self.num_classes = num_classes
        self.detach_features = config.detach in ("features", "both")
        self.detach_weights = config.detach in ("weights", "both")
        small = config.head_start == "small"
        self.classifier = _classifier(encoder.width, num_classes, small)
        aux = encoder.width_aux
        self.classifier_aux = None if aux is None else _classifier(aux, num_classes, small)
        self.decoder: nn.Module
        if config.decoder == "aspp":
            self.decoder = ASPP(encoder.width, num_classes + 1)
        else:
            sizes = (config.decoder_width, config.decoder_dilation)
            self.decoder = LargeFOV(encoder.width, num_classes + 1, *sizes, small)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters, which images must have."""
        return self.classifier.weight.dtype

    @property
    def is_packed(self) -> bool:
        """Whether `forward_packed` is the way of several sizes."""
        return self.encoder.packs

    def forward(self, images: Tensor, seg: bool = True) -> Outputs:
        """images (B, 3, H, W), normalised; seg=False leaves the segmentation head out."""
        features, features_aux = self.encoder(images)
        return self._heads(features, features_aux, seg)

    def forward_packed(
        self, images: Sequence[Tensor], seg: Sequence[bool] | None = None, keep: bool = True
    ) -> list[Outputs]:
        """As forward, for batches of several sizes in one pass of the encoder. seg: of each, None: true for all. keep:
        these sizes come again (Encoder.forward_packed)."""
        wanted = [True] * len(images) if seg is None else seg
        encoded = self.encoder.forward_packed(images, keep)
        return [self._heads(features, aux, own) for (features, aux), own in zip(encoded, wanted, strict=True)]

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the encoder (the frozen position embedding is not among them)."""
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of both classifiers and the segmentation head."""
        heads = [self.classifier, self.classifier_aux, self.decoder]
        return [parameter for head in heads if head is not None for parameter in head.parameters()]

    def _heads(self, features: Tensor, features_aux: Tensor | None, seg: bool) -> Outputs:
        logits, cam = self._classify(features, self.classifier)
        segmentation = self.decoder(features) if seg else None
        if self.classifier_aux is None or features_aux is None:
            return Outputs(logits, cam, segmentation, None, None)
        logits_aux, cam_aux = self._classify(features_aux, self.classifier_aux)
        return Outputs(logits, cam, segmentation, logits_aux, cam_aux)

    def _classify(self, features: Tensor, classifier: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """Z (B, C) and M (B, C, h, w)."""
        weight = classifier.weight
        # amax rather than a pooling operator: its gradient is deterministic on every device (ties share it).
        logits = functional.linear(features.amax(dim=(2, 3)), weight.flatten(1))
        source = features.detach() if self.detach_features else features
        return logits, functional.conv2d(source, weight.detach() if self.detach_weights else weight)


def _classifier(channels: int, num_classes: int, small: bool) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1, bias=False)
    if small:
        nn.init.normal_(layer.weight, std=_LOGIT_STD)
    return layer
