"""Recipes that cannot be carried out: one clear sentence, from the config alone, and nothing written."""

from __future__ import annotations

import json
import shutil

import pytest

import moe_compress


@pytest.mark.parametrize(
    ("family", "sentence", "said"),
    [
        ("mixtral", "expert_drop keep=1", "keep=1 is fewer than the 2 experts each token uses: keep at least 2."),
        ("mixtral", "expert_drop keep=9", "layer 0 has 8 experts, so keep=9 is not possible."),
        ("mixtral", "expert_drop keep=0", "layer 0 has 8 experts, so keep=0 is not possible."),
        ("mixtral", "expert_drop keep=8", "keep=8 would leave every layer all of its 8 experts: keep fewer, or say at"),
        ("mixtral", "expert_drop ratio=0", "ratio=0.0 would leave every layer all of its 8 experts"),
        ("mixtral", "expert_drop ratio=0.05 budget=global", "keep fewer, or say at least ratio=0.125."),
        ("mixtral", "expert_drop ratio=0.05 novice=mean", "keep fewer, or say at least ratio=0.125."),
        ("mixtral", "expert_drop keep=6 + expert_drop keep=6", "would leave every layer all of its 6 experts"),
        ("deepseek_v3", "expert_drop ratio=0.05", "say at least ratio=0.25."),
        ("mixtral", "expert_merge keep=8", "expert_merge keep=8 would leave every layer all of its 8 experts"),
        ("mixtral", "expert_merge ratio=0 router=sum", "expert_merge ratio=0.0 would leave every layer all of"),
        ("mixtral", "channels ratio=0", "channels ratio=0.0 would leave every expert all of its 24 neurons, in steps"),
        ("mixtral", "channels ratio=0.1 budget=global", "keep fewer, or say at least ratio=0.3333."),
        ("mixtral", "channels keep=24 within=layer", "channels keep=24 would leave every expert all of its 24 neurons"),
        ("mixtral", "channels ratio=0.4 multiple=24", "in steps of 24: use a smaller multiple=."),
        ("mixtral", "expert_drop ratio=1", "expert_drop.ratio=1.0: the fraction of experts removed is in [0, 1)."),
        ("mixtral", "expert_drop ratio=-0.1", "the fraction of experts removed is in [0, 1)."),
        ("mixtral", "expert_drop ratio=nan", "the fraction of experts removed is in [0, 1)."),
        ("mixtral", "expert_drop ratio=0.9", "keep=1 is fewer than the 2 experts each token uses"),
        ("mixtral", "expert_drop budget=global ratio=0.9", "keep=1 is fewer than the 2 experts"),
        ("mixtral", "expert_drop keep=6 + expert_drop keep=7", "layer 0 has 6 experts, so keep=7 is not possible."),
        ("deepseek_v3", "expert_drop keep=5", "keep=5 is not possible: possible counts are 4, 6, 8."),
        ("deepseek_v3", "expert_drop keep=2", "keep=2 is not possible: possible counts are 4, 6, 8."),
        ("mixtral", "expert_drop protect=0:8", "layer 0 has experts 0 to 7."),
        ("mixtral", "expert_drop protect=7:0", "layer 7 has no experts; MoE layers: [0, 1, 2]."),
        ("deepseek_v3", "expert_drop protect=0:0", "layer 0 has no experts; MoE layers: [1, 2]."),
        ("mixtral", "expert_drop protect=first", "`super`, `none` or a list such as 0:3,2:7 (layer:expert)."),
        ("mixtral", "expert_drop keep=2 protect=1:0,1:1,1:2", "cannot keep only 2 experts and spare the protected"),
        ("deepseek_v3", "expert_drop keep=4 protect=1:0,1:1,1:2", "cannot keep only 4 experts and spare"),
        ("mixtral", "expert_drop budget=search evaluations=0", "needs at least 1 evaluation, not evaluations=0."),
        (
            "mixtral",
            "expert_drop propagate=compressed budget=global",
            "decides layer by layer: it goes with budget=layer",
        ),
        ("mixtral", "expert_drop propagate=compressed protect=super", "goes with budget=layer and without protect=."),
        ("mixtral", "expert_drop propagate=compressed protect=0:1", "goes with budget=layer and without protect=."),
        ("mixtral", "expert_drop score=naee protect=0:1", "leave out protect=, reverse= and unseen=."),
        (
            "mixtral",
            "expert_drop score=naee reverse=true",
            "weighs whole sets of experts: leave out protect=",
        ),
        ("mixtral", "expert_drop score=naee unseen=keep", "weighs whole sets of experts: leave out protect="),
        ("mixtral", "expert_drop novice=mean + expert_drop score=naee keep=4", "but layers [0, 1, 2] were merged with"),
        ("mixtral", "expert_merge router=sum + top_k mean=1.5", "put this stage before that one."),
        ("mixtral", "skip + expert_merge by=outputs", "skip experts: put this stage before that one."),
        ("mixtral", "expert_drop novice=mean + skip", "holds constants in place of experts: let skip come before"),
        ("mixtral", "expert_drop novice=mean keep=0", "layer 0 has 8 experts, so keep=0 is not possible."),
        ("mixtral", "expert_drop novice=mean keep=9", "layer 0 has 8 experts, so keep=9 is not possible."),
        ("llama4_text", "expert_drop novice=mean", "novice=mean is not possible for llama4_text: its block runs"),
        ("mixtral", "expert_merge keep=1", "keep=1 is fewer than the 2 experts each token uses: keep at least 2."),
        ("mixtral", "expert_merge keep=0 router=sum", "layer 0 has 8 experts, so keep=0 is not possible."),
        ("mixtral", "expert_merge keep=9 router=sum", "layer 0 has 8 experts, so keep=9 is not possible."),
        ("mixtral", "expert_merge ratio=1", "expert_merge.ratio=1.0: the fraction of experts removed is in [0, 1)."),
        ("mixtral", "expert_merge keep=4 cap=1", "cap=1: 4 groups of at most 1 cannot hold the 8 experts of layer 0."),
        ("mixtral", "expert_merge preset=ream keep=2 cap=3", "cap=3: 2 groups of at most 3 cannot hold the 8 experts"),
        ("mixtral", "expert_merge budget=search evaluations=0", "needs at least 1 evaluation, not evaluations=0."),
        ("mixtral", "expert_merge propagate=compressed budget=global", "so it goes with budget=layer."),
        ("deepseek_v3", "expert_merge keep=5", "keep=5 is not possible: possible counts are 4, 6, 8."),
        ("deepseek_v3", "expert_merge router=sum + expert_drop keep=4", "router=sum and routes within groups: no more"),
        ("llama4_text", "expert_merge router=sum", "router=sum is not possible for llama4_text: its block runs"),
        ("mixtral", "layer_drop drop=0", "drop=0: of 3 layers with moe, 1 to 2 can be dropped."),
        ("mixtral", "layer_drop drop=3", "drop=3: of 3 layers with moe, 1 to 2 can be dropped."),
        ("mixtral", "layer_drop drop=-1", "drop=-1: of 3 layers with moe, 1 to 2 can be dropped."),
        ("mixtral", "layer_drop drop=none", "drop=None: of 3 layers with moe, 1 to 2 can be dropped."),
        ("mixtral", "layer_drop layers=0,1,2", "layer 2 is the only layer left with experts"),
        ("mixtral", "layer_drop layers=99", "layers=99: layers with moe: [0, 1, 2]."),
        ("deepseek_v3", "layer_drop layers=0", "layers=0: layers with moe: [1, 2]."),
        ("mixtral", "layer_drop layers=a", "layers=a: write layer numbers such as 3,7."),
        ("mixtral", "layer_drop layers=²", "layers=²: write layer numbers such as 3,7."),
        ("mixtral", "layer_drop layers=-1", "layers=-1: write layer numbers such as 3,7."),
        ("mixtral", "layer_drop layers=1,,2", "layers=1,,2: write layer numbers such as 3,7."),
        ("mixtral", "layer_drop part=attention drop=3", "drop=3: of 3 layers with attention, 1 to 2 can be dropped."),
        ("mixtral", "layer_drop part=attention layers=0,1,2", "layer 2 is the only one left with attention, which has"),
        ("nemotron_h", "layer_drop part=attention", "drop=1: of 0 layers with attention"),
        ("mixtral", "layer_drop layers=1 + layer_drop layers=1", "layers=1: layers with moe: [0, 2]."),
        ("mixtral", "block_drop drop=0", "drop=0: of 3 layers, 1 to 2 can be dropped."),
        ("mixtral", "block_drop drop=3", "drop=3: of 3 layers, 1 to 2 can be dropped."),
        ("mixtral", "block_drop layers=3", "layers=3: there are layers [0, 1, 2]."),
        ("mixtral", "block_drop layers=0,1,2", "layer 0 is the only layer left with experts"),
        ("deepseek_v3", "block_drop layers=1,2", "layer 1 is the only layer left with experts"),
        ("mixtral", "block_drop layers=0 + block_drop layers=2", "layers=2: there are layers [0, 1]."),
        ("mixtral", "top_k k=2", "k=2: layer 0 uses 2 experts per token; k is less, but at least 1."),
        ("mixtral", "top_k k=0", "k=0: layer 0 uses 2 experts per token; k is less, but at least 1."),
        ("mixtral", "top_k", "top_k needs k= or mean=: how many experts a token uses, such as k=1."),
        ("mixtral", "top_k k=none", "top_k needs k= or mean=: how many experts a token uses, such as k=1."),
        ("mixtral", "top_k mean=2", "mean=2.0: on average 1 or more, but fewer than 2, can be active."),
        ("mixtral", "top_k mean=0.5", "mean=0.5: on average 1 or more, but fewer than 2, can be active."),
        ("mixtral", "top_k mean=nan", "mean=nan: top_k needs k= or mean=, a number."),
        ("mixtral", "top_k mean=inf", "mean=inf: top_k needs k= or mean=, a number."),
        ("phimoe", "top_k k=1", "the router of phimoe always uses 2 experts."),
        ("mixtral", "skip share=0", "skip.share=0.0: a fraction between 0 and 1 is needed."),
        ("mixtral", "skip share=1", "skip.share=1.0: a fraction between 0 and 1 is needed."),
        ("mixtral", "skip beta=2", "skip.beta=2.0: a fraction between 0 and 1 is needed."),
        ("mixtral", "skip beta=nan", "skip.beta=nan: a fraction between 0 and 1 is needed."),
        ("llama4_text", "skip", "layer 0 uses 1 expert per token: there is none to skip."),
        ("mixtral", "top_k k=1 + skip", "layer 0 uses 1 expert per token: there is none to skip."),
        ("mixtral", "expert_drop mix=prose", "write domain:share,domain:share, such as prose:2,code:1."),
        ("mixtral", "expert_drop mix=prose:0", "shares are numbers from 0 up, and not all 0."),
        ("mixtral", "expert_drop mix=prose:1,prose:2", "mix=prose:1,prose:2: prose is named twice."),
        ("mixtral", "expert_drop score=naee novice=mean keep=1", "keep=1 is fewer than the 2 experts each token uses"),
        ("lfm2_moe", "block_drop layers=1", "layer 1 is the only one left with attention, which has to stay."),
        ("nemotron_h", "block_drop layers=1", "layer 1 is the only one left with attention, which has to stay."),
        ("nemotron_h", "block_drop drop=2", "drop=2: no single layer has both experts and attention, so two"),
        ("lfm2_moe", "block_drop drop=2 mode=consecutive", "every run of so many layers holds all layers with"),
        ("mixtral", "expert_drop mix=prose:-1,code:3", "shares are numbers from 0 up, and not all 0."),
    ],
)
def test_impossible_recipes_are_refused_from_the_config_alone(family, sentence, said, reader_folder, refused, tmp_path):
    assert said in refused(sentence, model=reader_folder(family))
    shutil.copy(reader_folder(family) / "config.json", tmp_path / "config.json")
    assert said in refused(sentence, model=tmp_path)


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("expert_drop budget=glob", "expert_drop.budget=glob: did you mean 'global'? allowed: layer, global, search."),
        ("expert_drop propagate=compres", "did you mean 'compressed'? allowed: original, compressed."),
        ("expert_drop novice=zero", "expert_drop.novice=zero: allowed: none, mean."),
        ("expert_merge grouping=hcsmoe", "did you mean 'hc_smoe'? allowed: hc_smoe, m_smoe, ream."),
        ("expert_merge grouping=hirarchical", "grouping=hirarchical: allowed: hc_smoe, m_smoe, ream."),
        ("expert_merge linkage=ward", "expert_merge.linkage=ward: allowed: average, complete, single."),
        ("expert_merge by=output", "did you mean 'outputs'? allowed: outputs, logits, weights"),
        ("expert_merge align=weight", "did you mean 'weights'? allowed: none, weights, activations, both."),
        ("expert_merge average=mean", "expert_merge.average=mean: allowed: frequency, saliency, uniform."),
        ("expert_merge router=max", "expert_merge.router=max: allowed: centroid, sum."),
        ("expert_merge preset=ties", "expert_merge has no preset 'ties'; presets: hc_smoe, m_smoe, ream."),
        ("expert_merge cap=0.5", "expert_merge.cap=0.5: a whole number is needed."),
        ("layer_drop metric=norm", "layer_drop.metric=norm: did you mean 'with_norm'?"),
        ("layer_drop part=mlp", "layer_drop.part=mlp: allowed: moe, attention."),
        ("block_drop mode=first", "block_drop.mode=first: allowed: discrete, consecutive."),
        ("top_k on=nothing", "top_k.on=nothing: allowed: text, noise."),
        ("layer_drop drop=1 layers=1", "layer_drop takes drop= or layers=, not both."),
        ("block_drop drop=1 layers=1", "block_drop takes drop= or layers=, not both."),
        ("top_k k=1 mean=1.5", "top_k takes k= or mean=, not both."),
        ("skip share=0.5 beta=0.5", "skip takes share= or beta=, not both."),
        ("expert_merge keep=4 ratio=0.5", "expert_merge takes keep= or ratio=, not both."),
    ],
)
def test_words_that_no_method_knows(sentence, said, reader_folder, refused):
    assert said in refused(sentence, model=reader_folder("mixtral"))


def test_a_search_without_text_to_search_on(reader_folder, refused):
    said = refused("expert_drop budget=search", model=reader_folder("mixtral"), samples=3, late=True)
    assert said == "a search needs at least 4 windows of calibration text: raise samples=."


def test_nothing_is_written_for_a_refused_recipe(reader_folder, refused, tmp_path):
    refused("expert_drop keep=1", model=reader_folder("mixtral"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("family", "reason"),
    [("jetmoe", "its attention is routed by the same expert count"), ("longcat_flash", "zero-computation experts")],
)
def test_families_whose_experts_cannot_go_say_why(family, reason, family_folder, refused):
    assert reason in refused("expert_drop", model=family_folder(family))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "llama"}, "llama is not a Mixture-of-Experts architecture"),
        (
            {"model_type": "inkling2"},
            "inkling2 is not supported: its layers attend to the streams",
        ),
        ({"model_type": "dbrx", "ffn_config": {"ffn_act_fn": "silu"}}, "is no dbrx config: Validation error"),
        (
            {"model_type": "llama4"},
            "holds none of text_config, llm_config, language_config, thinker_config.text_config, which says",
        ),
        ({"model_type": "nonsense"}, "'nonsense' is not an architecture of transformers"),
        ({}, "names no model_type"),
        ({"model_type": "mixtral", "quantization_config": {"quant_method": "gptq"}}, "is stored in gptq format"),
        ({"model_type": "deepseek", "scoring_func": "sigmoid"}, "scoring_func=sigmoid"),
        ({"model_type": "mixtral", "hidden_size": "wide"}, "is no mixtral config"),
    ],
)
def test_models_that_cannot_be_read_say_why(values, said, refused, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    assert said in refused("expert_drop", model=folder)
    with pytest.raises(ValueError, match=said):
        moe_compress.plan("expert_drop", model=folder)


def test_an_error_in_a_later_stage_names_it():
    with pytest.raises(ValueError, match=r"^stage 2 \(top_k\): k=3: layer 0 uses 2 experts"):
        moe_compress.plan("expert_drop keep=6 + top_k k=3", model="tiny-mixtral")
    with pytest.raises(ValueError, match=r"^k=3: layer 0 uses 2 experts"):
        moe_compress.plan("top_k k=3", model="tiny-mixtral")
