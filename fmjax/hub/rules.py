"""Rules for the names and storage of weights in a reference, each with a reversible operation.

A rule says which tensor of the reference holds one or several of our parameters, and how. Names may
contain placeholders such as `{layer}`. They run over the leading axes of our parameter, in order;
the reference has a separate tensor for each index.

    Rule("encoder/layers/mlp/up/kernel", "encoder.layer.{layer}.intermediate.dense.weight", LINEAR)
    Rule(("a/query/kernel", "a/key/kernel"), "a.qk.weight", Fused(LINEAR))

`linear`, `norm`, `embedding` and `attention` return the rules of a module; `under` adds a prefix to
rules.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from fmjax.hub.tensors import Tensor

Shape: TypeAlias = tuple[int, ...]
Names: TypeAlias = str | tuple[str, ...]


class Operation:
    """How a tensor of the reference holds our parameters, usually one. `read` and `write` are
    inverses."""

    def shape(self, *ours: Shape) -> Shape:
        """Returns the shape of the reference's tensor for the shapes of our parameters."""
        raise NotImplementedError

    def read(self, theirs: np.ndarray, *ours: Shape) -> tuple[np.ndarray, ...]:
        """Returns our parameters with the given shapes; `theirs` has the shape that `shape` returns
        for them."""
        raise NotImplementedError

    def write(self, *ours: np.ndarray) -> np.ndarray:
        """Returns the reference's tensor."""
        raise NotImplementedError

    def simplest(self, theirs: Shape) -> Shape:
        """Returns the shape of our parameter with the fewest axes, for use without a model."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AsIs(Operation):
    """The same array in both: an embedding, a norm's scale, a learned token."""

    def shape(self, *ours: Shape) -> Shape:
        return ours[0]

    def read(self, theirs: np.ndarray, *ours: Shape) -> tuple[np.ndarray, ...]:
        return (theirs,)

    def write(self, *ours: np.ndarray) -> np.ndarray:
        return ours[0]

    def simplest(self, theirs: Shape) -> Shape:
        return theirs


@dataclasses.dataclass(frozen=True)
class Flat(Operation):
    """Ours has several axes, such as a bias [heads, width]; the reference has one, after `leading`
    axes of size 1."""

    leading: int = 0

    def shape(self, *ours: Shape) -> Shape:
        return (*(1,) * self.leading, math.prod(ours[0]))

    def read(self, theirs: np.ndarray, *ours: Shape) -> tuple[np.ndarray, ...]:
        return (theirs.reshape(ours[0]),)

    def write(self, *ours: np.ndarray) -> np.ndarray:
        return ours[0].reshape(self.shape(ours[0].shape))

    def simplest(self, theirs: Shape) -> Shape:
        return theirs[self.leading :]


@dataclasses.dataclass(frozen=True)
class Linear(Operation):
    """A kernel [inputs ..., outputs ...], which the reference stores as a matrix [out, in] or,
    untransposed, [in, out]."""

    inputs: int = 1  # our input axes: 2 if heads are merged, [heads, width, out]
    transposed: bool = True

    def matrix(self, ours: Shape) -> Shape:
        """Returns [in, out]."""
        return (math.prod(ours[: self.inputs]), math.prod(ours[self.inputs :]))

    def shape(self, *ours: Shape) -> Shape:
        return self.matrix(ours[0])[::-1] if self.transposed else self.matrix(ours[0])

    def read(self, theirs: np.ndarray, *ours: Shape) -> tuple[np.ndarray, ...]:
        return ((theirs.T if self.transposed else theirs).reshape(ours[0]),)

    def write(self, *ours: np.ndarray) -> np.ndarray:
        matrix = ours[0].reshape(self.matrix(ours[0].shape))
        return matrix.T if self.transposed else matrix

    def simplest(self, theirs: Shape) -> Shape:
        return (*(1,) * (self.inputs - 1), *(theirs[::-1] if self.transposed else theirs))


@dataclasses.dataclass(frozen=True)
class Conv(Operation):
    """Filters [sizes ..., in, out], which the reference stores as [out, in, sizes ...]."""

    def shape(self, *ours: Shape) -> Shape:
        *sizes, inputs, outputs = ours[0]
        return (outputs, inputs, *sizes)

    def read(self, theirs: np.ndarray, *ours: Shape) -> tuple[np.ndarray, ...]:
        return (np.moveaxis(theirs, (1, 0), (-2, -1)),)

    def write(self, *ours: np.ndarray) -> np.ndarray:
        return np.moveaxis(ours[0], (-2, -1), (1, 0))

    def simplest(self, theirs: Shape) -> Shape:
        return (*theirs[2:], theirs[1], theirs[0])


@dataclasses.dataclass(frozen=True)
class Fused(Operation):
    """Several parameters concatenated in one tensor, each stored by `part`; their sizes along the
    axis may differ."""

    part: Operation
    axis: int = 0

    def shape(self, *ours: Shape) -> Shape:
        shapes = [self.part.shape(shape) for shape in ours]
        whole = list(shapes[0])
        whole[self.axis] = sum(shape[self.axis] for shape in shapes)
        return tuple(whole)

    def read(self, theirs: np.ndarray, *ours: Shape) -> tuple[np.ndarray, ...]:
        ends = np.cumsum([self.part.shape(shape)[self.axis] for shape in ours])
        pieces = np.split(theirs, ends[:-1], axis=self.axis)
        return tuple(
            self.part.read(piece, shape)[0] for piece, shape in zip(pieces, ours, strict=True)
        )

    def write(self, *ours: np.ndarray) -> np.ndarray:
        return np.concatenate([self.part.write(array) for array in ours], axis=self.axis)


AS_IS = AsIs()
VECTOR = Flat()
ROW = Flat(leading=1)
LINEAR = Linear()
MERGE_HEADS = Linear(inputs=2)
CONV = Conv()


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of the reference (per index of its placeholders), and our parameters that it
    holds."""

    ours: Names
    theirs: (
        Names  # alternative names: the first one that is stored is read; the first one is written
    )
    operation: Operation
    given: str = ""  # the rule is only for models that also have this parameter
    zeros: bool = False  # zero if it is not stored

    @property
    def params(self) -> tuple[str, ...]:
        """The names of our parameters."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names that the tensor may have."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


Rules: TypeAlias = tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Binding:
    """A rule for a model with known shapes, with the stored spelling of the name."""

    rule: Rule
    names: tuple[str, ...]  # names of the tensors, one per index
    indices: tuple[Shape, ...]  # shape of our parameters' leading axes
    shapes: tuple[Shape, ...]  # shapes of our parameters without those axes

    @property
    def shape(self) -> Shape:
        """The shape of each tensor of the reference."""
        return self.rule.operation.shape(*self.shapes)


def bind(
    rules: Rules, ours: Mapping[str, Shape], stored: Collection[str] = ()
) -> tuple[Binding, ...]:
    """Returns a binding for every parameter that a rule covers.

    Of several rules for one parameter, the first whose parameters all exist in the model is used.
    `stored` has the names of the stored tensors, which decide between spellings.
    """
    bindings: list[Binding] = []
    covered: set[str] = set()
    for rule in rules:
        needed = {*rule.params, rule.given} - {""}
        if ours.keys() >= needed and covered.isdisjoint(rule.params):
            covered.update(rule.params)
            bindings.append(bind_one(rule, [ours[name] for name in rule.params], stored))
    return tuple(bindings)


def bind_one(rule: Rule, shapes: Sequence[Shape], stored: Collection[str]) -> Binding:
    """Returns a rule's binding for the shapes of its parameters, in the first spelling that is
    stored."""
    leading = rule.spellings[0].count("{")
    indices = tuple(np.ndindex(shapes[0][:leading]))
    spelled = [tuple(fill(template, index) for index in indices) for template in rule.spellings]
    names = next((names for names in spelled if any(name in stored for name in names)), spelled[0])
    return Binding(rule, names, indices, tuple(shape[leading:] for shape in shapes))


def fill(template: str, index: Shape) -> str:
    """Returns a name with its placeholders replaced by the numbers of an index, in order."""
    numbers = iter(index)
    return re.sub(r"{\w+}", lambda _: str(next(numbers)), template)


def read(
    bindings: Iterable[Binding], tensors: Mapping[str, Tensor], ours: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """Returns our parameters in fp32 from the tensors of the reference, which are read one at a
    time."""
    params: dict[str, np.ndarray] = {}
    for binding in bindings:
        rule = binding.rule
        arrays = [params.setdefault(name, np.zeros(ours[name], np.float32)) for name in rule.params]
        for name, index in zip(binding.names, binding.indices, strict=True):
            if name in tensors or not rule.zeros:
                for array, part in zip(
                    arrays, rule.operation.read(tensors[name].read(), *binding.shapes), strict=True
                ):
                    array[index] = part
    return params


def write(bindings: Iterable[Binding], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the contiguous tensors of the reference for our parameters: the inverse of `read`."""
    tensors = {}
    for binding in bindings:
        for name, index in zip(binding.names, binding.indices, strict=True):
            parts = [params[ours][index] for ours in binding.rule.params]
            tensors[name] = np.asarray(binding.rule.operation.write(*parts), order="C")
    return tensors


def faults(bindings: Iterable[Binding], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Returns the missing and the misshapen tensors of the reference."""
    missing: list[str] = []
    misshapen: list[str] = []
    for binding in bindings:
        shape = binding.shape
        missing += [
            name for name in binding.names if name not in tensors and not binding.rule.zeros
        ]
        misshapen += [
            f"{name} ours {shape} theirs {tensors[name].shape}"
            for name in binding.names
            if name in tensors and tensors[name].shape != shape
        ]
    return {"missing": missing, "misshapen": misshapen}


def linear(ours: str, theirs: str, *, bias: bool = True, kernel: Operation = LINEAR) -> Rules:
    """Returns the rules of a linear layer."""
    rules = (Rule(f"{ours}/kernel", f"{theirs}.weight", kernel),)
    return (*rules, Rule(f"{ours}/bias", f"{theirs}.bias", VECTOR)) if bias else rules


def norm(ours: str, theirs: str, *, bias: bool = True) -> Rules:
    """Returns the rules of a norm, whose weights are called gamma and beta in old files."""
    rules = (Rule(f"{ours}/scale", (f"{theirs}.weight", f"{theirs}.gamma"), AS_IS),)
    return (
        (*rules, Rule(f"{ours}/bias", (f"{theirs}.bias", f"{theirs}.beta"), AS_IS))
        if bias
        else rules
    )


def embedding(ours: str, theirs: str) -> Rules:
    """Returns the rule of a table."""
    return (Rule(f"{ours}/embedding", f"{theirs}.weight", AS_IS),)


def attention(
    ours: str, theirs: tuple[str, str, str, str], *, bias: bool = True, out_bias: bool | None = None
) -> Rules:
    """Returns the rules of the linear layers of an attention layer: `theirs` are query, key, value
    and output.

    `out_bias` says whether the last one has a bias, if it differs from the others.
    """
    *inputs, out = theirs
    rules: list[Rule] = []
    for kind, name in zip(("query", "key", "value"), inputs, strict=True):
        rules += linear(f"{ours}/{kind}", name, bias=bias)
    last = bias if out_bias is None else out_bias
    return (*rules, *linear(f"{ours}/out", out, bias=last, kernel=MERGE_HEADS))


def under(ours: str, theirs: str, rules: Iterable[Rule]) -> Rules:
    """Returns rules with prefixes added to their names, such as "encoder.layer.{layer}".

    An empty name adds nothing.
    """

    def below(parent: str, mark: str, name: str) -> str:
        return f"{parent}{mark}{name}" if parent and name else name

    return tuple(
        dataclasses.replace(
            rule,
            ours=tuple(below(ours, "/", name) for name in rule.params),
            theirs=tuple(below(theirs, ".", name) for name in rule.spellings),
            given=below(ours, "/", rule.given),
        )
        for rule in rules
    )
