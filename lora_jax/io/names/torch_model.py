"""The PyTorch counterpart of a JAX model, by its names: which module or tensor is which parameter, for all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lora_jax.adapter.site import Site, Sites
from lora_jax.errors import MatchError
from lora_jax.io.names.names import Names, Target

_WEIGHTS = ("kernel", "embedding", "scale", "w", "weight", "input_embedding", "embeddings")
_BIASES = ("bias", "b")


class Place(NamedTuple):
    """Where a PyTorch module, or a part of one, is in the JAX model."""

    site: Site
    target: Target


@dataclass(frozen=True)
class TorchModel:
    """The modules and tensors of the PyTorch counterpart of a JAX model, by name.

    Attributes:
      modules: places of linear weights by the name of their module, or of their stacked parameter; several, in the
        order of its outputs, where the module fuses several parameters.
      tensors: paths by the name of the tensor, for parameters that PyTorch has whole.
      unnamed: why other sites have no name.
    """

    modules: Mapping[str, tuple[Place, ...]]
    tensors: Mapping[str, str]
    unnamed: Mapping[str, MatchError] = field(default_factory=dict)

    def owners(self) -> set[str]:
        """Every module that holds parameters of its own."""
        stacked = {*self.parameters()}
        return {*self.modules} - stacked | {name.rpartition(".")[0] for name in (*self.tensors, *stacked)}

    def known(self) -> set[str]:
        """Every module, those that contain others included."""
        names = (name.split(".") for name in self.owners())
        return {".".join(parts[:end]) for parts in names for end in range(1, len(parts) + 1)}

    def parameters(self) -> list[str]:
        """Names of stacked parameters."""
        return [name for name, places in self.modules.items() if places[0].target.parameter]

    def shapes(self, names: Names) -> dict[str, tuple[int, ...]]:
        """Shapes of stacked parameters, in the order of the rules, and of the weights of modules."""
        found: dict[str, tuple[int, ...]] = {}
        stacks = self.parameters()
        for name in sorted(stacks, key=lambda name: names.order(self.modules[name][0].site.path)):
            site, target = self.modules[name][0]
            found[name] = (site.batch_shape[-1], target.part.slice.total, site.fan_in)
        for name, ((site, target), *_) in self.modules.items():
            if name not in stacks:
                found[f"{name}.weight"] = (target.part.slice.total, site.fan_in)
        return found


def torch_model(names: Names, sites: Sites) -> TorchModel:
    """Name everything that the map can name.

    Raises:
      MatchError: two sites have the same name.
    """
    unnamed: dict[str, MatchError] = {}
    named: list[Site] = []
    for site in sites.values():
        try:
            names.targets(site, sites)
            named.append(site)
        except MatchError as error:
            unnamed[site.path] = error
    places: dict[str, list[Place]] = {}
    for path, targets in names.resolve(named, sites).items():
        for target in targets:
            places.setdefault(target.name, []).append(Place(sites[path], target))
    tensors: dict[str, str] = {}
    stacks = stacked(sites)
    for path in sites.all_paths:
        try:
            tensors[tensor_name(names, path, sites.get(path), stacks)] = path
        except MatchError:
            continue
    ordered = {name: tuple(sorted(each, key=_start)) for name, each in places.items()}
    return TorchModel(ordered, tensors, unnamed)


def _start(place: Place) -> int:
    return place.target.part.slice.start


def stacked(sites: Sites) -> frozenset[str]:
    """Modules of which the weights are stacks, so that their biases are too."""
    return frozenset(path.rpartition("/")[0] for path, site in sites.items() if site.batch_axes)


def tensor_name(names: Names, path: str, site: Site | None, stacks: frozenset[str]) -> str:
    """What PyTorch calls a parameter that it has whole.

    Args:
      names: the map.
      path: of the parameter.
      site: how it is used, if that is known.
      stacks: modules that are stacks, from `stacked`.

    Raises:
      MatchError: it has no name, or is stacked or fused.
    """
    leaf = path.rpartition("/")[2]
    if (site is not None and site.batch_axes) or path.rpartition("/")[0] in stacks:
        raise MatchError(f"{path!r} is a stack of weights, and PEFT trains whole modules only, one at a time")
    weight = leaf in _WEIGHTS or (site is not None and site.kind != "full")
    return f"{names.module(path)}.{'weight' if weight else 'bias' if leaf in _BIASES else leaf}"


def is_tied(site: Site, name: str, names: Names, model: TorchModel) -> bool:
    """Whether a look-up table is the output head too.

    The program tells, by what it does with the table, or the map, which names its head: a table that is used several
    times may be a head among other things that come out. A head with a parameter of its own is another table.

    Args:
      site: the table.
      name: of its module.
      names: the map.
      model: the names of everything.

    Raises:
      MatchError: the map calls the table's head by the name of another parameter.
    """
    if site.kind != "embedding" or site.uses < 2:
        return False
    head = names.tied.get(name)
    places = model.modules.get(head, ()) if head else ()
    own = places[0].site.path if places else model.tensors.get(f"{head}.weight")
    if own is not None and site.head:
        raise MatchError(
            f"{site.path!r} is look-up table and output head at once, and the map calls that head {head!r}, which is "
            f"the name of {own!r}. Correct one of them: Names(tied={{{name!r}: ...}}), or the rule for {own!r}."
        )
    return own is None and (site.head or head is not None)
