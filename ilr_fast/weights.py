"""How the weights that the trainer changes reach an engine with a model of its own.

`share`: the trainer's parameters become views of the engine's. The engine's model fuses some matrices; a fused
parameter holds its parts as rows, one part after the other (q, k, v; gate, up), and an embedding may have rows more
than the vocabulary. An optimizer step then changes what the engine reads at its next step: no copy, no second memory.

    share(model, engine_model, "agents.ada")

Which part is where follows from the engine model itself (`packed_modules_mapping` and the fused layer's `output_sizes`,
vLLM's names). That it is so is then checked: the engine's own loader puts the trainer's tensors where they belong, each
view must hold its parameter's values, and together they must cover all that the engine has.

`copy`: after an update every tensor goes through the engine's loader, one after the other.

    copy = WeightCopy(model, engine_model, "agents.ada")
    optimizer.step(...)
    copied = copy()          # bytes

Of a model with adapters (peft) it is the base's parameters that are shared or copied; the adapters themselves go to the
engine by engines/vllm_lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ilr_fast.errors import UserError

EMBEDDED = "use `engine.name: embedded`"
Reload = Callable[[Iterable[tuple[str, Tensor]]], None]
REMEDY = "set `engine.weights: copy` (or `auto`, which shares where it can)"


class CannotShare(UserError):
    """A parameter of the trainer that is no view of the engine's; the message names it."""

    def __init__(self, what: str, where: str):
        super().__init__(f"the engine's weights can't be shared: {what}", f"{where}.engine.weights", REMEDY)


def connect(
    model: nn.Module, engine_model: nn.Module, how: str, device: torch.device, where: str, reload: Reload | None = None
) -> WeightCopy | None:
    """Shares the weights (None), or makes the copy and returns what keeps it up to date; `how` is engine.weights.

    `reload`: how an engine takes weights that computes with something else, made of them as they are loaded.
    """
    if how != "copy":
        try:
            share(model, engine_model, where)
            model.to(device)  # buffers; the parameters are there already
            check_shared(model, engine_model, where)
            return None
        except CannotShare:
            if how == "share":
                raise
    model.to(device)
    copy = WeightCopy(model, engine_model, where, reload)
    copy()
    return copy


@torch.no_grad()
def share(model: nn.Module, engine_model: nn.Module, where: str) -> None:
    """Makes every parameter of `model` a view of `engine_model`'s, values kept; CannotShare leaves `model` as it was.

    `model` may still be on another device: a parameter's memory there is given up as its view takes over. Parameter
    objects stay the same, so an optimizer made before or after works on the views.
    """
    with _without_adapters(engine_model):
        _share(base_parameters(model), engine_model, where)


def _share(parameters: dict[str, nn.Parameter], engine_model: nn.Module, where: str) -> None:
    views = {name: _view(name, parameter, engine_model, where) for name, parameter in parameters.items()}
    _check_coverage(views, engine_model, where)
    _load(parameters, engine_model, where)
    for name, parameter in parameters.items():
        if not torch.equal(views[name], parameter.to(views[name].device)):
            raise CannotShare(f"{name} has other values in the engine than in the trainer", where)
    for name, parameter in parameters.items():
        parameter.data = views[name]
    _check_shared(parameters, engine_model, where)


_checked: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()  # by engine, where what was found good lay


def check_shared(model: nn.Module, engine_model: nn.Module, where: str) -> None:
    """Raises CannotShare for the first parameter of `model` that does not lie where the engine reads.

    They are not compared one by one again while every parameter of both models lies where it lay.
    """
    with torch._C.DisableTorchFunctionSubclass():
        places = [(p.data_ptr(), p.stride()) for one in (model, engine_model) for p in one.parameters()]
    if _checked.get(engine_model) == places:
        return
    with _without_adapters(engine_model):
        _check_shared(base_parameters(model), engine_model, where)
    _checked[engine_model] = places


def _check_shared(parameters: dict[str, nn.Parameter], engine_model: nn.Module, where: str) -> None:
    with torch._C.DisableTorchFunctionSubclass():  # vLLM's parameters are of a class of its own: each call takes 5 µs
        for name, parameter in parameters.items():
            view = _view(name, parameter, engine_model, where)
            if parameter.data_ptr() != view.data_ptr() or parameter.stride() != view.stride():
                raise CannotShare(f"{name} has moved away from the engine's memory", where)


def load(model: nn.Module, engine_model: Any, where: str, reload: Reload | None = None) -> int:
    """Copies all parameters by the engine's own loader; returns the bytes that were copied."""
    with _without_adapters(engine_model):
        return _load(base_parameters(model), engine_model, where, reload)


def _load(parameters: dict[str, nn.Parameter], engine_model: Any, where: str, reload: Reload | None = None) -> int:
    copied = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal copied
        for name, parameter in parameters.items():
            copied += parameter.numel() * parameter.element_size()
            yield name, parameter.detach()

    with torch.no_grad():
        if reload is not None:
            reload(tensors())
            return copied
        loaded = engine_model.load_weights(tensors())
    for name in sorted(set(dict(engine_model.named_parameters())) - set(loaded)):
        raise UserError(f"the trainer's model has nothing for {name}", f"{where}.engine.name", EMBEDDED)
    return copied


class WeightCopy:
    """Keeps an engine's own weights equal to the trainer's: called after an update, it copies them.

    All of them: torch's fused AdamW does not count its writes (`Tensor._version`), so nothing tells what has changed.
    """

    def __init__(self, model: nn.Module, engine_model: nn.Module, where: str, reload: Reload | None = None):
        self._model, self._engine_model, self._where, self._reload = model, engine_model, where, reload
        with _without_adapters(engine_model):
            for name in base_parameters(model) if reload is None else ():
                if _rows(name, engine_model) is None:
                    kind = type(engine_model).__name__
                    raise UserError(f"{name} has no counterpart in vLLM's {kind}", f"{where}.engine.name", EMBEDDED)

    def __call__(self) -> int:
        """Copies every parameter, one after the other; returns the bytes."""
        return load(self._model, self._engine_model, self._where, self._reload)


def base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that are no adapter's, by their names in the model without adapters."""
    if not hasattr(model, "peft_config"):
        return dict(model.named_parameters())
    named = model.get_base_model().named_parameters()
    return {name.replace(".base_layer.", "."): p for name, p in named if ".lora_" not in name}


@contextmanager
def _without_adapters(engine_model: nn.Module) -> Iterator[None]:
    """The engine's layers as they are below its adapters: what its loader and the names here know."""
    wrapped: list[tuple[Any, str, Any]] = [
        (parent, name, child)
        for parent in list(engine_model.modules())
        for name, child in parent._modules.items()
        if isinstance(getattr(child, "base_layer", None), nn.Module)
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child.base_layer
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def extra_bytes(model: nn.Module, engine_model: nn.Module) -> int:
    """Memory that both models' parameters take beyond those of `model`."""
    storages = [p.untyped_storage() for p in (*model.parameters(), *engine_model.parameters())]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(held.values()) - sum(p.nbytes for p in model.parameters())


def _view(name: str, parameter: Tensor, engine_model: nn.Module, where: str) -> Tensor:
    """The rows of the engine's parameter that `parameter` becomes."""
    found = _rows(name, engine_model)
    if found is None:
        raise CannotShare(f"{name} has no counterpart in {type(engine_model).__name__}", where)
    view, padded = found
    rows = parameter.shape[0]
    if padded and view.shape[0] > rows:
        view = view[:rows]
    if view.shape != parameter.shape or view.dtype != parameter.dtype:
        here, there = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (parameter, view))
        raise CannotShare(f"{name} is {here} in the trainer and {there} in the engine", where)
    return view


def _rows(name: str, engine_model: Any) -> tuple[Tensor, bool] | None:
    """The engine's tensor for a name of the trainer's, and whether it may have rows more (an embedding's padding)."""
    places = _places.setdefault(engine_model, {})
    if name not in places:
        places[name] = _place(name, engine_model)
    place = places[name]
    whole = None if place is None else getattr(place.module, place.kind, None)
    if place is None or not isinstance(whole, Tensor):
        return None
    if not place.sizes:
        return whole.data, hasattr(place.module, "org_vocab_size")
    if whole.shape[0] != sum(place.sizes):
        return None
    return whole.data.narrow(0, sum(place.sizes[: place.part]), place.sizes[place.part]), False


class _Place(NamedTuple):
    """Which tensor of an engine's module, and which of its parts (rows of `sizes`, one after the other)."""

    module: Any
    kind: str
    sizes: tuple[int, ...] = ()
    part: int = 0


_places: WeakKeyDictionary[Any, dict[str, _Place | None]] = WeakKeyDictionary()  # of each engine's model


def _place(name: str, engine_model: Any) -> _Place | None:
    packed: dict[str, list[str]] = getattr(engine_model, "packed_modules_mapping", None) or {}
    path, _, kind = name.rpartition(".")
    parent, _, child = path.rpartition(".")
    for fused, parts in packed.items():
        if child in parts and (module := _submodule(engine_model, f"{parent}.{fused}".lstrip("."))) is not None:
            sizes = tuple(module.output_sizes)
            return _Place(module, kind, sizes, parts.index(child)) if len(sizes) == len(parts) else None
    module = _submodule(engine_model, path)
    return None if module is None else _Place(module, kind)


def _submodule(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _check_coverage(views: dict[str, Tensor], engine_model: nn.Module, where: str) -> None:
    """Every number of the engine's that is not padding belongs to a parameter of the trainer's."""
    covered: dict[int, int] = {}
    for view in views.values():
        base = view.untyped_storage().data_ptr()
        covered[base] = covered.get(base, 0) + view.numel()
    for path, module in engine_model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            rows = getattr(module, "org_vocab_size", None) if parameter.ndim else None
            wanted = parameter.numel() if rows is None else parameter[:rows].numel()
            if covered.get(parameter.untyped_storage().data_ptr(), 0) != wanted:
                raise CannotShare(f"the trainer's model does not hold all of {path}.{kind}", where)
