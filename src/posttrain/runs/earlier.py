"""What earlier versions called things: keys of configs that still work for one version, and runs that still open."""

from __future__ import annotations

from typing import Any, cast

RENAMED_KEYS = {"reward.missing_end": "reward.missing_eos_penalty"}  # old -> new, since 0.2
RENAMED_MODULES = {"posttrain.rules": "posttrain.rewards"}  # where a function of ours is named, since 0.2
RENAMED_FIGURES = {"clip_share": "clip_fraction", "learnt": "shaped_reward"}  # of metrics.jsonl and of checkpoints, since 0.2
# below these the keys are the user's own
NAMED_BY_USER = (
    *("data.sources.", "data.general.", "data.columns.", "data.template_kwargs.", "eval.sets."),
    *("dpo.loss.", "dpo.options.", "reward.options.", "eval.generate.options."),
)
_DPO = {
    "dpo.beta": 0.1,
    "dpo.label_smoothing": 0.0,
}  # defaults of 0.2: today the loss's own, which are the same, but for the beta of sigmoid_norm
OF_POLICIES = {"ppo.loss": "ppo", "ppo.kl_in": "reward"}  # what there was no other choice of, before today's
CURRICULUM = "curriculum.order"  # of what checkpoints hold, since 0.2
OF_CONTENT = "sha256:"  # how a name begins that says what was read, and nothing of the code that has read it


def current_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config as today's version writes it. `config` stays as it is."""
    for old, new in RENAMED_KEYS.items():
        config = _moved(config, old.split("."), new.split("."))
    return _current_value(config)


def as_it_ran(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the settings that its version did not have yet, where today's default is not what it did."""
    data, ppo = config.get("data"), config.get("ppo")
    if isinstance(data, dict) and "eval_rows" in data:
        config = config | {"data": {"eval_rest": "drop"} | cast("dict[str, Any]", data)}
    if isinstance(ppo, dict):
        then: dict[str, Any] = {key.removeprefix("ppo."): value for key, value in OF_POLICIES.items()}
        then |= {"clip_high": ppo["clip"]} if "clip" in ppo else {}
        config = config | {"ppo": then | cast("dict[str, Any]", ppo)}
    return config


def as_of_today(then: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What made a run itself, by key, so that it compares with `now` though an earlier version has written it; and a line on what
    cannot be compared.

    A key that the earlier version did not have is no change: the run goes on with today's value.
    """
    found = {RENAMED_KEYS.get(key, key): _current_value(value) for key, value in then.items()}
    lines: list[str] = []
    if CURRICULUM in now and CURRICULUM not in found:
        lines.append(f"{CURRICULUM} is today's: the earlier version drew another one, which did not end as the curriculum says")
    if now.get("data.eval_rest") == "train" and "data.eval_rows" in found and "data.eval_rest" not in found:
        lines.append("trains on rows beyond data.eval_rows, which the earlier version left out (data.eval_rest=drop)")
    usual = {key: value for key, value in _DPO.items() if (now.get("dpo.loss"), key) != ("sigmoid_norm", "dpo.beta")}
    found |= {key: None for key, value in usual.items() if now.get(key, value) is None and found.get(key) == value}
    found |= {key: value for key, value in OF_POLICIES.items() if key in now and "ppo.clip" in found and key not in found}
    found |= {key: value for key, value in now.items() if _is_new(key, found)}
    if str(now.get("data.content")).startswith(OF_CONTENT) and not str(found.get("data.content")).startswith(OF_CONTENT):
        lines.append(
            f"data.content was {found.get('data.content')}, which names the rows and an earlier version's code together: whether "
            "the rows are the same cannot be told"
        )
        found["data.content"] = now["data.content"]
    if same_base(found.get("model.weights"), now.get("model.weights")):
        found["model.weights"] = now["model.weights"]
    return found, lines


def same_base(one: str | None, other: str | None) -> bool:
    """Do two digests of models/hub.py name the same model? One of an earlier version names weights alone, and is compared so."""
    if not one or not other:
        return False
    return all(mine == its for mine, its in zip(one.split(":"), other.split(":"), strict=False))


def current_state(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps beside the weights, its figures by today's names."""
    figures = {key: state[key] for key in ("first", "window") if isinstance(state.get(key), dict)}
    return state | {key: current_figures(values) for key, values in figures.items()}


def current_figures(values: dict[str, Any]) -> dict[str, Any]:
    """By today's names; what stands before a / stays."""
    return {_renamed_figure(name): value for name, value in values.items()}


def current_parameter(name: str) -> str:
    """A parameter's name in a checkpoint; those of several processes once had their wrapper's in front."""
    return name.removeprefix("module.")


def current_function(name: str) -> str:
    """`module:name` with today's module."""
    module, separator, function = name.partition(":")
    return f"{RENAMED_MODULES.get(module, module)}{separator}{function}"


def _renamed_figure(name: str) -> str:
    group, slash, last = name.rpartition("/")
    return f"{group}{slash}{RENAMED_FIGURES.get(last, last)}"


def _is_new(key: str, then: dict[str, Any]) -> bool:
    """A key of which the earlier version knew nothing. One below a section that was null there, or that was empty but for the
    user's own words, is none: that is a setting which has changed."""
    parts = key.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    return key not in then and not key.startswith(NAMED_BY_USER) and not any(each in then for each in above)


def _current_value(value: Any) -> Any:
    """Functions by today's modules, however deep they lie."""
    if isinstance(value, dict):
        return {key: _current_value(each) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_current_value(each) for each in cast("list[Any]", value)]
    return current_function(value) if isinstance(value, str) and ":" in value else value


def _moved(tree: dict[str, Any], old: list[str], new: list[str]) -> dict[str, Any]:
    """With the value at `old` at `new`, which lies in the same section."""
    if len(old) == 1:
        return {new[0] if key == old[0] else key: value for key, value in tree.items()}
    section = tree.get(old[0])
    return {**tree, old[0]: _moved(cast("dict[str, Any]", section), old[1:], new[1:])} if isinstance(section, dict) else tree
