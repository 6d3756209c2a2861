"""The ranking of LayerNorms by hand, and what it is made from."""

import pytest
import torch
from hypothesis import strategies as st

import normswap
from normswap.evaluation.evaluate import evaluate_models
from normswap.inputs.batches import ImageBatches
from normswap.planning.plan import keep_more
from normswap.search.sensitivity import site_costs
from normswap.surgery.swap import batch_norms, swap_norms

from ..models import family, images

COSTS = st.lists(st.floats(0.01, 10), min_size=2, max_size=40)


def test_a_sites_cost_is_what_swapping_it_alone_moves():
    model = family("deit3", torch.float64)
    with torch.no_grad():
        model.blocks[0].ls1.gamma.zero_()  # whatever norm1 gives, nothing of it arrives
    x = images(model, 12)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = normswap.make_plan(model)
    sites = [site.path for site in plan.sites]
    found = {cost.site: cost.kl for cost in site_costs(model, model, plan, sites, x.split(5))}
    assert list(found) == sites
    assert found["blocks.0.norm1"] == pytest.approx(0, abs=1e-12)
    assert all(found[site] > 1e-6 for site in sites if site != "blocks.0.norm1")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not batch_norms(model)
    assert not any(module._forward_hooks for module in model.modules())

    # By hand for one: least squares per channel in front of the last block's FFN, nothing else touched.
    site = "blocks.1.norm2"
    layer_norm, seen = model.get_submodule(site), []
    hook = layer_norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(x)
    hook.remove()
    rows, wanted = (t.reshape(-1, t.shape[-1]) for t in seen[0])  # [B, N, C] -> [M, C]
    scale = ((rows - rows.mean(0)) * (wanted - wanted.mean(0))).mean(0) / rows.var(0, correction=0)
    shift = wanted.mean(0) - scale * rows.mean(0)
    hook = layer_norm.register_forward_hook(lambda module, inputs, output: inputs[0] * scale + shift)
    with torch.no_grad():
        moved = model(x)
    hook.remove()
    with torch.no_grad():
        answers = model(x).log_softmax(1)
    kl = (answers.exp() * (answers - moved.log_softmax(1))).sum(1).mean()
    assert found[site] == pytest.approx(float(kl), rel=1e-6)


def test_costs_in_a_conversion_leave_its_batch_norms_alone():
    model = family("vit")
    x = images(model, 8)
    plan = normswap.make_plan(model)
    part = keep_more(model, plan, ["blocks.1.norm1", "norm"], "stays")
    swapped = swap_norms(model, part)
    normswap.calibrate(swapped, [x], model, options=normswap.CalibrationOptions(method="channel"))
    before = {k: v.clone() for k, v in swapped.state_dict().items()}
    costs = site_costs(swapped, model, plan, ["blocks.1.norm1", "norm"], [x])
    whole = evaluate_models({"original": model, "swapped": swapped}, [x])[-1].kl
    assert [cost.site for cost in costs] == ["blocks.1.norm1", "norm"]
    assert all(cost.kl != whole for cost in costs)
    assert all(torch.equal(before[k], v) for k, v in swapped.state_dict().items())


def test_ranking_looks_at_images_from_everywhere():
    sorted_by_class = torch.arange(100.0).reshape(-1, 1, 1, 1)  # [100] -> [100, 1, 1, 1]
    batches = ImageBatches([sorted_by_class], sorted_by_class)
    chosen = torch.cat(batches.first(30)).flatten()
    assert len(set(chosen.tolist())) == 30
    assert {int(value) // 10 for value in chosen} == set(range(10))
    assert sorted(torch.cat(batches.first(1000)).flatten().tolist()) == list(range(100))


def test_more_kept_sites_keep_their_reasons():
    model = family("headless")
    plan = normswap.make_plan(model, keep=["blocks.0.norm1"])
    more = keep_more(model, plan, ["blocks.1.norm2"], "stays for a test")
    reasons = {site.path: site.reason for site in more.sites if site.verdict == "keep"}
    assert reasons == {"blocks.0.norm1": "excluded by a keep pattern", "blocks.1.norm2": "stays for a test"}
    assert keep_more(model, plan, [], "nothing") is plan
    assert [s for s in more.sites if s.verdict != "keep"] == [
        s for s in plan.sites if s.path not in ("blocks.0.norm1", "blocks.1.norm2")
    ]


def test_answers_are_asked_for_once():
    model, other = family("vit"), family("vit")
    x, asked = images(model, 9), []
    model.register_forward_hook(lambda *_: asked.append(1))
    answers: dict[int, torch.Tensor] = {}
    once = evaluate_models({"a": model, "b": other}, x.split(4), answers=answers)
    assert len(asked) == len(answers) == 3
    again = evaluate_models({"a": model, "b": other}, x.split(4), answers=answers)
    assert len(asked) == 3
    assert once == again == evaluate_models({"a": model, "b": other}, x.split(4))
