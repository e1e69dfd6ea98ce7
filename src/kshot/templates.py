"""Sentences for class names: the default, the ensembles known by name, and the check of all others. Loads no torch."""

from collections.abc import Sequence

from kshot.errors import UserError, nearest_first

DEFAULT_TEMPLATE = "a photo of a {}."

# CoOp's choice of the templates of Radford et al. (2021) for ImageNet.
IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Gives the sentences back; raises UserError when there is none, or one has not one ``{}``, or other braces."""
    if not templates:
        raise UserError("templates: there must be a sentence, with {} where the class name goes")
    for sentence in templates:
        around = sentence.split("{}")
        if len(around) != 2 or any(brace in text for text in around for brace in "{}"):
            raise UserError(f"the template {sentence!r} must have {{}} once, where the class name goes")
    return tuple(templates)


def named_templates(templates: Sequence[str] | str) -> tuple[str, ...]:
    """Sentences as they are given, or ``imagenet7`` (CoOp's), ``imagenet60`` (PromptSRC's), ``imagenet80`` (CLIP's).

    Raises:
        UserError: no ensemble of that name, no sentence, or one without a place for the class name.
    """
    if not isinstance(templates, str) or "{" in templates:
        return check_templates([templates] if isinstance(templates, str) else templates)
    if templates == "imagenet7":
        return IMAGENET_7
    if templates not in ("imagenet60", "imagenet80"):
        known = nearest_first(templates, ["imagenet7", "imagenet60", "imagenet80"])
        raise UserError(f"templates: {templates!r} has no {{}} for the class name, nor is it an ensemble. {known}")
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    sentences = tuple(str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES)
    return sentences[: int(templates.removeprefix("imagenet"))]  # PromptSRC's 60 are the first of CLIP's 80
