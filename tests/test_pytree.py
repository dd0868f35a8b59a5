"""Names of tree paths, masks by name, and merging loaded parameters into fresh ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax import pytree
from fmjax.errors import UserError

TREE = {
    "embed": {"word": {"embedding": np.zeros((5, 2))}},
    "encoder": {"layers": {"mlp": {"up": {"kernel": np.zeros((3, 2, 4)), "bias": np.zeros((3, 4))}}}},
    "head": {"classify": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}},
}
NAMES = [
    "embed/word/embedding",
    "encoder/layers/mlp/up/bias",
    "encoder/layers/mlp/up/kernel",
    "head/classify/bias",
    "head/classify/kernel",
]


def test_names_are_slash_joined_and_in_tree_order():
    assert list(pytree.names(TREE)) == NAMES
    assert pytree.names(TREE)["embed/word/embedding"] is TREE["embed"]["word"]["embedding"]
    assert list(pytree.names({"a": [1, (2, 3)]})) == ["a/0", "a/1/0", "a/1/1"]


keys = st.text("abc_", min_size=1, max_size=3)
trees = st.dictionaries(keys, st.recursive(st.integers(), lambda inner: st.dictionaries(keys, inner, min_size=1)), max_size=4)


@settings(deadline=None, max_examples=50)
@given(trees)
def test_unnames_is_the_inverse_of_names(tree):
    assert pytree.unnames(pytree.names(tree)) == tree


def test_map_named_passes_names_and_leaves():
    shapes = pytree.map_named(lambda name, leaf, other: (name, leaf.shape == other.shape), TREE, TREE)
    assert shapes["head"]["classify"]["bias"] == ("head/classify/bias", True)


def test_mask_searches_names():
    found = pytree.names(pytree.mask(TREE, ["bias$", "^embed/"], "optim.no_decay"))
    hits = ["embed/word/embedding", "encoder/layers/mlp/up/bias", "head/classify/bias"]
    assert [name for name, hit in found.items() if hit] == hits
    assert not any(pytree.names(pytree.mask(TREE, [], "optim.freeze")).values())


@pytest.mark.parametrize(("pattern", "message"), [("biass", "matches no parameter"), ("(", "not a regular expression")])
def test_mask_refuses_patterns_that_do_nothing(pattern, message):
    with pytest.raises(UserError, match=f"optim.freeze.*{message}") as caught:
        pytree.mask(TREE, ["bias", pattern], "optim.freeze")
    assert "\n" not in str(caught.value)


def changed(**leaves: object) -> dict:
    """Returns the names and leaves of the tree, all of them ones; None takes a leaf out."""
    flat = {name: np.ones_like(leaf) for name, leaf in pytree.names(TREE).items()}
    flat |= {name.replace("__", "/"): leaf for name, leaf in leaves.items()}
    return pytree.unnames({name: leaf for name, leaf in flat.items() if leaf is not None})


def test_merge_takes_what_fits():
    merged, fresh, unused = pytree.merge(TREE, changed(), (), "weights")
    assert fresh == unused == [] and all(leaf.all() for leaf in pytree.names(merged).values())


def test_merge_leaves_a_head_of_another_shape_fresh():
    loaded = changed(head__classify__kernel=np.ones((2, 7)), head__mlm__bias=np.ones(5), head__classify__bias=None)
    merged, fresh, unused = pytree.merge(TREE, loaded, ("^head/",), "weights")
    assert fresh == ["head/classify/bias", "head/classify/kernel"]
    assert unused == ["head/classify/kernel", "head/mlm/bias"]
    assert not merged["head"]["classify"]["kernel"].any() and merged["head"]["classify"]["kernel"].shape == (2, 3)
    assert merged["embed"]["word"]["embedding"].all()


def test_merge_lists_everything_that_does_not_fit():
    loaded = changed(embed__word__embedding=np.ones((6, 2)), encoder__layers__mlp__up__bias=None, extra=np.ones(1))
    with pytest.raises(UserError) as caught:
        pytree.merge(TREE, loaded, ("^head/",), "bert/")
    message = str(caught.value)
    assert message.startswith("bert/:") and "\n" not in message
    assert "missing (1): encoder/layers/mlp/up/bias" in message
    assert "unexpected (1): extra" in message
    assert "embed/word/embedding (6, 2), expected (5, 2)" in message


def test_grouped_shortens_long_lists():
    assert pytree.grouped({"missing": list("abc"), "unexpected": []}, most=2) == "missing (3): a, b, ..."
