"""The checks of a pair: a sound one passes all, and every planted fault is found by the check that is for it."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
from conftest import SMALL_VOCAB, small_target
from sound_pair import own_prompts, small_tokenizer, sound_pair

from hf_poss import PosSModel, collect_statistics, decoding
from hf_poss.draft_tree import DraftTree
from hf_poss.evaluation.check import Effort, Finding, PairReport, Verdict, check_pair
from hf_poss.evaluation.check.acceptance import acceptance, boundaries
from hf_poss.evaluation.check.distribution import Sampling, distribution
from hf_poss.evaluation.check.drifting import drift
from hf_poss.evaluation.check.fit import geometry, names
from hf_poss.evaluation.check.losslessness import greedy_texts, losslessness
from hf_poss.evaluation.check.pair import Pair, Texts, bare_settings
from hf_poss.evaluation.check.precision import in_dtype
from hf_poss.evaluation.check.recorded import Recorded
from hf_poss.evaluation.check.roll_outs import first_drafts, roll_outs
from hf_poss.evaluation.check.specialists import specialists
from hf_poss.evaluation.check.tokenizers import surprise, tokenizer_fits
from hf_poss.evaluation.check.weights import outputs, weights
from hf_poss.verification import Walk, scripted_picks


EFFORT = Effort(prompts=6, new_tokens=16, copies=12, sampled_tokens=6, texts=8, lead=6, text_tokens=24)
SMALL = Effort(prompts=2, new_tokens=6, copies=6, sampled_tokens=4, texts=2, lead=2, text_tokens=6)
CHECKS = [
    "geometry",
    "names",
    "tokenizer",
    "weights",
    "prompts",
    "outputs",
    "greedy float32",
    "greedy half",
    "distribution",
    "acceptance",
    "boundaries",
    "specialists",
    "drift",
]


@pytest.fixture
def pair() -> Pair:
    target, poss, tokenizer = sound_pair()
    return Pair(target, poss, tokenizer, own_prompts())


def checked(pair: Pair, effort: Effort = EFFORT, **kwargs) -> PairReport:
    return check_pair(pair.target, pair.poss, pair.tokenizer, pair.prompts, effort=effort, **kwargs)


def texts_of(pair: Pair) -> Texts:
    torch.manual_seed(0)
    with torch.no_grad():
        return Texts.of(pair, EFFORT.texts, EFFORT.lead, EFFORT.text_tokens)


def greedy(pair: Pair, dtype: torch.dtype = torch.float32) -> Finding:
    with in_dtype(pair.target, dtype), in_dtype(pair.poss, dtype), torch.no_grad():
        return losslessness("greedy", greedy_texts(pair, EFFORT.new_tokens), dtype)


def test_a_sound_pair_passes_every_check(pair):
    seen = []
    report = checked(pair, on_check=seen.append)
    assert report.verdict == "sound" and report.is_sound
    assert [finding.name for finding in report.findings] == CHECKS == seen
    assert {finding.verdict for finding in report.findings} == {Verdict.OK}
    assert not any(finding.remedy for finding in report.findings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_check_leaves_everything_as_it_was(pair, dtype):
    """Weights bit by bit, settings, random numbers, and the model that the specialists refer to."""
    target, poss = pair.target.to(dtype), pair.poss.to(dtype)
    target.generation_config.repetition_penalty = 1.3  # would stand between logits and tokens
    settings, attached = target.generation_config, poss.reference
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    report = checked(pair, SMALL)
    assert torch.equal(torch.rand(3), expected)
    assert not report.of(Verdict.FAILURE)
    assert all(torch.equal(weight, before[name]) for name, weight in target.state_dict().items())
    assert target.dtype == poss.dtype == dtype
    assert target.generation_config is settings and poss.reference is attached


def test_a_check_that_raises_is_a_failure_and_others_go_on(pair, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no memory for this")

    monkeypatch.setattr("hf_poss.evaluation.check.run.greedy_texts", broken)
    report = checked(pair, SMALL)
    assert report.verdict == "not sound"
    assert report.of(Verdict.FAILURE) == [report["greedy float32"], report["greedy half"]]
    assert "RuntimeError: no memory for this" in report["greedy half"].summary
    assert report["drift"].verdict is not Verdict.SKIPPED


@pytest.mark.parametrize("prompts", [[], [[3, 4], []]])
def test_prompts_without_tokens_are_refused(pair, prompts):
    with pytest.raises(ValueError, match="no prompt, or one without tokens"):
        check_pair(pair.target, pair.poss, pair.tokenizer, prompts)


# ---- Another target, another tokenizer ----


def test_specialists_of_another_target_are_found(pair):
    """Of the same shape: the text is right all the same, drafts are at chance, and the name tells."""
    other = small_target(seed=8)
    other.config.name_or_path = "someone/other-target"
    report = checked(Pair(other, pair.poss, pair.tokenizer, pair.prompts))
    assert report["acceptance"].verdict is Verdict.FAILURE and "chance" in report["acceptance"].summary
    assert report["names"].verdict is Verdict.WARNING and "small-target" in report["names"].summary
    assert report["drift"].verdict is Verdict.WARNING
    assert report.of(Verdict.FAILURE) == [report["acceptance"]] and not report.is_sound


def test_a_target_of_another_shape_is_not_run(pair):
    other = small_target(vocab_size=SMALL_VOCAB + 1)
    report = checked(Pair(other, pair.poss, pair.tokenizer, pair.prompts))
    assert report["geometry"].verdict is Verdict.FAILURE and "12 tokens" in report["geometry"].summary
    assert {finding.verdict for finding in report.findings[1:]} == {Verdict.SKIPPED}
    assert "geometry" in report["drift"].summary


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"logit_scale": 2.0}, "`logit_scale` of 2.0, the target has 1.0"),
        ({"final_logit_softcapping": 30.0}, "`final_logit_softcapping` of 30.0"),
    ],
)
def test_drafts_that_are_scored_otherwise_are_found(pair, change, told):
    for name, value in change.items():
        setattr(pair.poss.config, name, value)
    finding = geometry(pair.target, pair.poss.config)
    assert finding.verdict is Verdict.WARNING and told in finding.summary


def test_depths_and_vocabularies_that_do_not_fit_are_found(pair):
    assert geometry(pair.target, pair.poss.config, depth=4).verdict is Verdict.OK
    assert "beyond the 4 positions" in geometry(pair.target, pair.poss.config, depth=5).summary
    pair.target.generation_config.eos_token_id = 2
    assert geometry(pair.target, pair.poss.config, vocabulary=[2, 3]).verdict is Verdict.OK
    assert "ends of a sequence [2]" in geometry(pair.target, pair.poss.config, vocabulary=[3, 4]).summary


def test_names_are_compared_with_all_that_is_recorded(pair):
    def verdict(config_says, record_says):
        pair.poss.config.target_name_or_path = config_says
        return names(pair.target, pair.poss.config, Recorded(base_model=record_says)).verdict

    assert verdict("/elsewhere/small-target/", None) is Verdict.OK
    assert verdict(None, "me/small-target") is Verdict.OK
    assert verdict("me/small-target", "me/another") is Verdict.WARNING
    assert verdict(None, None) is Verdict.SKIPPED


def test_a_tokenizer_of_other_tokens_is_found(pair):
    tokenizer = pair.tokenizer
    assert tokenizer_fits(tokenizer, pair.target.config, None, Recorded()).verdict is Verdict.OK
    tokenizer.add_tokens(["w98"])
    tokenizer.eos_token = "w98"
    assert tokenizer_fits(tokenizer, pair.target.config, None, Recorded()).verdict is Verdict.FAILURE
    report = checked(pair, SMALL)
    assert report["tokenizer"].verdict is Verdict.FAILURE and report["distribution"].verdict is Verdict.SKIPPED


def test_a_tokenizer_of_another_end_is_found(pair):
    pair.target.generation_config.eos_token_id = 7
    finding = tokenizer_fits(pair.tokenizer, pair.target.config, pair.target.generation_config, Recorded())
    assert finding.verdict is Verdict.WARNING and "end of sequence is 2, the target's [7]" in finding.summary


def test_the_tokenizer_that_is_recorded_is_compared(pair, tmp_path):
    """Vocabulary, special tokens and chat template of the one that the specialists were trained with."""

    def finding(drafters):
        drafters.save_pretrained(tmp_path / "trained-with")
        recorded = Recorded(tokenizer=str(tmp_path / "trained-with"), vocab_size=SMALL_VOCAB)
        return tokenizer_fits(pair.tokenizer, pair.target.config, None, recorded)

    assert finding(small_tokenizer()).verdict is Verdict.OK
    moved = finding(small_tokenizer(shift=1))
    assert moved.verdict is Verdict.WARNING and "9 tokens differ" in moved.summary
    templated = small_tokenizer()
    templated.chat_template = "{{ messages }}"
    assert "chat_template differs" in finding(templated).summary
    absent = Recorded(tokenizer=str(tmp_path / "gone"), vocab_size=SMALL_VOCAB)
    assert "not at hand" in tokenizer_fits(pair.tokenizer, pair.target.config, None, absent).summary


def test_a_tokenizer_whose_ids_are_moved_is_found_by_what_the_target_makes_of_them(pair):
    """Sizes and special tokens agree."""
    texts = pair.tokenizer.batch_decode(pair.prompts)
    assert pair.tokenizer(texts)["input_ids"] == pair.prompts
    assert surprise(pair).verdict is Verdict.OK
    moved = small_tokenizer(shift=4)
    assert tokenizer_fits(moved, pair.target.config, None, Recorded()).verdict is Verdict.OK
    finding = surprise(Pair(pair.target, pair.poss, moved, moved(texts)["input_ids"]))
    assert finding.verdict is Verdict.WARNING and "blindly" in finding.summary


# ---- Weights ----


@pytest.mark.parametrize("owner", ["target", "specialists"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_found(pair, owner, value):
    model = pair.target if owner == "target" else pair.poss
    name, weight = list(model.named_parameters())[-1]
    weight.data.view(-1)[3] = value
    report = checked(pair, SMALL)
    assert report["weights"].verdict is Verdict.FAILURE
    assert owner in report["weights"].summary and name in report["weights"].summary
    assert report["greedy float32"].verdict is Verdict.SKIPPED


def test_weights_that_were_never_loaded_are_found(pair):
    pair.poss.layers[1].mlp.up_proj.weight.data.zero_()
    finding = weights(pair.poss, pair.target)
    assert finding.verdict is Verdict.FAILURE and "layers.1.mlp.up_proj" in finding.summary


def test_specialists_that_were_never_trained_are_found(pair):
    finding = weights(PosSModel(pair.poss.config).eval(), pair.target)
    assert finding.verdict is Verdict.FAILURE and "random" in finding.summary


def test_features_that_overflow_are_found(pair):
    """All weights are numbers, and what they make of a text is none."""
    pair.poss.layers[1].mlp.down_proj.weight.data.fill_(1e38)
    assert weights(pair.poss, pair.target).verdict is Verdict.OK
    finding = outputs(pair, texts_of(pair))
    assert finding.verdict is Verdict.FAILURE and "specialist 2" in finding.summary


# ---- Specialists ----


def test_copies_of_one_layer_are_found(pair):
    pair.poss.layers[1].load_state_dict(pair.poss.layers[0].state_dict())
    finding = outputs(pair, texts_of(pair))
    assert finding.verdict is Verdict.WARNING and "All specialists are copies" in finding.summary


def test_two_copies_among_others_are_named(pair):
    config = copy.deepcopy(pair.poss.config)
    config.num_draft_positions = 6
    longer = PosSModel(config)
    longer.load_state_dict(pair.poss.state_dict(), strict=False)
    longer.layers[2].load_state_dict(pair.poss.layers[0].state_dict())
    finding = outputs(Pair(pair.target, longer.eval(), pair.tokenizer, pair.prompts), texts_of(pair))
    assert finding.verdict is Verdict.WARNING and "1 and 3" in finding.summary and "1 and 2" not in finding.summary


def test_adapters_that_were_never_trained_are_copies(pair):
    """Their A differs, their B is zero: all compute the same."""
    pytest.importorskip("peft")
    config = type(pair.poss.config)(**{**pair.poss.config.to_dict(), "specialist_adapter": {"r": 4}})
    adapted = PosSModel(config)
    adapted.fc.load_state_dict(pair.poss.fc.state_dict())
    adapted.shared_layer.load_state_dict(pair.poss.layers[0].state_dict())
    assert weights(adapted, pair.target).verdict is Verdict.OK
    finding = outputs(Pair(pair.target, adapted.eval(), pair.tokenizer, pair.prompts), texts_of(pair))
    assert finding.verdict is Verdict.WARNING and "All specialists are copies" in finding.summary


@pytest.mark.parametrize("dead", [1, 2])
def test_a_specialist_of_noise_is_dead(pair, dead):
    generator = torch.Generator().manual_seed(0)
    for parameter in pair.poss.layers[dead - 1].parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    rolled = roll_outs(pair, texts_of(pair))
    finding = specialists(rolled, pair.poss.config)
    assert finding.verdict is Verdict.WARNING
    by_specialist = {entry["specialist"]: entry for entry in finding.numbers["compared"]}
    assert by_specialist[dead]["neighbour"] == 3 - dead and by_specialist[dead]["interval"][1] < 0
    assert f"Specialist {dead} drafts" in finding.summary and f"pecialist {3 - dead} drafts" not in finding.summary
    broken = boundaries(rolled, positions_per_specialist=2)
    assert (broken.verdict is Verdict.WARNING) == (dead == 2)
    assert broken.numbers.get("drops", []) == ([3] if dead == 2 else [])


def test_swapped_specialists_are_counted_as_a_roll_out_of_them_counts(pair):
    """Position 3 through specialist 1, against a model whose second specialist is the first one's copy."""
    texts = texts_of(pair)
    rolled = roll_outs(pair, texts)
    assert set(rolled.swaps) == {(1, 2), (2, 2), (3, 1), (4, 1)}
    for (position, _), sums in rolled.swaps.items():
        assert torch.equal(sums[:, 0], rolled.counts[:, 2, position - 1])
        assert torch.equal(sums[:, 1], rolled.counts[:, 3, position - 1])
    pair.poss.layers[1].load_state_dict(pair.poss.layers[0].state_dict())
    copied = roll_outs(pair, texts)
    assert torch.equal(copied.counts[..., :2], rolled.counts[..., :2])
    assert torch.equal(copied.counts[:, 3, 2], rolled.swaps[3, 1][:, 2])


def test_drafts_are_those_of_generate(pair):
    """Rounds of one draft behind the first greedy token of each text: accepted where the text goes on with it."""
    knobs = pair.poss.generation_config
    knobs.draft_top_k = knobs.num_assistant_tokens = 1
    texts = texts_of(pair)
    drafts, first = first_drafts(pair, texts.input_ids), texts.written.long().argmax(-1).tolist()
    seen = set()
    for row, start in enumerate(first[:16]):
        prompt = texts.input_ids[row, :start].tolist()
        with collect_statistics() as stats:
            pair.generate([prompt], do_sample=False, max_new_tokens=3, assistant_model=pair.poss)
        accepted = stats.calls[0].authors[1] == 1
        assert accepted == bool(drafts[row, start + 1] == texts.input_ids[row, start + 1])
        seen.add(accepted)
    assert seen == {True, False}
    counted = texts.written[:, 2:]
    hits = ((drafts == texts.input_ids)[:, 2:] & counted).sum(-1)
    assert torch.equal(roll_outs(pair, texts).counts[:, 1, 0], hits)


def test_few_rows_tell_nothing_of_specialists(pair):
    with torch.no_grad():
        few = Texts.of(pair, 1, 2, 4)
    finding = specialists(roll_outs(pair, few), pair.poss.config)
    assert finding.verdict is Verdict.SKIPPED and "too few rows" in finding.summary


def test_features_far_from_the_targets_drift(pair):
    texts = texts_of(pair)
    assert drift(pair, texts).verdict is Verdict.OK
    pair.poss.layers[1].mlp.down_proj.weight.data.mul_(30)
    finding = drift(pair, texts)
    assert finding.verdict is Verdict.WARNING and "norms are far" in finding.summary


def test_few_accepted_drafts_are_told(pair):
    """Above chance, and not worth a round."""
    rolled = roll_outs(pair, texts_of(pair))
    assert acceptance(rolled, None).verdict is Verdict.OK
    guess = acceptance(rolled, None).numbers["constant_guess"]
    assert guess == pytest.approx(
        max(torch.cat(rolled.continuations).bincount()) / len(torch.cat(rolled.continuations))
    )
    rolled.counts[:, 3, 1:] = 0
    rolled.counts[:, 3, 0] //= 2
    few = acceptance(rolled, None)
    assert few.verdict is Verdict.WARNING and few.numbers["chain_tau"] < 1.4


# ---- The text ----


def wrong_at(rounds: int):
    """A target that confirms another token than its best one, from the `rounds`-th round on."""
    counter = itertools.count(1)

    def script(tree: DraftTree, picks: torch.LongTensor) -> torch.LongTensor:
        return (picks + 1) % SMALL_VOCAB if next(counter) >= rounds else picks

    return scripted_picks(script)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_wrong_token_is_found_with_its_margin(pair, dtype):
    assert greedy(pair, dtype).verdict is Verdict.OK
    with wrong_at(5):
        finding = greedy(pair, dtype)
    assert finding.verdict is Verdict.FAILURE
    assert finding.numbers["worst_margin"] > finding.numbers["tolerance"] > 0
    first = finding.numbers["divergences"][0]
    assert first["drafted"] == (first["plain"] + 1) % SMALL_VOCAB


def test_a_fault_in_batches_alone_is_found(pair):
    def script(tree: DraftTree, picks: torch.LongTensor) -> torch.LongTensor:
        return (picks + 1) % SMALL_VOCAB if len(picks) > 1 else picks

    with scripted_picks(script):
        finding = greedy(pair)
    assert finding.verdict is Verdict.FAILURE
    assert {divergence["rows"] for divergence in finding.numbers["divergences"]} == {"batch"}


def test_a_target_that_writes_wrong_tokens_by_itself_is_found(pair, monkeypatch):
    """The same ones with drafts and without, so that no text differs."""
    generate = pair.target.generate

    def corrupted(*args, **kwargs):
        output = generate(*args, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        sequences[:, -2] = (sequences[:, -2] + 3) % SMALL_VOCAB
        return output

    monkeypatch.setattr(pair.target, "generate", corrupted)
    finding = greedy(pair)
    assert finding.verdict is Verdict.FAILURE and not finding.numbers["divergences"]
    assert "with and without drafts" in finding.summary


@torch.no_grad()
def test_the_margin_is_that_of_a_plain_pass(pair):
    """By hand, for the first token of one text that differs."""
    with wrong_at(3):
        divergence = greedy(pair).numbers["divergences"][0]
    assert (divergence["drafts"], divergence["rows"], divergence["prompt"]) == ("poss-chain", "one row", 0)
    prompt = torch.tensor([pair.prompts[0]])
    text = pair.target.generate(prompt, do_sample=False, max_new_tokens=16)
    assert text[0, prompt.shape[1] + divergence["token"]] == divergence["plain"]
    logits = pair.target(text[:, : prompt.shape[1] + divergence["token"]]).logits[0, -1]
    assert divergence["margin"] == pytest.approx(float(logits.max() - logits[divergence["drafted"]]), abs=1e-4)


def test_a_near_tie_is_no_fault(pair):
    """Two tokens of one row of the head, the second a hair below: whichever is taken, the text is right. In float32 it
    is told."""
    head = pair.target.get_output_embeddings().weight.data

    def script(tree: DraftTree, picks: torch.LongTensor) -> torch.LongTensor:
        return torch.where(picks == 5, 6, picks)

    head[6] = head[5] - 1e-9
    with scripted_picks(script):
        finding, half = greedy(pair), greedy(pair, torch.bfloat16)
    assert finding.numbers["divergences"] and half.numbers["divergences"]
    assert finding.verdict is Verdict.WARNING and "near tie" in finding.summary
    assert half.verdict is Verdict.OK
    head[6] = 0.9 * head[5]
    with scripted_picks(script):
        assert greedy(pair).verdict is Verdict.FAILURE


def test_a_target_that_decodes_without_drafts_is_not_called_right(pair, monkeypatch):
    monkeypatch.setattr(decoding, "rope_obstacle", lambda *_: "this one may not")
    finding = greedy(pair)
    assert finding.verdict is Verdict.SKIPPED and "without drafts" in finding.summary


# ---- What is sampled ----


@contextmanager
def lenient_walk(monkeypatch, chance: float, seed: int):
    """A walk that takes a drafted token, whatever the target picked, with some chance."""
    generator = torch.Generator().manual_seed(seed)

    class LenientWalk(Walk):
        @classmethod
        def picking(cls, nodes, parents, logits, row, tokens, stop, picker):
            def step(node):
                token = picker.pick(tokens.prefix(row), logits[node : node + 1])
                children = {nodes[child]: child for child in range(1, len(nodes)) if parents[child] == node}
                if children and float(torch.rand((), generator=generator)) < chance:
                    return next(iter(children.items()))
                return token, children.get(token)

            return cls(row, tokens, stop, picker, step)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "Walk", LenientWalk)
        yield


def sampled(pair: Pair, seed: int = 0, nucleus: bool = True) -> Finding:
    with bare_settings(pair.target), torch.no_grad():
        return distribution(pair, copies=24, new_tokens=6, seed=seed, nucleus=nucleus)


@pytest.mark.parametrize("seed", range(2))
def test_a_walk_that_favours_drafts_is_found_by_the_distribution_alone(pair, monkeypatch, seed):
    """Half of the drafts taken on trust, at temperature 1, where no token is impossible. Greedy text, which is walked
    another way, is right."""
    with lenient_walk(monkeypatch, 0.5, seed):
        finding = sampled(pair, seed, nucleus=False)
        assert finding.verdict is Verdict.FAILURE
        assert min(test["p_value"] for test in finding.numbers["tests"]) < finding.numbers["error_rate"] / 2
        assert greedy(pair).verdict is Verdict.OK


def test_tokens_that_top_p_rules_out_are_found(pair, monkeypatch):
    monkeypatch.setattr(Sampling, "arguments", lambda self: {"do_sample": True, "top_k": 0})
    finding = sampled(pair)
    assert finding.verdict is Verdict.FAILURE and "rules out" in finding.summary


def test_a_sound_pair_passes_the_distribution_test(pair):
    """Fails once in 1,000 seeds."""
    finding = sampled(pair, seed=100)
    assert finding.verdict is Verdict.OK
    assert [test["tokens"] for test in finding.numbers["tests"]] == [6 * 24 * 6] * 4
    assert finding.numbers["accepted"] > 100
