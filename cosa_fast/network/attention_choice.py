"""Which kernel a network attends by: the one that its configuration names, or the first of its device's order that
works. Found out before anything is trained, by a small image that passes through the network."""

import torch

from cosa_fast.errors import UserError, first_line
from cosa_fast.network.attention_backends import ORDERS, architecture, refusal
from cosa_fast.network.encoder import Encoder

AUTO = "auto"


def check_attention(key: str, kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """UserError where `key` (teacher.attention, model.attention) = `kind` can run with no network at all."""
    reason = None if kind == AUTO else refusal(kind, device, dtype)
    if reason is not None:
        raise _refused(key, kind, reason)


def choose_attention(key: str, kind: str, encoder: Encoder, *, learns: bool) -> None:
    """Let an encoder attend as `key` = `kind` says, or for "auto" by the first kernel of its device's order that it can
    run; `encoder.attention` is its name. `learns`: it must have a backward pass.

    UserError where a kernel was named that cannot run."""
    parameter = encoder.probe_image()
    if kind == AUTO:
        for candidate in ORDERS.get(architecture(parameter.device) or "", ()):
            if (
                refusal(candidate, parameter.device, parameter.dtype) is None
                and _try(encoder, candidate, learns) is None
            ):
                return
        encoder.attend("sdpa")
        return
    reason = refusal(kind, parameter.device, parameter.dtype) or _try(encoder, kind, learns)
    if reason is not None:
        raise _refused(key, kind, reason)


def _refused(key: str, kind: str, reason: str) -> UserError:
    return UserError(f"{key}={kind}: {reason}; set it to auto or sdpa")


def _try(encoder: Encoder, kind: str, learns: bool) -> str | None:
    """Let the encoder attend by `kind`; why it cannot, where it cannot."""
    reason = encoder.attend(kind)
    if reason is not None or kind == "sdpa":
        return reason
    if learns and kind in ("varlen", "xformers") and _drops_attention(encoder):
        return "knows no dropout (model.arguments.attn_drop_rate)"
    try:
        run_once(encoder, learns)
    except RuntimeError as error:
        encoder.attend("sdpa")
        return f"cannot run here ({first_line(error)})"
    return None


def _drops_attention(encoder: Encoder) -> bool:
    return any(getattr(getattr(module, "attn_drop", None), "p", 0.0) > 0 for module in encoder.modules())


def run_once(encoder: Encoder, learns: bool) -> None:
    """A small image through the encoder and, if it `learns`, back; a kernel's fault shows here."""
    image = encoder.probe_image()
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    with torch.set_grad_enabled(learns):
        features, _ = encoder(image)
        if learns:
            torch.autograd.grad(features.float().sum(), parameters, allow_unused=True)
    if image.device.type == "cuda":
        torch.cuda.synchronize(image.device)
