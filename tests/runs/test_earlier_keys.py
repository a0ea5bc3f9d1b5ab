"""A config that an earlier version wrote, as today's reads it."""

from posttrain.runs.earlier import current_config


def test_keys_that_came_later_have_what_runs_without_them_did() -> None:
    then = {"stage": "dpo", "model": {"name": "tiny", "attention": "dense"}, "dpo": {"loss": "ipo", "beta": 0.1}}
    now = current_config(then)
    assert now["model"] == {"name": "tiny", "attention": "dense", "kernels": "auto"}
    assert now["dpo"] == {"loss": "ipo", "beta": 0.1, "options": None}
    assert "kernels" not in then["model"]


def test_what_a_config_says_itself_stays_and_other_stages_get_nothing() -> None:
    said = {"model": {"attention": "auto", "kernels": "reference"}, "dpo": {"loss": "sigmoid", "options": {"a": 1.0}}}
    assert current_config(said) == said
    pictures = {"stage": "dreambooth", "model": {"name": "tiny-sdxl"}}
    assert current_config(pictures) == pictures
