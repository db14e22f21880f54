"""Whether specialists were made for a target: geometry and names. Needs configurations, no weights."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from ...checkpoints import repository_name
from ...configuration_poss import PosSConfig, eos_token_ids
from ...modeling_poss import check_target
from .findings import Finding, Verdict
from .recorded import Recorded


__all__ = ["geometry", "names"]


def geometry(
    target: PreTrainedModel, config: PosSConfig, depth: int | None = None, vocabulary: Sequence[int] = ()
) -> Finding:
    """Width, vocabulary, layers that are read, scaling of logits, draft positions.

    Args:
        target: on `meta` if its weights are not there yet.
        config: of the specialists.
        depth: draft positions a round; those trained if None.
        vocabulary: tokens that are drafted from; all if there are none.
    """
    text = target.config.get_text_config()
    numbers = {
        "target": target.config.model_type,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "target_layers": getattr(text, "num_hidden_layers", None),
        "feature_layers": config.feature_layers,
        "specialists": config.num_specialists,
        "positions_per_specialist": config.positions_per_specialist,
        "num_draft_positions": config.num_draft_positions,
        "depth": depth or config.num_draft_positions,
        "draft_vocab_size": config.draft_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "target_max_position_embeddings": getattr(text, "max_position_embeddings", None),
    }
    try:
        check_target(config, target)
    except ValueError as error:
        remedy = "Use specialists that were trained for this target, or train some: `hf-poss train`."
        return Finding("geometry", Verdict.FAILURE, str(error), remedy, numbers)
    told = (
        f"{config.num_specialists} specialist(s) for {config.num_draft_positions} draft positions fit "
        f"{target.__class__.__name__}: width {config.hidden_size}, vocabulary {config.vocab_size}"
    )
    problems = _mismatches(target, config, numbers["depth"], vocabulary)
    if not problems:
        return Finding("geometry", Verdict.OK, f"{told}.", numbers=numbers)
    found, remedies = zip(*problems, strict=True)
    return Finding("geometry", Verdict.WARNING, f"{told}; but {'; '.join(found)}.", " ".join(remedies), numbers)


def _mismatches(
    target: PreTrainedModel, config: PosSConfig, depth: int, vocabulary: Sequence[int]
) -> list[tuple[str, str]]:
    """What is odd though the text stays right, each with what to do."""
    problems = []
    own = PosSConfig.from_target_config(target.config)
    for name in ("logit_scale", "final_logit_softcapping"):
        if getattr(config, name) != getattr(own, name):
            problems.append(
                (
                    f"drafts are scored with a `{name}` of {getattr(config, name)}, the target has "
                    f"{getattr(own, name)}",
                    f"Set `{name}` in the specialists' config.json to the target's.",
                )
            )
    if depth > config.num_draft_positions:
        problems.append(
            (
                f"drafts go {depth} deep, beyond the {config.num_draft_positions} positions trained, where the last "
                "specialist goes on",
                f"Set `num_assistant_tokens` to {config.num_draft_positions}, or train for {depth} positions.",
            )
        )
    ends = set(eos_token_ids(target.generation_config)) | set(eos_token_ids(config))
    if len(vocabulary) and (never := sorted(ends - set(vocabulary))):
        problems.append(
            (
                f"the draft vocabulary lacks the ends of a sequence {never}, so they are never drafted",
                "Choose the draft vocabulary again: `hf-poss vocabulary`.",
            )
        )
    return problems


def names(target: PreTrainedModel, config: PosSConfig, recorded: Recorded) -> Finding:
    """The target that the specialists say they are for, against the one that is there, by the last part of a name."""
    found = target.config.name_or_path
    revision = getattr(target.config, "_commit_hash", None)
    wanted = {
        "config.json": config.target_name_or_path,
        "training_record.json": recorded.base_model,
    }
    numbers = {"target": repository_name(found) if found else None, "revision": revision, "made_for": wanted}
    wanted = {place: name for place, name in wanted.items() if name}
    if not wanted or not found:
        reason = "the specialists do not say which target they are for" if found else "the target has no name"
        return Finding("names", Verdict.SKIPPED, f"Not compared: {reason}.", numbers=numbers)
    others = {place: name for place, name in wanted.items() if repository_name(name) != repository_name(found)}
    if others:
        listing = " and ".join(f"{name} ({place})" for place, name in others.items())
        return Finding(
            "names",
            Verdict.WARNING,
            f"The specialists were made for {listing}, the target is {found}.",
            "If the two differ in more than the name, load the target that they were made for; the text stays right, "
            "but few drafts are accepted.",
            numbers,
        )
    return Finding("names", Verdict.OK, f"The specialists were made for {repository_name(found)}.", numbers=numbers)
