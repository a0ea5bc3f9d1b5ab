"""Shell completion of config groups, their options, and keys. Typer's, but for the script that bash runs."""

from __future__ import annotations

from typer import _completion_shared as shared

# bash takes `peft=ql` for three words, and adds a space after a completed one. So: words are parted at white space only,
# what bash has parted off before the last = or : is taken off the answers, and no space follows a `key=`.
BASH = """
%(complete_func)s() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local words=($line) word="${line##*[[:space:]]}"
    local number=${#words[@]} parted="${word%%"${word##*[=:]}"}"
    [[ $word ]] && number=$((number - 1))
    local IFS=$'\\n'
    COMPREPLY=( $(env COMP_WORDS="$line" COMP_CWORD=$number %(autocomplete_var)s=complete_bash $1) )
    COMPREPLY=( "${COMPREPLY[@]#"$parted"}" )
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""


def install() -> None:
    """Let `--show-completion` and `--install-completion` give the script above for bash."""
    shared._completion_scripts["bash"] = BASH


def overrides(stage: str, word: str) -> list[str]:
    """`+peft=ql` -> ["+peft=qlora"], `optim.l` -> ["optim.lr="]."""
    from posttrain.config.compose import completions

    return completions(stage, word)
